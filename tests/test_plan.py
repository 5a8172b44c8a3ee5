"""Plans against peft, bitsandbytes, transformers' caches, autograd's saved tensors and the live tensors of a step.

python -m pytest tests/test_plan.py
"""

import json
import shutil
import subprocess
import sys
import weakref
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter
from transformers import AutoModelForCausalLM, DynamicCache, GPTNeoXConfig, Qwen2Config, Qwen3Config

import flywheel
import kernels
import rollout
import train_rl
import train_sft
from bench import memory, plan
from core.model import Batch, adamw, enable_checkpointing, head_weight, hidden_of_targets
from core.trajectory import DataError
from engines.slot_cache import SlotCache
from methods import curriculum, warmup

ROOT = Path(__file__).parent.parent
TINY = str(ROOT / "data" / "tiny")
MIXED = ["q_proj", "up_proj"]  # a choice of target modules
CPU = torch.device("cpu")


def setup(dtype="float32", targets=("all-linear",), r=16, **more):
    """A run that trains."""
    return memory.Setup(CPU, dtype, False, r, list(targets), False, **{"optimizer": "adamw"} | more)


def lora(lm, targets=("all-linear",), r=16):
    """The adapter that model.load_policy puts on a base."""
    lm.requires_grad_(False)
    targets = "all-linear" if list(targets) == ["all-linear"] else list(targets)
    return get_peft_model(lm, LoraConfig(r=r, lora_alpha=32, target_modules=targets, task_type="CAUSAL_LM"))


# ---------------------------------------------------------------------------------------------------- exact parts

PUBLISHED = {  # billions of parameters on the model cards
    "Qwen/Qwen2.5-0.5B-Instruct": 0.49,
    "Qwen/Qwen2.5-1.5B": 1.54,
    "Qwen/Qwen2.5-3B-Instruct": 3.09,
    "Qwen/Qwen2.5-7B-Instruct": 7.61,
    "Qwen/Qwen2.5-14B-Instruct": 14.7,
    "Qwen/Qwen3-0.6B": 0.6,
    "Qwen/Qwen3-1.7B": 1.7,
    "Qwen/Qwen3-4B": 4.0,
    "Qwen/Qwen3-8B": 8.2,
}


def by_hand(config):
    """Parameters of a Qwen2 or Qwen3 decoder, counted from its sizes."""
    H, D = config.hidden_size, getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    q, kv = config.num_attention_heads * D, config.num_key_value_heads * D
    layer = H * q + 2 * H * kv + q * H + 3 * H * config.intermediate_size + 2 * H
    layer += 2 * D if config.model_type == "qwen3" else q + 2 * kv  # norms of q and k, or biases
    heads = 1 if config.tie_word_embeddings else 2
    return heads * config.vocab_size * H + config.num_hidden_layers * layer + H


@pytest.mark.parametrize("name", PUBLISHED)
def test_the_table_has_the_published_sizes(name):
    config = memory.read_config(name)
    assert abs(by_hand(config) / 1e9 / PUBLISHED[name] - 1) < 0.015


def test_parameters_are_counted_exactly():
    lm = AutoModelForCausalLM.from_pretrained(TINY)
    d = memory.decoder_of(memory.read_config(TINY))
    assert d.parameters == sum(p.numel() for p in lm.parameters()) == by_hand(lm.config)
    large = memory.decoder_of(memory.read_config("Qwen/Qwen2.5-7B-Instruct"))
    assert large.parameters == 7_615_616_512 == by_hand(memory.read_config("Qwen2.5-7B"))
    for targets in (["all-linear"], MIXED):
        trained = sum(
            p.numel() for p in lora(AutoModelForCausalLM.from_pretrained(TINY), targets).parameters() if p.requires_grad
        )
        assert sum(memory.adapter_tensors(d, setup(targets=targets))) == trained
    with torch.device("meta"):
        lm = AutoModelForCausalLM.from_config(memory.read_config("Qwen/Qwen2.5-7B-Instruct"), dtype=torch.bfloat16)
    tensors = [p for p in lora(lm).parameters() if p.requires_grad]
    assert sorted(memory.adapter_tensors(large, setup())) == sorted(p.numel() for p in tensors)
    assert {p.dtype for p in tensors} == {torch.float32}  # also beside a bfloat16 base


def test_four_bit_weights_are_counted_exactly():
    bitsandbytes = pytest.importorskip("bitsandbytes")
    for out, inputs in ((1024, 3000), (7, 100), (64, 64)):
        layer = bitsandbytes.nn.Linear4bit(inputs, out, bias=False, quant_type="nf4", compress_statistics=True).to(
            "cpu"
        )
        state = layer.weight.quant_state
        parts = [layer.weight, state.absmax, state.code, state.offset, state.state2.absmax, state.state2.code]
        assert memory.nf4_bytes(out * inputs) == sum(t.numel() * t.element_size() for t in parts)
    d = memory.decoder_of(memory.read_config("Qwen2.5-7B"))
    linears = 28 * (2 * 3584 * 3584 + 2 * 512 * 3584 + 3 * 3584 * 18944)
    assert memory.weight_bytes(d, "bfloat16", False) == 2 * d.parameters
    rest = 2 * (d.parameters - linears)  # embeddings, lm_head, norms, biases: not quantised
    assert rest > 2 * 2 * 152064 * 3584
    assert memory.weight_bytes(d, "bfloat16", True) - rest == pytest.approx(
        linears * (1 / 2 + 1 / 64 + 4 / 64 / 256), rel=1e-4
    )


@pytest.mark.parametrize("name", ["adamw", "adamw_8bit"])
def test_optimizer_states_are_counted_exactly(name):
    if name == "adamw_8bit":
        pytest.importorskip("bitsandbytes")
    model = torch.nn.ParameterList([torch.nn.Parameter(torch.randn(n)) for n in (100, 4095, 4096, 70_001)])
    optimizer = adamw(model, name, 1e-3)
    sum(p.square().sum() for p in model).backward()
    optimizer.step()
    states = {t.data_ptr(): t for state in optimizer.state.values() for t in state.values() if torch.is_tensor(t)}
    size = sum(t.numel() * t.element_size() for t in states.values())
    assert memory.optimizer_bytes([p.numel() for p in model], name) == size


def test_the_cache_is_counted_exactly():
    lm = AutoModelForCausalLM.from_pretrained(TINY)
    d = memory.decoder_of(lm.config)
    cache = DynamicCache(config=lm.config)
    lm(torch.randint(5, 100, (3, 17)), past_key_values=cache)
    tensors = [t for layer in cache.layers for t in (layer.keys, layer.values)]
    assert memory.cache_bytes(d, 3, 17, "float32") == sum(t.numel() * t.element_size() for t in tensors)
    slots = SlotCache(16)
    slots.reserve(100)
    slots.where = (torch.zeros(1, 1, dtype=torch.long), torch.zeros(1, 1, dtype=torch.long))
    for i in range(d.layers):
        slots.update(*torch.zeros(2, 1, d.kv_heads, 1, d.head_dim), i)
    size = sum(t.numel() * t.element_size() for pair in slots.buffers for t in pair)
    assert size == memory.cache_bytes(d, 16, 128, "float32")


# ---------------------------------------------------------------------------------------------------- activations


def policy(kind, dtype, targets, checkpointing, attention="sdpa"):
    """A random model of some 3M parameters, its adapter, and the plan's view of it."""
    sizes = dict(hidden_size=192, intermediate_size=520, num_hidden_layers=4, num_attention_heads=6)
    more = {"head_dim": 48} if kind is Qwen3Config else {}
    config = kind(**sizes, num_key_value_heads=2, vocab_size=700, tie_word_embeddings=False, **more)
    torch.manual_seed(0)
    model = lora(AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation=attention), targets, r=8)
    if checkpointing:
        enable_checkpointing(model)
    return model.train(), memory.decoder_of(config)


def random_batch(rows, length):
    ids, attention = torch.randint(0, 700, (rows, length)), torch.ones(rows, length, dtype=torch.long)
    if rows > 1:
        attention[0, -5:] = 0
    trained = attention.bool().index_fill(1, torch.tensor([0]), False)
    return Batch(ids, attention, trained)


def loss_of(model, batch):
    hidden, targets = hidden_of_targets(model, batch)
    return kernels.linear_policy_loss(
        hidden, head_weight(model), targets, token_weight=1.0, advantage=1.0, old_logp=0.0
    )[0]


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("kind, dtype, targets, rows", [
    (Qwen2Config, torch.float32, ["all-linear"], 3),
    (Qwen2Config, torch.bfloat16, ["all-linear"], 3),
    (Qwen2Config, torch.bfloat16, ["all-linear"], 1),
    (Qwen3Config, torch.bfloat16, ["all-linear"], 3),
    (Qwen3Config, torch.float32, ["all-linear"], 1),
    (Qwen2Config, torch.float32, MIXED, 3),
    (Qwen2Config, torch.bfloat16, MIXED, 1),
])  # fmt: skip
def test_saved_tensors_are_what_the_formula_says(kind, dtype, targets, rows, checkpointing):
    model, d = policy(kind, dtype, targets, checkpointing)
    own = {t.untyped_storage().data_ptr() for t in (*model.parameters(), *model.buffers())}
    saved = {}

    def pack(t):
        if t.untyped_storage().data_ptr() not in own:
            saved[t.untyped_storage().data_ptr()] = t  # kept, so that no address is used twice
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        loss_of(model, random_batch(rows, 80))
    measured = sum(t.untyped_storage().nbytes() for t in saved.values())
    name = str(dtype).removeprefix("torch.")
    how = setup(name, targets, 8, checkpointing=checkpointing)
    assert memory.saved_bytes(d, how, rows, 80) == pytest.approx(measured, rel=0.03)


class Live(TorchDispatchMode):
    """Bytes of the storages that operations made and that are still alive; `peak` is the most there ever was."""

    def __init__(self):
        super().__init__()
        self.now, self.peak, self.seen = 0, 0, weakref.WeakSet()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        given = {t.untyped_storage()._cdata for t in tree_iter((args, kwargs)) if isinstance(t, torch.Tensor)}
        out = function(*args, **(kwargs or {}))
        for t in tree_iter(out):
            if isinstance(t, torch.Tensor):
                storage = t.untyped_storage()
                if storage._cdata not in given and storage not in self.seen:
                    self.seen.add(storage)
                    self.now += storage.nbytes()
                    self.peak = max(self.peak, self.now)
                    weakref.finalize(storage, self.drop, storage.nbytes())
        return out

    def drop(self, n):
        self.now -= n


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_peak_of_a_training_step(dtype, checkpointing):
    model, d = policy(Qwen2Config, getattr(torch, dtype), ["all-linear"], checkpointing)
    batch = random_batch(4, 128)
    with Live() as live:
        loss_of(model, batch).backward()
    parts = memory.training(d, setup(dtype, r=8, checkpointing=checkpointing), 4, 128)
    for static in ("weights", "adapter", "optimizer"):
        del parts[static]
    assert plan.total(parts) == pytest.approx(live.peak, rel=0.1)


@pytest.mark.parametrize("with_adapter", [False, True])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_peak_of_a_pass_without_gradients(dtype, with_adapter):
    model, d = policy(Qwen2Config, getattr(torch, dtype), ["all-linear"], False)
    model = model if with_adapter else model.unload()
    with Live() as live, torch.no_grad():
        model(torch.randint(0, 700, (4, 128)), logits_to_keep=1, use_cache=False)
    b = memory.DTYPES[dtype].itemsize
    assert 4 * 128 * memory.pass_bytes(d, b, with_adapter) == pytest.approx(live.peak, rel=0.1)


# ---------------------------------------------------------------------------------------------------- plans


SEVEN = dict(model_name_or_path="Qwen/Qwen2.5-7B-Instruct", dtype="bfloat16", output_dir="unused")
EIGHT_K = dict(load_in_4bit=True, lora_r=16, max_tokens_per_micro_batch=8192, gradient_checkpointing=True)
CUDA = torch.device("cuda")


def test_the_plan_of_7b_in_4_bit(tmp_path, capsys):
    flags = SEVEN | EIGHT_K | dict(data=str(tmp_path / "q.jsonl"), max_completion_length=4096)
    peak = plan.dry_run("train_rl", train_rl.Args(**flags, engine="fast", rollout_batch_size=16), 24)
    out = capsys.readouterr().out
    assert 11 * plan.GiB < peak < 15.2 * plan.GiB
    for text in ("not checked", "steps", "KV cache", "optimizer", "activations", "16 GB", "tokens per step, at most"):
        assert text in out, text
    assert "16 GB | tight" in out and "24 GB | fits" in out  # by a fifth
    assert "estimated by the formulas" not in out
    d = memory.decoder_of(memory.read_config("Qwen2.5-7B"))

    def phases(**more):
        made = plan.plan_rl(train_rl.Args(**flags | more), CUDA)
        assert (made.tokens, made.longest, made.setup.prompt) == (8192, 2048 + 4096, 2048)
        return plan.phases_of(made, d)

    of_tokens, _ = phases(engine="fast")
    parts = of_tokens(8192)
    assert parts["weights"] == pytest.approx(5.17 * plan.GiB, rel=0.01)
    assert parts["adapter"] == parts["gradients"] == 4 * 40_370_176 and parts["optimizer"] // parts["adapter"] == 2
    assert "reference adapter" not in parts and "merged copy" not in parts
    for more in (dict(beta=0.01), dict(reward="entropy_sparse", indicator="reference")):
        assert phases(**more)[0](8192)["reference adapter"] == parts["adapter"]
    of_tokens, of_rows = phases(rollout_dtype="bfloat16")
    assert of_rows(8)["merged copy"] == of_tokens(8192)["merged copy"] == 2 * 7_615_616_512
    assert plan.total(phases(gradient_checkpointing=False)[0](8192)) > 70 * plan.GiB  # what checkpointing saves


def test_a_merged_copy_samples_in_its_own_precision_and_without_the_adapter():
    d = memory.decoder_of(memory.read_config(TINY))
    sampling = dict(engine="hf", prompt=100, completion=400)
    copied = memory.rollout(d, setup("float32", sampling_copy="bfloat16", **sampling), 8)
    alone = memory.rollout(d, setup("bfloat16", optimizer="", **sampling), 8)
    assert copied["KV cache"] == alone["KV cache"] == memory.cache_bytes(d, 8, 500, "bfloat16")
    assert "adapter" in copied and "adapter" not in alone
    assert copied["forward pass"] == alone["forward pass"]


def test_micro_batches_are_no_larger_than_an_update():
    flags = dict(model_name_or_path=TINY, data="-", output_dir="-", max_prompt_length=50, max_completion_length=50)
    flags |= dict(questions_per_step=4, num_generations=2, updates_per_batch=2)
    tokens = lambda **more: plan.plan_rl(train_rl.Args(**flags | more), CPU).tokens  # noqa: E731
    assert tokens() == tokens(max_tokens_per_micro_batch=8192) == 4 * 100
    assert tokens(per_device_train_batch_size=3) == 300 and tokens(max_tokens_per_micro_batch=250) == 250


def test_what_does_not_fit_is_refused_with_flags(monkeypatch, tmp_path, capsys):
    flags = SEVEN | dict(data=str(tmp_path / "q.jsonl"), max_length=8192)
    with pytest.raises(
        DataError, match="24 GB has 22.8.*--gradient_checkpointing.*--optimizer adamw_8bit.*--load_in_4bit"
    ):
        plan.dry_run("train_sft", train_sft.Args(**flags), 24)
    flags |= EIGHT_K | dict(optimizer="adamw_8bit")
    assert plan.dry_run("train_sft", train_sft.Args(**flags), 24) < 15.2 * plan.GiB
    monkeypatch.setattr(plan, "capacity", lambda gb: (10 * plan.GiB, "here"))
    with pytest.raises(DataError, match="flags that help: a shorter --max_length"):
        plan.dry_run("train_sft", train_sft.Args(**flags), 24)
    with pytest.raises(DataError, match="--engine fast, --rollout_batch_size"):
        plan.dry_run("flywheel", flywheel.Args(**SEVEN, load_in_4bit=True, data="q.jsonl"), 24)
    assert "does not fit" in capsys.readouterr().out


def test_every_script_with_a_model_is_planned(tmp_path, capsys):
    model = dict(model_name_or_path=TINY, data="q.jsonl")
    both = model | dict(num_generations=4, rollout_batch_size=16)
    for name, cls, flags in (
        ("rollout", rollout.Args, both | dict(output="o")),
        ("flywheel", flywheel.Args, both | dict(output_dir="o")),
        ("methods.warmup", warmup.Args, both | dict(output="o")),
        ("methods.curriculum", curriculum.Args, both | dict(output_dir="o", num_questions=20, questions_per_step=2)),
    ):
        assert 0 < plan.dry_run(name, cls(**flags)) < 2 * plan.GiB, name
        assert "rollout of 16" in capsys.readouterr().out  # a curriculum trains on 8, but selects by more
    data = tmp_path / "q.jsonl"
    data.write_text('{"id": "a", "question": "what ?", "answer": "x"}\n')
    served = dict(output="o", engine="openai", base_url="http://localhost:1/v1", data=str(data))
    for file in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):  # all that is needed here then
        shutil.copy(Path(TINY, file), tmp_path)
    assert plan.dry_run("rollout", rollout.Args(**served, model_name_or_path=str(tmp_path))) == 0
    assert "needs no memory here" in capsys.readouterr().out
    larger = warmup.Args(**both | dict(output="o", think_model_name_or_path="Qwen/Qwen2.5-0.5B"))
    assert plan.dry_run("methods.warmup", larger) > 0.49e9 * 4
    assert "Qwen2.5-0.5B, float32" in capsys.readouterr().out


def test_the_most_that_fits_is_at_the_border():
    one_each = lambda n: {"a": n - 1, "b": 1}  # noqa: E731
    assert [plan.most(one_each, size) for size in (0, 1, 5, 31)] == [0, 1, 5, 31]
    for size in (1000, 12345):
        assert 0.96 * size < plan.most(one_each, size) <= size
    assert plan.most(one_each, 50, above=60) == 0 and plan.most(None, 50) is None


def test_the_device_is_measured(monkeypatch):
    pages = dict(SC_PHYS_PAGES=1000, SC_PAGE_SIZE=4096)
    monkeypatch.setattr(plan.os, "sysconf", pages.__getitem__)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert plan.capacity(0) == (4_096_000, "this machine's RAM")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (7 * plan.GiB, 8 * plan.GiB))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "card")
    assert plan.capacity(0) == (7 * plan.GiB + plan.CONTEXT, "card")
    assert plan.capacity(16)[0] == pytest.approx(0.95 * 16 * plan.GiB)


def test_a_dry_run_reads_the_questions(tmp_path, capsys):
    data = tmp_path / "q.jsonl"
    rows = [{"id": "a", "question": "what ?", "answer": ["x"]}, {"id": "b", "question": "two and " * 9, "answer": "2"}]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    flags = dict(model_name_or_path=TINY, data=str(data), output_dir=str(tmp_path / "out"))
    with pytest.raises(DataError, match="holds 2 questions, fewer than --questions_per_step 12"):
        plan.dry_run("train_rl", train_rl.Args(**flags))
    plan.dry_run("train_rl", train_rl.Args(**flags, questions_per_step=2, index=str(tmp_path / "i")))
    out = capsys.readouterr().out
    assert "2 (math 1, qa 1)" in out and "what ?" in out and "i is not here: not checked" in out
    made = plan.plan_rl(train_rl.Args(**flags, questions_per_step=2), CPU)
    assert 18 < made.setup.prompt < 100 and made.longest == made.setup.prompt + 512  # not the 2048 that may be
    with pytest.raises(DataError, match="--max_prompt_length 3"):
        plan.dry_run("train_rl", train_rl.Args(**flags, questions_per_step=1, max_prompt_length=3))
    with pytest.raises(DataError, match="more than the model's 2048 positions"):
        plan.dry_run("train_rl", train_rl.Args(**flags, questions_per_step=1, max_completion_length=2040))
    data.write_text('{"question": "what ?"}\n')
    with pytest.raises(DataError, match="q.jsonl:1"):
        plan.dry_run("flywheel", flywheel.Args(**flags))
    assert not (tmp_path / "out").exists()


def test_sft_is_planned_with_the_lengths_that_were_read(tmp_path, capsys):
    data = tmp_path / "d.jsonl"
    row = {"id": "a", "question": "what ?", "answer": "x"}
    texts = ["<answer>x</answer>", "<think>so</think> <answer>x</answer>", "<answer>y</answer>"]
    parts = [[{"role": "model", "text": text}] for text in texts]
    data.write_text("".join(json.dumps(row | {"response": part}) + "\n" for part in parts))
    flags = dict(model_name_or_path=TINY, data=str(data), output_dir=str(tmp_path / "out"))
    args = train_sft.Args(**flags, per_device_train_batch_size=2)
    plan.dry_run("train_sft", args)
    out = capsys.readouterr().out
    assert "3 (qa 3)" in out or "3 (math 3)" in out
    assert "steps                            6" in out and "what ?" in out and "<answer>" not in out
    made = plan.plan_sft(args, CPU)
    assert 10 < made.longest < 60 and made.tokens == 2 * made.longest  # not 4096
    limits = [0, 1, 10_000]  # a single example may be longer than the limit; a step has two examples
    runs = [train_sft.Args(**vars(args) | dict(max_tokens_per_micro_batch=n)) for n in limits]
    assert [plan.plan_sft(run, CPU).tokens for run in runs] == [2 * made.longest, made.longest, 2 * made.longest]
    assert plan.plan_sft(train_sft.Args(**flags | dict(data="none.jsonl")), CPU).longest == 4096
    assert not (tmp_path / "out").exists()


def test_an_adapter_folder_has_its_own_rank_and_targets(tmp_path):
    made = {"base_model_name_or_path": TINY, "r": 4, "target_modules": MIXED}
    (tmp_path / "adapter_config.json").write_text(json.dumps(made))
    how = plan.base_of(rollout.Args(model_name_or_path=str(tmp_path), data="-", output="-"), CPU)
    assert (how.lora_r, how.targets, how.has_adapter) == (4, MIXED, True)
    d = memory.decoder_of(memory.read_config(str(tmp_path)))
    model = lora(AutoModelForCausalLM.from_pretrained(TINY), MIXED, r=4)
    assert memory.held(d, how)["adapter"] == 4 * sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert [name for name, *_ in memory.adapted(d, r".*\.0\..*(q_proj|up_proj)")] == [
        "model.layers.0.self_attn.q_proj", "model.layers.0.mlp.up_proj",
    ]  # fmt: skip
    with pytest.raises(DataError, match="--lora_target_modules .'wte'.: the model .qwen3. has no such Linear"):
        memory.adapted(d, ["wte"])


def test_unknown_models_are_named(tmp_path):
    with pytest.raises(DataError, match="out/none: no config.json there, and none of Qwen2.5-0.5B"):
        memory.read_config("out/none")
    (tmp_path / "config.json").write_text('{"model_type": "gpt2"}')
    with pytest.raises(DataError, match="'gpt2': its config has no intermediate_size"):
        memory.decoder_of(memory.read_config(str(tmp_path)))
    (tmp_path / "config.json").write_text('{"model_type": "gemma2", "num_hidden_layers": 1}')
    with pytest.raises(DataError, match="'gemma2': config.final_logit_softcapping = 30.0"):  # the run would refuse it
        memory.decoder_of(memory.read_config(str(tmp_path)))
    (tmp_path / "adapter_config.json").write_text('{"base_model_name_or_path": "Qwen/Qwen3-8B"}')
    assert memory.read_config(str(tmp_path)).hidden_size == 4096


def test_another_architecture_is_counted_and_its_activations_are_said_to_be_estimated(tmp_path, monkeypatch, capsys):
    sizes = dict(hidden_size=64, intermediate_size=160, num_hidden_layers=3, num_attention_heads=4, vocab_size=500)
    config = GPTNeoXConfig(**sizes, tie_word_embeddings=False)
    config.save_pretrained(tmp_path)
    d = memory.decoder_of(config)
    lm = AutoModelForCausalLM.from_config(config)
    assert d.parameters == sum(p.numel() for p in lm.parameters()) and len(d.linears) == 3 * 4
    assert (d.kv_heads, d.head_dim) == (4, 16)
    trained = sum(p.numel() for p in lora(lm).parameters() if p.requires_grad)
    assert sum(memory.adapter_tensors(d, setup())) == trained
    one, four = (memory.layer_bytes(d, setup(dtype), 1, 100) for dtype in ("bfloat16", "float32"))
    assert 0 < one < four
    flags = dict(model_name_or_path=str(tmp_path), data="q.jsonl", output_dir="x")
    monkeypatch.setattr(plan, "local_tokenizer", lambda path: None)
    plan.dry_run("train_sft", train_sft.Args(**flags))
    assert "estimated by the formulas for Llama-like layers: model_type 'gpt_neox'" in capsys.readouterr().out


# ---------------------------------------------------------------------------------------------------- command line


def run_main(*words, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["bench/plan.py", *words])
    plan.main(list(words))


def test_the_flag_ends_in_exit_code_2(monkeypatch, capsys):
    words = "train_sft.py --model_name_or_path Qwen/Qwen2.5-14B --data q.jsonl --output_dir x --dry_run 16"
    with pytest.raises(SystemExit) as end:
        run_main(*words.split(), monkeypatch=monkeypatch)
    out = capsys.readouterr()
    assert end.value.code == 2 and out.err.startswith("train_sft.py: error: ") and "flags that help" in out.err
    assert "Qwen/Qwen2.5-14B, bfloat16" in out.out  # auto, as on a GPU


@pytest.mark.parametrize("words, dtype", [
    ("--dry_run", "float32"), ("--dry_run 80", "bfloat16"), ("--dtype auto --dry_run 80", "bfloat16"),
    ("--dry_run 80 --dtype float32", "float32"), ("", "float32"),
])  # fmt: skip
def test_a_plan_for_a_gpu_takes_the_precision_of_a_gpu(words, dtype, monkeypatch, capsys):
    flags = f"--model_name_or_path {TINY} --data q.jsonl --output_dir x {words}"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    run_main(str(ROOT / "train_rl.py"), *flags.split(), monkeypatch=monkeypatch)
    out = capsys.readouterr().out
    assert f"{TINY}, {dtype}\n" in out
    assert ("a GPU of 80 GB" if "80" in words else "this machine's RAM") in out


@pytest.mark.parametrize("words, message", [
    ("train_rl.py --sigma_tol 1 --dry_run", "unknown flag --sigma_tol (did you mean --sigma_tool?)"),
    ("train_sft.py --data x --output_dir o --model_name_or_path out/none --dry_run 24", "no config.json there"),
    ("train_sft.py --data x --output_dir o --model_name_or_path out/none --dry_run 24 7", "'7'"),
    ("train_sft.py --data x --output_dir o --model_name_or_path m --dry_run 0", "'0'"),
    ("train_xy.py --dry_run", "train_xy has no plan; these have one: train_rl"),
    ("/usr/train_rl.py --dry_run", "/usr/train_rl has no plan"),
    ("-m eval.evaluate", "-m has no plan"),
])  # fmt: skip
def test_a_wrong_command_ends_in_exit_code_2(words, message, monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    with pytest.raises(SystemExit) as end:
        run_main(*words.split(), monkeypatch=monkeypatch)
    assert end.value.code == 2 and message in capsys.readouterr().err


def test_scripts_without_a_model_say_so(monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    run_main(*"eval/evaluate.py --trajectories t.jsonl --output o --dry_run 24".split(), monkeypatch=monkeypatch)
    assert capsys.readouterr().out == "eval.evaluate: the flags are fine; it loads no model\n"


@pytest.mark.slow
@pytest.mark.parametrize("script", [["train_rl.py"], ["-m", "methods.curriculum"]])
def test_a_user_asks_the_script_itself(script):
    flags = "--model_name_or_path Qwen/Qwen2.5-7B --data q.jsonl --output_dir x --selector all --dry_run 80".split()
    flags = [f for f in flags if script[0] == "-m" or f not in ("--selector", "all")]
    command = [sys.executable, *script, *flags, "--load_in_4bit", "--gradient_checkpointing", "--engine", "fast"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0 and "Qwen/Qwen2.5-7B, bfloat16, Linears in 4-bit NF4" in done.stdout, done.stderr
