"""The pilot analysis of entropy reduction: statistics against brute force, and the command on trajectories by hand.

    python -m pytest tests/test_entropy_pilot.py
"""

import json
from dataclasses import replace
from math import isnan, nan

import numpy as np
import pytest
import torch
from test_entropy import lay_out, search

from core.args import parse_args
from core.model import ModelArgs, load_policy
from core.trajectory import DataError, save_trajectories
from experiments import entropy_pilot
from experiments.entropy_pilot import (
    Call,
    analyse,
    auc,
    calls_of,
    correlation,
    fill_entropies,
    summary,
    with_interval,
)


def test_auc_equals_the_count_of_pairs():
    rng = np.random.default_rng(0)
    for _ in range(20):
        scores, positive = rng.integers(0, 6, 25).astype(float), rng.random(25) < 0.4  # many ties
        weights = rng.integers(0, 3, 25).astype(float)
        for w in (None, weights):
            v = np.ones(25) if w is None else w
            won = total = 0.0
            for i in np.flatnonzero(positive):
                for j in np.flatnonzero(~positive):
                    won += v[i] * v[j] * ((scores[i] > scores[j]) + 0.5 * (scores[i] == scores[j]))
                    total += v[i] * v[j]
            assert auc(scores, positive, w) == pytest.approx(won / total)


def test_auc_without_both_kinds_is_undefined():
    assert isnan(auc(np.array([1.0, 2.0]), np.array([True, True]))) and isnan(auc(np.array([]), np.array([])))


def test_correlation_equals_numpys_on_repeated_rows():
    rng = np.random.default_rng(1)
    x, y, weights = rng.normal(size=30), rng.normal(size=30), rng.integers(0, 4, 30)
    assert correlation(x, y) == pytest.approx(np.corrcoef(x, y)[0, 1])
    repeated = np.corrcoef(np.repeat(x, weights), np.repeat(y, weights))[0, 1]
    assert correlation(x, y, weights.astype(float)) == pytest.approx(repeated)
    assert isnan(correlation(x, np.ones(30)))


def test_intervals_are_seeded_and_resample_whole_questions():
    rng = np.random.default_rng(2)
    x = np.repeat(rng.normal(size=40), 5)  # five equal rows per question: as much information as 40 rows
    y = x + np.repeat(rng.normal(size=40), 5)
    clusters = [f"q{i // 5}" for i in range(200)]
    found = with_interval(correlation, x, y, clusters)
    assert found == with_interval(correlation, x, y, clusters) != with_interval(correlation, x, y, clusters, seed=1)
    assert found["low"] < found["value"] < found["high"]
    naive = with_interval(correlation, x, y, [str(i) for i in range(200)])
    assert found["high"] - found["low"] > 1.5 * (naive["high"] - naive["low"])
    assert with_interval(auc, np.array([]), np.array([]), []) == {"value": None, "low": None, "high": None}


def sample(qid, levels, answer="x", calls=("a", "b"), **fields):
    """Segments of one token at the given entropies with a call between each two."""
    pieces = [("think", [levels[0]])]
    for level in levels[1:]:
        pieces += [("tool_call", [9]), ("tool_result", [0]), ("think", [level])]
    made = [search(q, ok=q != "bad") for q in calls[: len(levels) - 1]]
    t = lay_out(*pieces, calls=made, question_id=qid, task="qa", meta={"min_tool_calls": 1, "family": "lookup"} | fields)
    return replace(t, response_text=f"<answer>{answer}</answer>")


SAMPLES = [
    sample("q0", [2, 1, 1.5]),  # needed −1, redundant +0.5
    sample("q1", [2, 1.5, 1], calls=("a", "a"), answer="y"),  # needed −0.5, repeated −0.5
    sample("q2", [1, 3], calls=("bad",)),  # failed +2
    sample("q3", [1]),
]


def test_calls_by_hand():
    calls = calls_of(SAMPLES, [1.0, 0.0, 1.0, 1.0])
    assert [(c.question_id, c.label, c.change, c.reduces, c.answer) for c in calls] == [
        ("q0", "needed", -1.0, True, "right"),
        ("q0", "redundant", 0.5, False, "right"),
        ("q1", "needed", -0.5, True, "wrong"),
        ("q1", "repeated", -0.5, True, "wrong"),
        ("q2", "failed", 2.0, False, "right"),
    ]
    assert [c.before for c in calls] == [2, 1, 2, 1.5, 1]


def test_parallel_calls_are_labelled_by_the_first():
    pieces = [("tool_call", [7]), ("text", [7]), ("tool_call", [7]), ("tool_result", [0]), ("think", [1])]
    pieces += [("tool_call", [7]), ("tool_result", [0]), ("think", [1]), ("text", [1])]
    made = [search("a"), search("b"), search("c", ok=False)]
    t = lay_out(*pieces, calls=made, dialect="hermes", meta={"min_tool_calls": 1})
    (first, second) = calls_of([t], [1.0])
    assert (first.label, second.label) == ("needed", "failed") and isnan(first.change) and second.change == 0.0


def test_calls_beside_an_empty_segment_have_no_say_in_the_share_that_reduces():
    calls = [Call("q", 1.0, change, change < 0, "needed", "search", "right", "f") for change in (-1.0, 0.5, nan, nan)]
    assert summary(calls)["reducing"] == 0.5 and summary(calls)["n"] == 4 and summary(calls)["empty"] == 2
    assert summary(calls[2:])["reducing"] is None


def test_analysis_by_hand():
    """AUC: −ΔH of needed calls 1 and .5, of the others −.5 and .5: 3.5 of 4 pairs."""
    result, _ = analyse(SAMPLES, [1.0, 0.0, 1.0, 1.0])
    assert result["auc_needed"]["value"] == pytest.approx(3.5 / 4)
    assert result["all"] == pytest.approx(
        {"n": 5, "empty": 0, "reducing": 0.6, "change": 0.1, "change_std": 1.1937336, "before": 1.5}
    )
    assert result["label"]["needed"]["change"] == -0.75 and list(result["label"]) == [
        "needed", "redundant", "repeated", "failed",
    ]  # fmt: skip
    shares, correct = [0.5, 1.0, 0.0], [1.0, 0.0, 1.0]
    assert result["correlations"]["reducing_share_and_correctness"]["value"] == pytest.approx(
        np.corrcoef(shares, correct)[0, 1]
    )
    calls, correct = [2, 2, 1, 0], [1.0, 0.0, 1.0, 1.0]
    assert result["correlations"]["calls_and_correctness"]["value"] == pytest.approx(np.corrcoef(calls, correct)[0, 1])


@pytest.mark.parametrize("others, interval", [(19, False), (20, True)])
def test_the_auc_of_few_calls_has_no_interval(tmp_path, others, interval):
    """25 needed calls against 19 or 20 repeated ones."""
    samples = [sample(f"n{i}", [2, 1 + i % 3]) for i in range(25 - others)]
    samples += [sample(f"r{i}", [2, 1 + i % 2, 1 + i % 3], calls=("a", "a")) for i in range(others)]
    result, _ = analyse(samples, [1.0] * len(samples))
    assert result["auc_calls"] == {"needed": 25, "others": others} and 0 < result["auc_needed"]["value"] < 1
    assert (result["auc_needed"]["low"] is not None) == (result["auc_needed"]["high"] is not None) == interval
    save_trajectories(tmp_path / "t.jsonl", samples)
    text = entropy_pilot.main(entropy_pilot.Args(trajectories=str(tmp_path / "t.jsonl"), output=str(tmp_path / "o")))
    assert ("fewer than 20 of either give no interval" in text) != interval
    assert f"compares 25 needed calls with {others} others" in text


def test_command_refuses_trajectories_of_another_tokenizer(tmp_path, tiny_model):
    save_trajectories(tmp_path / "t.jsonl", [replace(SAMPLES[0], entropy=None)])
    flags = dict(trajectories=str(tmp_path / "t.jsonl"), output=str(tmp_path / "o"), model_name_or_path=str(tiny_model))
    with pytest.raises(DataError, match="t.jsonl: trajectory q0/0 is of another tokenizer"):
        entropy_pilot.main(entropy_pilot.Args(**flags))


def test_command_writes_numbers_tables_and_figures(tmp_path, capsys):
    save_trajectories(tmp_path / "t.jsonl", SAMPLES)
    flags = dict(trajectories=str(tmp_path / "t.jsonl"), output=str(tmp_path / "out"))
    text = entropy_pilot.main(entropy_pilot.Args(**flags, delta_margin=0.7))
    result = json.loads((tmp_path / "out/entropy_pilot.json").read_text())
    assert result["delta_margin"] == 0.7 and result["all"]["reducing"] == 0.2
    assert (tmp_path / "out/entropy_pilot.md").read_text() == text and text in capsys.readouterr().out
    lines = [[cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines()]
    assert ["calls", "n", "empty", "reducing", "change", "change_std", "before"] in lines
    assert ["label: needed", "2", "0", "0.500", "-0.750", "0.354", "2.000"] in lines
    assert (tmp_path / "out/entropy_changes.png").stat().st_size > 5000


def test_command_without_calls_and_without_entropies(tmp_path, capsys):
    flags = dict(trajectories=str(tmp_path / "t.jsonl"), output=str(tmp_path / "out"))
    save_trajectories(tmp_path / "t.jsonl", [SAMPLES[3]])
    entropy_pilot.main(entropy_pilot.Args(**flags))
    assert json.loads((tmp_path / "out/entropy_pilot.json").read_text())["auc_needed"]["value"] is None
    save_trajectories(tmp_path / "t.jsonl", [replace(SAMPLES[3], entropy=None)])
    with pytest.raises(DataError, match="q3/0 has no field 'entropy'"):
        entropy_pilot.main(entropy_pilot.Args(**flags))
    with pytest.raises(SystemExit) as exit_:
        parse_args(entropy_pilot.Args, ["--trajectories", "t.jsonl"])
    assert exit_.value.code == 2 and "--output are required" in capsys.readouterr().err


def test_a_model_fills_in_missing_entropies(tiny_model):
    model, tokenizer = load_policy(ModelArgs(model_name_or_path=str(tiny_model)), trainable=False)
    texts = [tokenizer.decode(t.token_ids[t.prompt_len :]) for t in SAMPLES]
    bare = [replace(t, entropy=None, response_text=text) for t, text in zip(SAMPLES[:2], texts)] + [SAMPLES[2]]
    fill_entropies(bare, str(tiny_model), batch_size=2)
    for t in bare[:2]:
        with torch.no_grad():
            logp = model(torch.tensor([t.token_ids])).logits[0].log_softmax(-1)  # (T, V)
        entropy = (-(logp.exp() * logp).sum(-1)).tolist()  # of the token that comes next
        assert t.entropy == pytest.approx([0, *(h * m for h, m in zip(entropy, t.loss_mask[1:]))], abs=1e-4)
    assert bare[2].entropy == SAMPLES[2].entropy
