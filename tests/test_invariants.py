"""grpo/checks.py: what --check finds, and that a real checked run with either engine finds nothing.

python -m pytest tests/test_invariants.py
"""

import dataclasses
import json
import math

import pytest
import torch

import train_rl
from core.model import collate, hidden_of_targets, load_policy, load_tokenizer
from core.trajectory import Span, Trajectory
from data.world import __main__ as world
from grpo.checks import BrokenInvariant, check_trajectories, masked_tokens_have_no_gradient, sampler_mismatch


def trajectory(tokenizer, text="<think>ok</think>", sample=0, prompt="Q?"):
    prompt_ids = tokenizer(prompt)["input_ids"]
    ids = tokenizer(text)["input_ids"]
    T, P = len(prompt_ids) + len(ids), len(prompt_ids)
    return Trajectory(
        question_id="q", sample_idx=sample, mode="think", token_ids=prompt_ids + ids, prompt_len=P,
        loss_mask=[0] * P + [1] * len(ids), sampled=True, response_text=tokenizer.decode(ids),
        spans=[Span("think", P, T)], tool_calls=[], finish="eos", gold="1",
        rollout_logp=[0.0] * P + [-0.5] * len(ids),
    )  # fmt: skip


@pytest.fixture
def tokenizer(tiny_model):
    return load_tokenizer(str(tiny_model))


def test_sound_trajectories_pass(tokenizer):
    check_trajectories([trajectory(tokenizer), trajectory(tokenizer, "<think>no</think>", 1)], tokenizer)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"response_text": "<think>no</think>"}, "do not decode to its text"),
        ({"spans": []}, "leave gaps"),
        ({"rollout_logp": None}, "no log-probabilities of its sampler"),
    ],
)
def test_contradictions_are_named(tokenizer, changes, message):
    with pytest.raises(BrokenInvariant, match=message):
        check_trajectories([dataclasses.replace(trajectory(tokenizer), **changes)], tokenizer)


def test_members_of_a_group_share_their_prompt(tokenizer):
    with pytest.raises(BrokenInvariant, match="q/1 has another prompt"):
        check_trajectories([trajectory(tokenizer), trajectory(tokenizer, sample=1, prompt="W?")], tokenizer)


def test_mismatch_by_hand(tokenizer):
    """Differences 0, ln 1.2 and −ln 1.2 over six tokens: two of the ratios are outside 0.9–1.1."""
    t = trajectory(tokenizer, "abcdef")
    P = t.prompt_len
    t.spans = [Span("think", P, P + 4), Span("answer", P + 4, P + 6)]
    t.old_logp = list(t.rollout_logp)
    t.old_logp[P] += math.log(1.2)
    t.old_logp[P + 5] -= math.log(1.2)
    report = sampler_mismatch([t])
    assert report["check/think/mean"] == pytest.approx(math.log(1.2) / 4)
    assert report["check/answer/max"] == pytest.approx(math.log(1.2))
    assert report["check/all/outside"] == pytest.approx(2 / 6) and report["check/answer/outside"] == 0.5
    t.loss_mask[P + 5] = 0  # not the model's token: not compared
    assert sampler_mismatch([t])["check/answer/max"] == 0.0


def test_a_leaking_gradient_is_found(tiny_model, tokenizer):
    model, _ = load_policy(train_rl.ModelArgs(model_name_or_path=str(tiny_model)))
    t = trajectory(tokenizer)
    t.loss_mask[t.prompt_len] = 0
    batch = collate([t], 0, torch.device("cpu"))
    with masked_tokens_have_no_gradient(model, batch):
        hidden, _ = hidden_of_targets(model, batch)
    hidden.sum().backward()
    with masked_tokens_have_no_gradient(model, batch):
        leaking, _ = hidden_of_targets(model, batch._replace(loss_mask=batch.attention_mask.bool()))
    with pytest.raises(BrokenInvariant, match="row 0, position"):
        leaking.sum().backward()


@pytest.mark.parametrize("engine", ["hf", "fast"])
def test_a_checked_run_of_the_world_is_sound(tmp_path, engine):
    """Real sampling with tools: in float32 sampler and trainer differ by rounding only."""
    world.main(["--questions", "40", "--seed", "5", "--output", str(tmp_path / "q.jsonl")])
    world.main(["--index", str(tmp_path / "index")])
    args = train_rl.Args(
        model_name_or_path="data/tiny", data=str(tmp_path / "q.jsonl"), index=str(tmp_path / "index"), search_top_k=1,
        output_dir=str(tmp_path / "run"), max_steps=2, questions_per_step=4, num_generations=4, threads=1, check=True,
        max_completion_length=256, engine=engine, updates_per_batch=2, temperature=0.8,
    )  # fmt: skip
    train_rl.main(args)
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    for row in rows:
        assert 0 < row["check/all/max"] < 1e-3 and row["check/all/outside"] == 0.0
        assert {"check/think/mean", "check/tool_call/mean", "check/answer/mean"} <= row.keys()
        assert row["entropy_alarm"] == 0.0
