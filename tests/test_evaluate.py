"""Evaluation numbers and the report, worked out by hand on four trajectories.

    python -m pytest tests/test_evaluate.py
"""

import json
from dataclasses import replace

import pytest

from core.trajectory import Span, ToolCall, Trajectory, save_trajectories, write_jsonl
from eval import evaluate as e
from experiments import report, reproduce
from experiments.cells import Cell, Job
from experiments.variants import REPRODUCTION, VARIANTS


def trajectory(i, answer, calls, need, tokens, finish="eos", family="lookup"):
    """A response of `tokens` model-written tokens whose calls are (name, argument, ok) and need is min_tool_calls."""
    text = "<think>\n\n</think>\n\n" if not calls else ""
    for name, argument, ok in calls:
        text += f"<{name}>{argument}</{name}>\n<result>\n{'blue' if ok else 'error: no'}\n</result>\n"
    text += f"<answer>{answer}</answer>"
    done = [ToolCall(n, a, "blue" if ok else "error: no", ok, None if ok else "no") for n, a, ok in calls]
    return Trajectory(
        f"q{i}", 0, "think" if calls else "no_think", [1] * (tokens + 1), 1, [0] + [1] * tokens, True, text,
        [Span("text", 1, tokens + 1)], done, finish, ["blue"], "what color?", "qa",
        meta={"family": family, "min_tool_calls": need},
    )  # fmt: skip


FOUR = [
    trajectory(0, "blue", [("search", "a", True)], 1, 10),  # right, as needed
    trajectory(1, "blue", [("search", "a", True), ("search", "b", True)], 0, 20, family="recall"),  # right, 2 needless
    trajectory(2, "red", [], 1, 5),  # wrong, one call short
    trajectory(3, "blue", [("search", "", False)], 1, 40, finish="length"),  # failed call, out of tokens: S = 0
]


def test_metrics_by_hand():
    m = e.evaluate(FOUR)["all"]
    expected = {
        "n": 4,
        "correctness": 2 / 4,
        "efficiency": (1 / 1 + 1 / 2) / 4,
        "conciseness": 3 / 4,
        "successful_execution": 2 / 4,
        "reasoning_length": (1 / 10 + 1 / 20) / 4,
        "calls": 4 / 4,
        "redundant": 1 / 4,
        "redundant_calls": 2 / 4,
        "insufficient": 2 / 4,
        "failed": 1 / 4,
        "tokens": 75 / 4,
        "thinking_rate": 3 / 4,
        "malformed": 1 / 4,
        "exact_match": 2 / 4,
    }
    assert {k: m[k] for k in expected} == pytest.approx(expected)


def test_families_and_files(tmp_path, capsys):
    save_trajectories(tmp_path / "t.jsonl", FOUR)
    metrics = e.main(e.Args(trajectories=str(tmp_path / "t.jsonl"), output=str(tmp_path / "out")))
    assert json.loads((tmp_path / "out/metrics.json").read_text()) == metrics
    assert {f: m["n"] for f, m in metrics["families"].items()} == {"lookup": 3, "recall": 1}
    assert "| recall" in capsys.readouterr().out


def test_share_of_questions_that_training_has_seen(tmp_path):
    cell = Cell("v", 0, [], {part: str(tmp_path / f"{part}.jsonl") for part in ("train", "held_out")}, "")
    for part, asked in (("train", "abc"), ("held_out", "bxyz")):
        write_jsonl(cell.files[part], [{"id": q, "question": q, "answer": "1"} for q in asked])
    assert reproduce.seen_share(cell) == 0.25


def test_sums_are_split_by_what_the_base_gets_wrong_without_thinking(tmp_path):
    """q0 is hard (0 of 2 probes right), q1 easy; thinking is right on q0 alone, not thinking on q1 alone."""
    ask = lambda i, answer, tokens: trajectory(i, answer, [], 0, tokens)  # noqa: E731
    probes = [replace(ask(i, ("red", "blue")[i], 3), sample_idx=k) for i in (0, 1) for k in (0, 1)]
    save_trajectories(tmp_path / "probe.jsonl", probes)
    save_trajectories(tmp_path / "think.jsonl", [ask(0, "blue", 20), ask(1, "red", 20)])
    save_trajectories(tmp_path / "no_think.jsonl", [ask(0, "red", 4), ask(1, "blue", 4)])
    cells, probe = {}, {"held_out_probe": str(tmp_path / "probe.jsonl")}
    made = {"sums_base": "no_think", "sums_think": "think", "sums_no_think": "no_think", "base": "think"}
    for stage, file in made.items():
        job = Job(tmp_path, "rollout", {}, str(tmp_path / f"{file}.jsonl"), 0)
        cells[stage, 0] = Cell(f"quick_{stage}", 0, [job], probe, "")
    found = reproduce.seed_metrics(cells, {("base", 0): {"metrics": {"n": 9}, "families": {}, "more": 1}}, 0)
    assert found["stages"] == {"base": {"all": {"n": 9}, "families": {}}}
    right = {s: {part: m["correctness"] for part, m in row.items()} for s, row in found["sums"].items()}
    assert right["think"] == {"all": 0.5, "easy": 0, "hard": 1}
    assert right["no_think"] == {"all": 0.5, "easy": 1, "hard": 0}
    assert right["oracle"] == {"all": 1, "easy": 1, "hard": 1} and found["sums"]["oracle"]["all"]["tokens"] == 12
    assert list(found["sums"]) == ["base", "think", "no_think", "oracle"]


def test_combine_takes_means_and_sample_deviations():
    one, other = e.evaluate(FOUR), e.evaluate(FOUR[:2])
    combined = reproduce.combine([{"stages": {"base": m}, "sums": {"think": {"all": m["all"]}}} for m in (one, other)])
    assert combined["stages"]["base"]["correctness"] == pytest.approx(0.75)
    assert combined["spread"]["base"]["correctness"] == pytest.approx(0.5 / 2**0.5)
    assert combined["sums"]["think"]["all"]["correctness"] == pytest.approx(0.75)
    assert "spread" not in reproduce.combine([{"stages": {"base": one}, "sums": {}}])


@pytest.fixture
def run(tmp_path):
    (tmp_path / "run").mkdir()
    log = [{"step": s, "reward": 5 + s, "rewards/correct/mean": 0.5, "tools/call_frequency": 1.0} for s in (1, 2, 3)]
    log = [row | {"completions/mean_length": 9.0, "entropy": 0.2, "frac_reward_zero_std": 0.0} for row in log]
    (tmp_path / "run" / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in log))
    return tmp_path / "run"


def test_report_holds_tables_and_figures(tmp_path, run):
    whole, less = e.evaluate(FOUR), e.evaluate(FOUR[:3])
    parts = [{"stages": {"base": less, "et_agent": whole}, "sums": {"think": {"all": whole["all"]}}}]
    labels = {"base": "base model", "et_agent": "ET-Agent's reward", "sums_think": "always thinking"}
    given = tmp_path, reproduce.combine(parts), {"et_agent": [run]}, labels, ["One seed."]
    text = report.write_report(*given, quick=False).read_text()
    assert text.startswith("# Reproduction report\n\n- One seed.\n") and "have the same numbers" not in text
    assert "| always thinking" in text and "correctness all" in text
    assert "## Per family: base model" in text and "| recall" in text and "et_agent" not in text
    for figure in ("calls.png", "curves.png", "trade.png"):
        assert f"({figure})" in text and (tmp_path / figure).read_bytes()[:4] == b"\x89PNG"
    quick = report.write_report(*given, quick=True).read_text()
    assert "not what the methods achieve" in quick.splitlines()[0]


def test_rows_of_equal_numbers_are_remarked_on():
    rows = {"a": {"n": 1, "calls": 2.0}, "b": {"n": 1, "calls": 3.0}, "c": {"n": 1, "calls": 2.0}}
    (line, _) = report.equal_rows(rows)
    assert line.startswith('"a" and "c" have the same numbers')
    assert report.equal_rows({"a": rows["a"], "b": rows["b"]}) == []


def test_rewards_of_different_formulas_share_no_scale(tmp_path, run, monkeypatch):
    drawn = []
    monkeypatch.setattr(report, "save", lambda figure, path: drawn.append(figure))
    report.curves(tmp_path / "c.png", {"sparse": [run]})
    reward, correct = drawn[0].axes[:2]
    assert list(reward.lines[0].get_ydata()) == [0, 0.5, 1]
    assert list(correct.lines[0].get_ydata()) == [0.5, 0.5, 0.5]
    assert [text.get_text() for text in drawn[0].legends[0].get_texts()] == ["sparse (reward 6.00 to 8.00)"]


def test_every_stage_of_the_reproduction_has_a_name_for_readers():
    for kind, variants in REPRODUCTION.items():
        labels = [VARIANTS[v].label for v in variants if "_sums_" not in v]
        assert len(set(labels)) == len(labels) and not any("_" in VARIANTS[v].label for v in variants), kind


def test_subsets_by_terms_and_accuracy_per_compute():
    """Correct 1, 0 of two sums with 10 and 30 tokens: 50 % / (0.5 billion · 0.2 hundred tokens) = 500."""
    rows = [trajectory(0, "blue", [], 0, 10, family="running_sum"), trajectory(1, "red", [], 0, 30, family="running_sum")]
    for t, terms in zip(rows, (3, 8)):
        t.meta["terms"] = terms
    metrics = e.evaluate([*rows, FOUR[0]], billion_parameters=0.5)
    assert {s: m["correctness"] for s, m in metrics["subsets"].items()} == {
        "running_sum, 3 terms": 1.0,
        "running_sum, 8 terms": 0.0,
    }
    assert metrics["families"]["running_sum"]["acu"] == pytest.approx(500)
    assert metrics["families"]["running_sum"]["thinking_rate"] == 0.0 and "acu" not in e.evaluate(rows)["all"]
