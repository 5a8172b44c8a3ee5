"""Answer extraction, math equivalence, EM/F1 and the metrics of PAPERS A6.

Run: TARE_DATA=… python -m pytest tests/test_metrics.py
"""

import json
import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from eval import metrics
from eval.metrics import (
    efficiency,
    exact_match,
    extract_answer,
    f1,
    f1_et,
    math_equal,
    reasoning_length,
    successful_execution,
)


def rows(name):
    root = os.environ.get("TARE_DATA")
    if not root:
        pytest.skip("TARE_DATA is not set: no graded pairs here")
    return [json.loads(line) for line in open(Path(root) / "grader" / name, encoding="utf-8")]


@pytest.mark.parametrize(
    "text, expected",
    [
        ("<think>a</think>\n<answer> 42 </answer>", "42"),
        ("<answer>so \\boxed{7}, and then \\boxed{\\frac{1}{2}} .</answer>", "\\frac{1}{2}"),
        ("<answer>1</answer> no <answer>2</answer>", "2"),
        ("<answer>\\boxed{3}</answer> \\boxed{4}", "3"),
        ("no tags, \\boxed{a_{1}}", "a_{1}"),
        ("\\boxed{\\{1,2\\}} done", "\\{1,2\\}"),
        ("\\boxed{\\left\\{x\\right.}", "\\left\\{x\\right."),
        ("$\\boxed 5$", "5"),
        ("\\boxed{\\boxed{5}}", "5"),
        ("\\boxed{\\boxed{", ""),
        ("<answer>cut off", ""),
        ("nothing", ""),
        ("", ""),
        ("<python>1</python>\n<result>\n<answer>9</answer> \\boxed{9}\n</result>\n<think>hm</think>", ""),
        ("<answer>two\nlines</answer>", "two\nlines"),
    ],
)
def test_extract_answer(text, expected):
    assert extract_answer(text) == expected


def test_math_equal_on_graded_pairs():
    right, wrong = 0, []
    for row in rows("math_equiv_pairs.jsonl"):
        if row["strictness"] == "must" and row["category"] != "hostile":
            if math_equal(row["prediction"], row["reference"]) == row["is_equal"]:
                right += 1
            else:
                wrong.append((row["prediction"], row["reference"]))
    assert right >= 0.99 * (right + len(wrong)) and right > 100, wrong


@pytest.mark.parametrize(
    "prediction, gold, expected",
    [
        ("1 + 274 i", "1+274i", True),
        ("204_6", "204_5", False),
        ("204_{6}", "204_6", True),
        ("$\\frac{1}{2}$", "0.5", True),
        ("\\[ \\frac{1}{2} \\]", 0.5, True),
        ("36\\text{ cm}", 36, True),
        ("x=4", "5", False),
        ("2", ["1", "2"], True),
        ("3", ["1", "2"], False),
        ("2e-05", "2 \\times 10^{-5}", True),
        ("10^5", "1e5", True),
        ("(2e-05,3)", "(0.00002,3)", True),
        ("2e - 1", "2e-1", True),  # Euler's e stays possible
        ("1\\%", "1e-4", False),
        ("12.5\\%", "12.5", True),
        ("12.5", "12.5\\%", True),
        ("12.5 percent", "0.125", True),
        ("12.5\\text{ percent}", 12.5, True),
        ("50\\%", "5000", False),
        ("0.5\\%", "50\\%", False),
        ("33\\frac{1}{3}\\%", "\\frac{100}{3}", True),
        ("33\\frac{1}{3}\\%", "33\\frac{2}{3}\\%", False),  # math-verify reads 33 in both
        ("3 \\times 10^{-7}", "0.0000002", False),  # math-verify rounds to six decimals
        ("1.6 \\times 10^{-19}", "6.62 \\times 10^{-34}", False),
        ("\\frac{1}{2^{99}}", "\\frac{1}{2^{98}}", False),
        ("\\frac{1}{3000}", "0.000333333333333333", True),
        ("e5", "5e", True),
        ("1e-400", "0", False),
        ("0.5", "We add 3 and 4, so it is $\\boxed{\\frac{1}{2}}$. " + "So it is. " * 60, True),  # a worked solution
    ],
)
def test_math_equal_through_the_worker_and_types_of_gold(prediction, gold, expected):
    assert math_equal(prediction, gold) is expected


@pytest.mark.parametrize(
    "prediction, gold, expected",
    [
        ("58,500", "58500", True),
        ("\\$18.90", "18.9", True),
        ("11,\\! 111", "11111", True),
        ("1{,}000", 1000, True),
        ("073", "73", True),
        ("5.", 5.0, True),
        ("0.30000000000000004", "0.3", True),  # what a float prints
        ("12345678901", "12345678902", False),
        ("12345678901.0", "12345678902", False),
        ("58.5", "58,500", False),
        ("−5", "-5", True),
        ("2e-05", "0.00002", True),  # so do small ones
        ("1.5E+3", "1,500", True),
        ("2e-05", "0.00003", False),
        ("yes", "yes", True),
        ("", "5", False),
        ("  ", "", False),
        ("9" * 400, "3", False),
        ("x" * 10_000, "3", False),
    ],
)
def test_cheap_pairs_never_reach_the_worker(prediction, gold, expected, monkeypatch):
    monkeypatch.setattr(metrics, "_ask_worker", lambda *pair: pytest.fail(f"worker asked about {pair}"))
    if prediction == "9" * 400:
        monkeypatch.setattr(metrics, "_ask_worker", lambda *pair: False)  # too long for a float: the worker's business
    assert math_equal(prediction, gold) is expected


def test_hostile_predictions_neither_hang_nor_kill(monkeypatch):
    monkeypatch.setattr(metrics, "MATH_SECONDS", 1.0)
    hostile = [row["prediction"] for row in rows("math_equiv_pairs.jsonl") if row["category"] == "hostile"]
    hostile += [
        "10^{10^{10^{10}}}",
        "2^{2^{2^{2^{2^2}}}}",
        "(" * 450,
        "\\frac{" * 80,
        "\ud800",
        "\x00",
        "a\n\r\n1",
        "$" * 99,
    ]
    assert len(hostile) > 10
    start = time.monotonic()
    assert not any(math_equal(text, "3") for text in hostile)
    assert time.monotonic() - start < 40
    assert math_equal("\\sqrt{12}", "2\\sqrt{3}")  # still in service


def test_memory_of_the_worker_is_limited_and_a_dead_worker_is_replaced():
    assert math_equal("\\sqrt{8}", "2\\sqrt{2}")
    limits = Path(f"/proc/{metrics._worker.process.pid}/limits").read_text()
    assert any(line.startswith("Max address space") and str(2 << 30) in line for line in limits.splitlines())
    metrics._worker.process.kill()
    metrics._worker.process.wait()
    assert math_equal("\\sqrt{18}", "3\\sqrt{2}")


def test_math_equal_from_threads():
    verdicts = {}
    threads = [
        threading.Thread(target=lambda n=n: verdicts.update({n: math_equal(f"\\sqrt{{{n * n}}}", f"{n - n % 2}")}))
        for n in range(2, 10)
    ]
    [thread.start() for thread in threads]
    [thread.join() for thread in threads]
    assert verdicts == {n: n % 2 == 0 for n in range(2, 10)}


def test_importing_metrics_starts_nothing_and_needs_no_math_verify():
    code = "import sys, eval.metrics as m; assert m._worker.process is None and 'math_verify' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_em_and_f1_equal_the_recorded_values():
    graded = rows("qa_model_predictions.jsonl")
    assert len(graded) == 700
    for row in graded:
        assert exact_match(row["prediction"], row["golden_answers"]) == row["em"], row["id"]
        assert f1(row["prediction"], row["golden_answers"]) == pytest.approx(row["f1"], abs=1e-6), row["id"]


def test_f1_by_hand():
    assert f1("the House of Mirrors", "Key House Mirror") == pytest.approx(1 / 3)  # 1 of 3 and 1 of 3 tokens
    assert f1("Barack Hussein Obama", ["Obama", "Barack Obama"]) == pytest.approx(0.8)  # best alias: 2·2/(3+2)
    assert f1("yes it is", "yes") == 0 and f1("no", "no one") == 0 and f1("Yes.", "yes") == 1
    assert f1("\\text{Paris}", "paris") == 1
    assert f1("1984", 1984) == 1 and f1("", "x") == 0 and f1("x", []) == 0
    assert f1_et("the U.S.", "U.S.") == 1 and f1_et("us", "U.S.") == 0 and f1("us", "U.S.") == 1  # punctuation is kept
    assert f1_et("yes it is", "yes") == pytest.approx(0.5)
    for only in ("A", "The", "+"):  # nothing but an article or punctuation
        assert exact_match(only, [only]) == f1(only, only) == f1_et(only, only) == 1
        assert exact_match("", only) == f1("", only) == exact_match("x", only) == 0
    assert exact_match("", [""]) == 0 and exact_match("an A", "a") == 0 and f1("\\text{a}", "A") == 1
    assert exact_match("The Beatles!", ["x", "beatles"]) == 1 and exact_match("beatle", "beatles") == 0


def test_behaviour_aware_metrics_by_hand():
    assert efficiency([1, 1, 0.5, 0], [0, 2, 4, 3]) == pytest.approx((1 + 1 / 2 + 0.125 + 0) / 4)
    assert successful_execution([1, 1, 0.8, 0], [0, 1, 2, 5]) == pytest.approx((1 + 1 + 0.4) / 4)
    assert reasoning_length([1, 0.5, 1], [200, 100, 0]) == pytest.approx((0.005 + 0.005 + 1) / 3)
    with pytest.raises(ValueError):
        efficiency([1, 1], [1])
    with pytest.raises(ValueError):
        efficiency([], [])
