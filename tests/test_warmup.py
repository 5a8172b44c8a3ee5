"""The warm-up builder and the data refinement of AutoTool: labels and selections by hand, the commands end to end.

    python -m pytest tests/test_warmup.py
"""

import json
import random
from dataclasses import replace
from types import SimpleNamespace

import pytest
from test_entropy import lay_out
from tiny_models import ScriptedModel, byte_tokenizer

import rollout
import train_sft
from core.trajectory import DataError, load_trajectories, save_trajectories
from methods import refine, warmup


def sample(mode="no_think", idx=0):
    return SimpleNamespace(mode=mode, idx=idx)


SHORT, LONG = [sample(idx=i) for i in range(4)], [sample("think", i) for i in range(4)]


@pytest.mark.parametrize(
    "right, rule, expected",
    [
        ((), "any", LONG[1]),
        ((2,), "any", SHORT[2]),
        ((2,), "majority", LONG[1]),
        ((2, 3), "majority", LONG[1]),  # half is not a majority
        ((1, 2, 3), "majority", SHORT[1]),
    ],
)
def test_label_rules(right, rule, expected):
    short = [t if i in right else None for i, t in enumerate(SHORT)]
    assert warmup.label(short, [None, *LONG[1:]], rule) is expected
    assert warmup.label([None] * 4, [None] * 4, rule) is None
    assert warmup.label([None] * 4, [sample("no_think"), *LONG[1:]], rule) is LONG[1]  # closed its block at once


def script(response, prompt):
    """Knows q0 without thinking, q1 and q2 only with it (q2 once in a while at once), q3 never."""
    name = prompt.partition("which ")[2][:2]
    thinks = not response.startswith("<think>\n\n</think>")
    script.calls += 1
    right = {"q0": True, "q1": thinks, "q2": thinks or script.calls % 4 == 0, "q3": False}[name]
    return ("hm</think>" if thinks else "") + f"<answer>{'yes' if right else 'no'}</answer>"


@pytest.fixture
def flags(tmp_path, monkeypatch):
    tokenizer = byte_tokenizer()
    script.calls = 0
    monkeypatch.setattr(rollout, "load_policy", lambda args, trainable: (ScriptedModel(tokenizer, script), tokenizer))
    data = tmp_path / "q.jsonl"
    rows = [{"id": f"q{i}", "question": f"which q{i}", "answer": ["yes"], "family": "fam"} for i in range(4)]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return {"model_name_or_path": "m", "data": str(data), "output": str(tmp_path / "out"), "num_generations": 4}


def test_the_builder_writes_rows_that_sft_trains_on(flags, tmp_path):
    warmup.main(warmup.Args(**flags))
    rows = load_trajectories(tmp_path / "out/sft.jsonl")
    assert [(t.question_id, t.mode) for t in rows] == [("q0", "no_think"), ("q1", "think"), ("q2", "no_think")]
    for t in rows:
        assert not t.sampled and t.loss_mask == [0] * t.prompt_len + [1] * (len(t.token_ids) - t.prompt_len)
        opening = "<think>\n\n</think>\n\n<answer>" if t.mode == "no_think" else "<think>hm</think>"
        assert t.response_text.startswith(opening)
    statistics = json.loads((tmp_path / "out/statistics.json").read_text())
    assert statistics["fam"] == statistics["all"] == pytest.approx(
        {
            "questions": 4, "short": 2, "long": 1, "left_out": 1, "no_think_accuracy": (1 + 0.25) / 4,
            "think_accuracy": 0.75, "short_by_luck": 0.5, "tokens": statistics["all"]["tokens"],
        }
    )  # fmt: skip
    tokenizer = byte_tokenizer()
    args = train_sft.Args(model_name_or_path="m", data=str(tmp_path / "out/sft.jsonl"), output_dir="x")
    loaded = train_sft.load_examples(args.data, tokenizer, args, len(tokenizer))
    assert loaded == rows


def test_majority_labels_lucky_questions_long_and_sampling_is_not_repeated(flags, tmp_path):
    warmup.main(warmup.Args(**flags))
    sampled, calls = (tmp_path / "out/think.jsonl").read_bytes(), script.calls
    rows = warmup.main(warmup.Args(**flags, label_rule="majority"))
    assert [(t.question_id, t.mode) for t in rows] == [("q0", "no_think"), ("q1", "think"), ("q2", "think")]
    assert (tmp_path / "out/think.jsonl").read_bytes() == sampled and script.calls == calls


def test_a_second_model_thinks(flags, monkeypatch):
    asked = []
    real = rollout.load_policy
    monkeypatch.setattr(rollout, "load_policy", lambda args, trainable: asked.append(args) or real(args, trainable))
    warmup.main(warmup.Args(**flags, think_model_name_or_path="big"))
    assert [(a.mode, a.model_name_or_path) for a in asked] == [("no_think", "m"), ("think", "big")]


def test_a_forced_mode_is_refused(flags):
    with pytest.raises(ValueError, match="--mode think: both modes"):
        warmup.Args(**flags, mode="think")


# ---------------------------------------------------------------------------------------------------- refinement


def test_variances_by_hand():
    """Group means .5, 1, 0 have sample variance 1/4; within groups 1/3, 0, 0."""
    p = refine.Probe("q", [[1, 0, 0, 1], [1, 1, 1, 1], [0, 0, 0, 0]], 0.5)
    assert p.over_epochs == pytest.approx(0.25) and p.over_rollouts == pytest.approx(1 / 9)
    assert refine.Probe("q", [[1.0]], 1.0).over_epochs == refine.Probe("q", [[1.0]], 1.0).over_rollouts == 0.0


def test_half_of_the_hopeless_and_of_the_trivial_goes():
    shares = [1.0] * 5 + [0.0] * 4 + [0.5] * 3
    probes = [refine.Probe(str(i), [[0.0, 1.0]], s) for i, s in enumerate(shares)]
    kept = refine.balanced(probes, random.Random(0))
    assert [sum(p.solved == s for p in kept) for s in (1.0, 0.0, 0.5)] == [3, 2, 3]
    drawn = {tuple(p.question_id for p in refine.balanced(probes, random.Random(seed))) for seed in range(20)}
    assert len(drawn) > 5 and all(refine.balanced(probes, random.Random(0)) == kept for _ in range(2))


PROBES = [
    refine.Probe("steady", [[0, 1], [1, 0]], 0.5),  # over epochs 0, over rollouts .5
    refine.Probe("silent", [[1, 1], [1, 1]], 1.0),  # 0, 0: no signal
    refine.Probe("learns", [[0, 0, 0, 1], [1, 1, 1, 0]], 0.5),  # means .25 and .75: 1/8; 1/4
    refine.Probe("leaps", [[0, 0], [1, 1]], 0.5),  # 1/2; 0 — its groups never vary
]


@pytest.mark.parametrize(
    "how, n, expected",
    [
        ("epochs_low", 1, {"steady"}),
        ("epochs_low", 4, {"steady", "learns"}),
        ("rollouts_low", 2, {"silent", "leaps"}),
        ("rollouts_high", 1, {"steady"}),
        ("rollouts_high", 2, {"steady", "learns"}),
    ],
)
def test_refinements_by_hand(how, n, expected):
    for seed in range(5):
        assert {p.question_id for p in refine.refine(PROBES, how, n, random.Random(seed))} == expected


def test_random_refinement_and_ties():
    drawn = {frozenset(p.question_id for p in refine.refine(PROBES, "random", 2, random.Random(s))) for s in range(40)}
    assert len(drawn) == 6
    ties = [refine.Probe(str(i), [[0, 1], [0, 1]], 0.5) for i in range(9)]
    assert len({refine.refine(ties, "epochs_low", 1, random.Random(s))[0].question_id for s in range(40)}) > 4


@pytest.fixture
def probes(tmp_path):
    """Two epochs of three questions; q0 rises from half to all right, q1 stays, q2 is never solved."""
    data = tmp_path / "q.jsonl"
    data.write_text("".join(json.dumps({"id": f"q{i}", "question": "?", "answer": ["yes"]}) + "\n" for i in range(3)))
    right = [[(1, 0), (1, 0), (0, 0)], [(1, 1), (0, 1), (0, 0)]]
    for epoch, rows in enumerate(right):
        made = [
            replace(
                lay_out(("text", [0.5]), idx=i, question_id=f"q{q}", gold=["yes"], task="qa", mode="no_think"),
                response_text=f"<answer>{'yes' if ok else 'no'}</answer>",
            )
            for q, row in enumerate(rows)
            for i, ok in enumerate(row)
        ]
        save_trajectories(tmp_path / f"e{epoch}.jsonl", made)
    files = [str(tmp_path / f"e{epoch}.jsonl") for epoch in (0, 1)]
    return {"trajectories": files, "data": str(data), "output": str(tmp_path / "r.jsonl"), "num_questions": 1}


def test_refine_command(probes, tmp_path, capsys):
    kept = refine.main(refine.Args(**probes))
    assert [q.id for q in kept] == ["q1"] and "| kept" in capsys.readouterr().out
    assert [json.loads(line)["id"] for line in open(tmp_path / "r.jsonl")] == ["q1"]
    statistics = json.loads((tmp_path / "r.jsonl.statistics.json").read_text())
    assert statistics["sampled"]["n"] == 3 and statistics["kept"]["variance_over_epochs"] == 0.0
    # asymmetric reward ±1: q0's means are 0 and 1
    assert statistics["sampled"]["variance_over_epochs"] == pytest.approx(0.5 / 3)
    with pytest.raises(DataError, match="r.jsonl exists"):
        refine.main(refine.Args(**probes))


def test_refine_errors(probes, tmp_path):
    with pytest.raises(ValueError, match="epochs_low needs"):
        refine.Args(**probes | {"trajectories": probes["trajectories"][:1]})
    lines = (tmp_path / "e1.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "e1.jsonl").write_text("".join(lines[2:]))
    with pytest.raises(DataError, match="e1.jsonl: question_id 'q0' is not in every file"):
        refine.main(refine.Args(**probes))
