"""Hint injection and action-space map: counts by hand with a scripted model, embeddings by brute force, PCA by hand.

    python -m pytest tests/test_analyses.py
"""

import json
from contextlib import nullcontext
from dataclasses import replace

import pytest
import torch
from tiny_models import ScriptedModel, byte_tokenizer

from core.model import ModelArgs, load_policy
from core.trajectory import DataError, Question, load_trajectories, save_trajectories
from experiments import action_space, insufficiency
from methods import operators
from rollout import RolloutArgs, rollout
from tools.sandbox import ToolResult

TOKENIZER = byte_tokenizer()
TOOLBOX = {"search": lambda query: ToolResult("ann", True, None, 0.0)}
GUESS = "<think>a guess</think>\n<answer>bob</answer>"
NEEDED = {"none": 0, "one": 1, "two": 2, "never": 99, "right": 0, "endless": 0}  # hints until the answer is right


def script(response, prompt):
    """Answers "bob" until it has searched as often as the question needs; searches when hinted."""
    kind = next(kind for kind in NEEDED if f"{kind} question" in prompt)
    searched = response.count("</search>")
    hinted = any(response.endswith(hint) for hint in operators.HINTS["qa"])
    if kind == "endless":
        return "<think>" + "x" * 300
    if hinted and searched < NEEDED[kind]:
        return "</think>\n<search>x</search>"
    right = kind == "right" or searched >= NEEDED[kind] and (hinted or searched)
    answer = f"<answer>{'ann' if right else 'bob'}</answer>"
    return f"</think>\n{answer}" if hinted else f"<think>a guess</think>\n{answer}"


@pytest.fixture
def sampled(tmp_path):
    questions = [Question(kind, f"{kind} question", "ann", "qa", meta={"family": kind[0]}) for kind in NEEDED]
    args = RolloutArgs(num_generations=1, max_completion_length=250)
    trajectories = rollout(ScriptedModel(TOKENIZER, script), TOKENIZER, questions, args, {}, (0,))
    save_trajectories(tmp_path / "t.jsonl", trajectories)
    return tmp_path / "t.jsonl"


def arguments(tmp_path, sampled, **flags):
    flags = {"max_completion_length": 400, "rollout_batch_size": 2, "threads": 1} | flags
    return insufficiency.Args(
        model_name_or_path="m", trajectories=str(sampled), output_dir=str(tmp_path / "out"), **flags
    )


def test_wrong_trajectories_are_fixed_by_as_many_calls_as_they_need(tmp_path, sampled, monkeypatch):
    monkeypatch.setattr(insufficiency, "load_sampler", lambda args: (ScriptedModel(TOKENIZER, script), TOKENIZER))
    monkeypatch.setattr(insufficiency, "open_tools", lambda args: nullcontext(TOOLBOX))
    result = insufficiency.main(arguments(tmp_path, sampled))
    done = {t.question_id: t for t in load_trajectories(tmp_path / "out/hinted.jsonl")}
    assert list(done) == ["none", "one", "two", "never", "endless"]  # "right" was right
    seen = {i: (t.rewards["correct"], t.meta["hints"], t.meta["extra_calls"]) for i, t in done.items()}
    assert seen == {"none": (1, 1, 0), "one": (1, 1, 1), "two": (1, 2, 2), "never": (0, 3, 3), "endless": (0, 0, 0)}
    assert result["trajectories"] == 6 and result["sets"]["all"] == {
        "wrong": 5, "fixed": 0.6, "insufficient": 0.4, "not_hinted": 0.2, "mean_extra_calls": 1.0,
        "extra_calls": {"0": 1, "1": 1, "2": 1},
    }  # fmt: skip
    assert result["sets"]["n"]["wrong"] == 2 and result["sets"]["o"]["insufficient"] == 1.0
    assert insufficiency.main(arguments(tmp_path, sampled)) == result
    whole = (tmp_path / "out/hinted.jsonl").read_text()
    lines = whole.splitlines(keepends=True)
    (tmp_path / "out/hinted.jsonl").write_text("".join(lines[:2]) + lines[2][:50])  # killed while it wrote
    (tmp_path / "out/result.json").unlink()
    assert insufficiency.main(arguments(tmp_path, sampled)) == result
    assert (tmp_path / "out/hinted.jsonl").read_text() == whole


def test_hints_may_go_beyond_the_call_limits_of_the_samples(tmp_path, sampled, monkeypatch):
    wrong = [t for t in load_trajectories(sampled) if t.question_id == "two"]
    args = arguments(tmp_path, sampled, max_tool_calling_iterations=0, hints=1)
    (once,) = insufficiency.hinted(wrong, ScriptedModel(TOKENIZER, script), TOKENIZER, args, TOOLBOX)
    assert (once.finish, once.n_calls, once.rewards["correct"]) == ("eos", 1, 0)
    args.hints = 2
    (twice,) = insufficiency.hinted(wrong, ScriptedModel(TOKENIZER, script), TOKENIZER, args, TOOLBOX)
    assert (twice.n_calls, twice.rewards["correct"]) == (2, 1)


def test_trajectories_of_another_tokenizer_are_not_hinted(tmp_path, sampled, monkeypatch):
    other = [replace(t, response_text="of another") for t in load_trajectories(sampled)]
    save_trajectories(sampled, other)
    monkeypatch.setattr(insufficiency, "load_sampler", lambda args: (ScriptedModel(TOKENIZER, script), TOKENIZER))
    with pytest.raises(DataError, match="--trajectories .*t.jsonl: trajectory .* is of another tokenizer"):
        insufficiency.main(arguments(tmp_path, sampled))


def test_no_room_for_a_hint_leaves_the_trajectory(tmp_path, sampled):
    wrong = [t for t in load_trajectories(sampled) if t.question_id == "one"]
    args = arguments(tmp_path, sampled, max_completion_length=20)
    (same,) = insufficiency.hinted(wrong, ScriptedModel(TOKENIZER, script), TOKENIZER, args, TOOLBOX)
    assert same.token_ids == wrong[0].token_ids and same.meta["hints"] == 0
    assert insufficiency.measure([same])["not_hinted"] == 1.0


# ---------------------------------------------------------------------------------------------------- action space


def test_the_plane_of_points_in_a_plane_gives_their_distances_back():
    """25 × 16 grid, steps 3 and 1, turned into 7 dimensions: variances 9 (25² − 1)/12 = 468 and (16² − 1)/12 = 21.25."""
    grid = torch.tensor([[3.0 * i, 1.0 * j] for i in range(25) for j in range(16)])
    basis = torch.linalg.qr(torch.randn(7, 2, generator=torch.Generator().manual_seed(0)))[0]  # (7, 2)
    points = grid @ basis.T + 5.0
    plane, explained = action_space.principal_plane(points)
    assert explained == pytest.approx([468 / 489.25, 21.25 / 489.25], abs=1e-5)
    centred = (grid - grid.mean(dim=0)).double()
    assert torch.allclose(plane.abs(), centred.abs(), atol=1e-3)
    assert torch.allclose(torch.cdist(plane, plane), torch.cdist(centred, centred), atol=1e-3)
    assert action_space.spread(points) == pytest.approx(489.25**0.5, rel=1e-5)


def test_the_plane_does_not_flip_and_takes_degenerate_sets():
    points = torch.randn(20, 6, generator=torch.Generator().manual_seed(1))
    plane, _ = action_space.principal_plane(points)
    turned, _ = action_space.principal_plane(points.flip(0))
    assert torch.allclose(plane, turned.flip(0), atol=1e-5)
    line = torch.tensor([[1.0, 1, 1], [2, 2, 2], [4, 4, 4]])
    plane, explained = action_space.principal_plane(line)
    assert explained == pytest.approx([1, 0], abs=1e-6) and plane[:, 1].abs().max() < 1e-5
    assert plane[:, 0].diff().tolist() == pytest.approx([3**0.5, 2 * 3**0.5], rel=1e-5)
    for one in (torch.ones(1, 4), torch.ones(3, 1), torch.ones(3, 4)):
        plane, explained = action_space.principal_plane(one)
        assert plane.shape == (len(one), 2) and plane.abs().max() == 0 and explained == [0, 0]


def test_an_embedding_is_the_mean_over_the_models_own_tokens(tmp_path, tiny_model):
    model, tokenizer = load_policy(ModelArgs(model_name_or_path=str(tiny_model)), trainable=False)
    texts = ["<search>x</search>", "<answer>ann</answer>"]
    fake = ScriptedModel(TOKENIZER, lambda response: texts["</result>" in response])
    questions = [Question(str(i), "who? " * i, "ann", "qa") for i in range(1, 5)]
    trajectories = rollout(fake, TOKENIZER, questions, RolloutArgs(num_generations=1), TOOLBOX, (0,))
    found = action_space.embeddings(trajectories, model, tokenizer, batch_size=3)
    for t, row in zip(trajectories, found):
        with torch.no_grad():
            hidden = model(torch.tensor([t.token_ids]), output_hidden_states=True).hidden_states[-1][0]  # (T, H)
        written = [hidden[i] for i, m in enumerate(t.loss_mask) if m]
        assert len(written) == len("".join(texts)) and torch.allclose(row, sum(written) / len(written), atol=1e-4)


def test_the_map_is_written(tmp_path, tiny_model, sampled):
    other = load_trajectories(sampled)[:2]
    save_trajectories(tmp_path / "u.jsonl", other)
    flags = dict(model_name_or_path=str(tiny_model), output=str(tmp_path / "map"))
    result = action_space.main(action_space.Args(**flags, trajectories=[f"a={sampled}", f"b={tmp_path / 'u.jsonl'}"]))
    assert json.loads((tmp_path / "map/action_space.json").read_text()) == result
    assert [len(rows) for rows in result["stages"].values()] == [6, 2] and (tmp_path / "map/action_space.png").exists()
    for a, b in zip(result["stages"]["a"], result["stages"]["b"]):  # the same trajectory lies at the same place
        assert (a["id"], a["family"]) == (b["id"], b["family"]) and (a["x"], a["y"]) == pytest.approx((b["x"], b["y"]))
    save_trajectories(tmp_path / "u.jsonl", [replace(other[0], response_text="of another")])
    with pytest.raises(DataError, match="--trajectories b: trajectory .* is of another tokenizer"):
        action_space.main(action_space.Args(**flags, trajectories=[f"b={tmp_path / 'u.jsonl'}"]))
    with pytest.raises(ValueError, match="NAME=FILE"):
        action_space.Args(**flags, trajectories=["a.jsonl"])
    (tmp_path / "empty.jsonl").write_text("")
    with pytest.raises(DataError, match="b=.*empty.jsonl"):
        action_space.main(action_space.Args(**flags, trajectories=[f"b={tmp_path / 'empty.jsonl'}"]))
