"""The step benchmark: its models against load_base, its inputs by hand, tare's gradient against TRL's, the table.

python -m pytest tests/test_benchmark_step.py
"""

import importlib.util
import json

import pytest
import torch
from tiny_models import save_tiny_model
from transformers import Qwen2Config

from bench import memory, rollout
from bench import step as b
from bench.random_model import random_base, shape_config
from core.model import ModelArgs, load_base, packed, with_adapter
from engines.turns import gumbel_noise

SMALL = Qwen2Config(
    vocab_size=160, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2,
)  # fmt: skip
LENGTHS = {"prompt_length": [5, 9], "completion_length": [8, 24], "max_tokens_per_micro_batch": 64}


def arguments(**more):
    flags = {"output": "x", "random_init": ["Qwen2.5-0.5B"], "trajectories": 10, "threads": 1} | LENGTHS
    return b.Args(**(flags | more))


# ---------------------------------------------------------------------------------------------------- models


@pytest.mark.parametrize("four_bit", [False, True])
def test_a_random_model_is_what_load_base_makes_of_a_checkpoint(tmp_path, four_bit):
    if four_bit:
        pytest.importorskip("bitsandbytes")
    save_tiny_model(tmp_path)
    args = ModelArgs(str(tmp_path), load_in_4bit=four_bit)
    loaded, drawn = load_base(args, str(tmp_path)), random_base(shape_config(str(tmp_path)), args)
    for (name, p), (other, q) in zip(drawn.named_parameters(), loaded.named_parameters(), strict=True):
        assert (name, type(p), p.shape, p.dtype, p.requires_grad) == (other, type(q), q.shape, q.dtype, q.requires_grad)
        if hasattr(p, "quant_state"):
            assert (p.quant_state.nested, p.quant_state.blocksize) == (q.quant_state.nested, q.quant_state.blocksize)
    for (name, x), (other, y) in zip(drawn.named_buffers(), loaded.named_buffers(), strict=True):
        assert name == other and torch.equal(x, y)
    assert [type(m) for m in drawn.modules()] == [type(m) for m in loaded.modules()]
    assert type(drawn.get_output_embeddings()) is torch.nn.Linear
    assert drawn.get_output_embeddings().weight is drawn.get_input_embeddings().weight  # tied, as saved
    assert sum("lora_A" in name for name, _ in with_adapter(drawn, args).named_parameters()) == 2 * 7


def test_a_shape_can_be_cut_and_its_weights_are_seeded():
    args = ModelArgs("Qwen2.5-0.5B")
    assert shape_config("Qwen2.5-0.5B").num_hidden_layers == 24
    assert len(shape_config("Qwen2.5-0.5B", 2).layer_types) == 2
    first, again = random_base(SMALL, args), random_base(SMALL, args)
    assert all(torch.equal(p, q) for p, q in zip(first.parameters(), again.parameters()))
    layer = first.model.layers[0]
    assert layer.input_layernorm.weight.eq(1).all() and layer.self_attn.q_proj.bias.eq(0).all()
    assert 0.018 < layer.mlp.up_proj.weight.std() < 0.022


# ---------------------------------------------------------------------------------------------------- inputs


def test_trajectories_are_ragged_and_their_tool_results_are_not_trained_on():
    made = b.make_trajectories(arguments(), 160)
    assert made == b.make_trajectories(arguments(), 160) and len(made) == 10
    assert {t.prompt_len for t in made} <= set(range(5, 10)) and len({len(t.token_ids) for t in made}) > 3
    for t in made:
        n = len(t.token_ids) - t.prompt_len
        tool = t.spans[0]
        assert 8 <= n <= 24 and tool.end - tool.start == n // 4 and t.completion_tokens == n - n // 4
        assert t.loss_mask[tool.start - 1 : tool.end + 1] == [1] + [0] * (n // 4) + [1]
        assert t.token_ids[: t.prompt_len] == made[8 * int(t.question_id)].token_ids[: t.prompt_len]  # of its group


def test_trl_gets_the_same_tokens_in_its_own_layout():
    rows = b.make_trajectories(arguments(), 160)[6:10]  # of two questions
    inputs = b.trl_inputs(rows, 77)
    assert inputs["num_items_in_batch"] == 77
    for i, t in enumerate(rows):
        ids = torch.cat([inputs["prompt_ids"][i], inputs["completion_ids"][i]])
        real = torch.cat([inputs["prompt_mask"][i], inputs["completion_mask"][i]]).bool()
        assert ids[real].tolist() == t.token_ids and not ids[~real].any()
        assert inputs["prompt_mask"][i].tolist() == sorted(inputs["prompt_mask"][i].tolist())  # padded on the left
        trained = inputs["tool_mask"][i] * inputs["completion_mask"][i]
        assert trained[: len(t.token_ids) - t.prompt_len].tolist() == t.loss_mask[t.prompt_len :]
        assert trained.sum() == t.completion_tokens
        assert inputs["advantages"][i] == pytest.approx(max(t.advantage, key=abs))


# ---------------------------------------------------------------------------------------------------- the steps


def gradients(library, monkeypatch):
    """Clipped gradients of one step of the library on the small model, with an adapter that is not zero."""
    seen = []

    class NoStep(torch.optim.SGD):
        def step(self):
            seen.extend(p.grad.clone() for p in self.param_groups[0]["params"])

    monkeypatch.setattr(b, "adamw", lambda model, *_: NoStep([p for p in model.parameters() if p.requires_grad], lr=1))
    args = arguments()
    flags = b.rl_flags(args, "Qwen2.5-0.5B")
    trajectories = b.make_trajectories(args, 160)
    model = with_adapter(random_base(SMALL, flags), flags).train()
    torch.manual_seed(1)
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.normal_(std=0.1)
    score, step = b.STEPS[library](model, flags, trajectories)
    step(score())
    return seen


def test_tare_and_trl_compute_the_same_gradient(monkeypatch):
    """fp32: relative norm of the difference below 1e-4, also where a padded row has a tool result."""
    if not importlib.util.find_spec("trl"):
        pytest.skip("TRL is not installed")
    ours, theirs = gradients("tare", monkeypatch), gradients("trl", monkeypatch)
    assert len(ours) == len(theirs) == 2 * 2 * 7
    assert all(g.norm() > 0 for g in ours)
    difference = torch.cat([(a - c).flatten() for a, c in zip(ours, theirs)]).norm()
    assert difference < 1e-4 * torch.cat([g.flatten() for g in theirs]).norm()


def test_the_prediction_is_that_of_the_plan_for_the_largest_micro_batch():
    args = arguments(gradient_checkpointing=True)
    flags, made = b.rl_flags(args, "Qwen2.5-0.5B"), b.make_trajectories(args, 160)
    d, cpu = memory.decoder_of(SMALL), torch.device("cpu")
    how = memory.Setup(cpu, "float32", False, 16, ["all-linear"], False, optimizer="adamw", checkpointing=True)
    sizes = [
        sum(memory.training(d, how, len(rows), max(len(t.token_ids) for t in rows)).values())
        for rows in packed(made, 0, 64)
    ]
    assert len(set(sizes)) > 1 and sum(b.predicted(SMALL, flags, made).values()) == max(sizes)


def test_the_table_has_a_line_for_each_library(tmp_path, monkeypatch):
    """In processes of their own; TRL is said to be missing, so that this is the same on every machine."""
    save_tiny_model(tmp_path / "m")
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "trl" else find(name))
    args = arguments(random_init=[str(tmp_path / "m")], output=str(tmp_path / "t"), repeats=1)
    ours, theirs = b.main(args)
    assert ours["tokens"] > ours["trained_tokens"] > 0 and ours["tokens_per_second"] > 0
    assert (ours["update_peak"] is None) != torch.cuda.is_available() and sum(ours["predicted"].values()) > 0
    assert theirs["failed"] == "not installed" and "not installed" in (tmp_path / "t.md").read_text()
    assert json.loads((tmp_path / "t.json").read_text())["rows"][0]["library"] == "tare"


def test_the_rollout_benchmark_compares_equal_work(tmp_path):
    Qwen2Config(**(SMALL.to_dict() | {"vocab_size": 720})).save_pretrained(tmp_path / "m")
    flags = {"random_init": str(tmp_path / "m"), "loads": ["short"], "slots": [16], "turns": [1], "waves": 1.0}
    args = rollout.Args(output=str(tmp_path / "r"), repeats=1, threads=1, layers=1, **flags)
    threads = torch.get_num_threads()
    fast, hf = rollout.main(args)
    torch.set_num_threads(threads)
    assert hf["sampled"] == fast["sampled"] > 0 and hf["read"] == hf["contexts"] > fast["read"]
    assert fast["counts"]["sampled"] == fast["sampled"] and fast["counts"]["copied"] == 14 * 29
    table = (tmp_path / "r.md").read_text()
    assert "LoRA r=16" in table and "| short " in table and "| 1.00 " in table
    assert len(json.loads((tmp_path / "r.json").read_text())["rows"]) == 2


def test_a_load_too_large_for_memory_is_a_line_of_the_table(tmp_path, monkeypatch):
    """The smallest load, run before the lines, is not too large."""

    def run_once(name, model, tokenizer, slots, *more):
        if slots == 32 and name == "hf":
            raise torch.OutOfMemoryError("CUDA out of memory")
        return {"seconds": 1.0, "sampled": 10, "contexts": 20, "read": 20, "counts": None}

    monkeypatch.setattr(rollout, "run_once", run_once)
    monkeypatch.setattr(rollout, "random_policy", lambda *_: torch.nn.Linear(1, 1))
    flags = {"loads": ["short"], "slots": [16, 32], "turns": [0], "repeats": 1}
    threads = torch.get_num_threads()
    rows = rollout.main(rollout.Args(output=str(tmp_path / "r"), **flags))
    torch.set_num_threads(threads)
    assert [r.get("failed") for r in rows] == [None, None, None, "out of memory"]
    assert "out of memory" in (tmp_path / "r.md").read_text()


def test_noise_of_the_rollout_benchmark_is_the_engines_own_but_for_the_script():
    seeds, positions = torch.tensor([5, 7]), torch.tensor([1, 9])
    noise = rollout.scripted_noise({5: [3, 4], 7: [1]})(seeds, positions, 20)
    own = gumbel_noise(seeds, positions, 20)
    assert noise.argmax(1).tolist() == [4, 0]  # behind the end of a script anything will do
    own[0, 4] = own[1, 0] = 1e9
    assert torch.equal(noise, own)


@pytest.mark.parametrize(
    "flags, message",
    [
        ({"libraries": ["verl"]}, "--libraries verl: not one of tare, trl"),
        ({"layers": [1, 2]}, "--layers"),
        ({"prompt_length": [9]}, "--prompt_length takes LOW HIGH"),
        ({"completion_length": [3, 8]}, "--completion_length takes LOW HIGH from 4"),
        ({"max_tokens_per_micro_batch": 32}, "32 is less than one trajectory may have"),
        ({"repeats": 0}, "--repeats must be at least 1"),
    ],
)
def test_bad_flags_are_named(flags, message):
    with pytest.raises(ValueError, match=message):
        arguments(**flags)


@pytest.mark.parametrize("flags, message", [
    ({"engines": ["vllm"]}, "--engines vllm: not one of fast, hf"),
    ({"loads": ["all"]}, "--loads all: not one of short, long"),
    ({"output": ""}, "--output is required"),
])  # fmt: skip
def test_bad_flags_of_the_rollout_benchmark_are_named(flags, message):
    with pytest.raises(ValueError, match=message):
        rollout.Args(**{"output": "x"} | flags)
