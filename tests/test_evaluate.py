"""Evaluation numbers and the report, worked out by hand on four trajectories.

    python -m pytest tests/test_evaluate.py
"""

import json

import pytest

from core.trajectory import Span, ToolCall, Trajectory, save_trajectories, write_jsonl
from eval import evaluate as e
from experiments import chains, reproduce
from experiments.report import write_report
from experiments.shared import EVAL_SEED


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


@pytest.fixture
def job(tmp_path):
    return chains.Job(tmp_path, "base", "index", 3, None)


def test_share_of_questions_that_training_has_seen(job):
    for part, asked in (("train", "abc"), ("eval", "bxyz")):
        rows = [{"id": q, "question": q, "answer": "1"} for q in asked]
        write_jsonl(job.folder / f"{part}.questions.jsonl", rows)
    assert reproduce.seen_share(job) == 0.25


def test_hard_sums_are_told_by_other_samples_than_those_that_are_measured(job, monkeypatch):
    class Sampled(Exception):
        pass

    def sample(self, name, model, data, **flags):
        raise Sampled(name, flags)

    for part in ("sums", "sums-eval"):
        (job.folder / f"{part}.questions.jsonl").touch()
    monkeypatch.setattr(chains.Job, "sample", sample)
    with pytest.raises(Sampled) as first:
        chains.autotool(job)
    name, flags = first.value.args
    assert name == "sums-probe" and flags["mode"] == "no_think" and flags["seed"] != EVAL_SEED + job.seed


def test_combine_takes_means_and_sample_deviations():
    one, other = e.evaluate(FOUR), e.evaluate(FOUR[:2])
    combined = reproduce.combine([{"stages": {"base": m}, "sums": {"think": {"all": m["all"]}}} for m in (one, other)])
    assert combined["stages"]["base"]["correctness"] == pytest.approx(0.75)
    assert combined["spread"]["base"]["correctness"] == pytest.approx(0.5 / 2**0.5)
    assert combined["sums"]["think"]["all"]["correctness"] == pytest.approx(0.75)
    assert "spread" not in reproduce.combine([{"stages": {"base": one}, "sums": {}}])


def test_report_holds_tables_and_figures(tmp_path):
    whole = e.evaluate(FOUR)
    metrics = reproduce.combine([{"stages": {"et_agent": whole, "base": whole}, "sums": {"think": {"all": whole["all"]}}}])
    run = tmp_path / "run"
    run.mkdir()
    log = [{"step": s, "reward": 0.1 * s, "rewards/correct/mean": 0.5, "tools/call_frequency": 1.0} for s in (1, 2)]
    log = [row | {"completions/mean_length": 9.0, "entropy": 0.2, "frac_reward_zero_std": 0.0} for row in log]
    (run / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in log))
    text = write_report(tmp_path, metrics, {"et_agent": [run]}, ["one seed"]).read_text()
    assert list(metrics["stages"]) == ["base", "et_agent"] and "correctness all" in text
    assert "- one seed" in text and "## base, per family" in text and "| recall" in text
    for figure in ("calls.png", "curves.png"):
        assert f"({figure})" in text and (tmp_path / figure).read_bytes()[:4] == b"\x89PNG"


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
