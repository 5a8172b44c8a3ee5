"""Plans against peft, bitsandbytes, transformers' caches, autograd's saved tensors and the live tensors of a step.

python -m pytest tests/test_plan.py
"""

import sys
import weakref
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter
from transformers import AutoModelForCausalLM, DynamicCache, Qwen2Config, Qwen3Config

import flywheel
import kernels
import train_rl
import train_sft
from bench import memory, plan
from core.args import cli
from core.model import Batch, adamw, enable_checkpointing, head_weight, hidden_of_targets
from core.trajectory import DataError
from engines.slot_cache import SlotCache

ROOT = Path(__file__).parent.parent
TINY = str(ROOT / "data" / "tiny")
MIXED = ["q_proj", "up_proj"]  # a choice of target modules


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
        assert sum(memory.adapter_tensors(d, 16, targets)) == trained
    with torch.device("meta"):
        lm = AutoModelForCausalLM.from_config(memory.read_config("Qwen/Qwen2.5-7B-Instruct"), dtype=torch.bfloat16)
    tensors = [p for p in lora(lm).parameters() if p.requires_grad]
    assert sorted(memory.adapter_tensors(large, 16, ["all-linear"])) == sorted(p.numel() for p in tensors)
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
    optimizer = adamw(model, name, 1e-3, 0.0)
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
    assert memory.saved_bytes(d, rows, 80, name, targets, 8, checkpointing) == pytest.approx(measured, rel=0.03)


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
    args = sft(load_in_4bit=False, dtype=dtype, gradient_checkpointing=checkpointing, lora_r=8, beta=0.0)
    parts = memory.training(d, args, torch.device("cpu"), 4, 128)
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


def sft(**flags):
    """Arguments with any fields: the plan reads them by name."""
    args = train_sft.Args(model_name_or_path=TINY, data="x", output_dir="x")
    vars(args).update(flags)
    return args


SEVEN = dict(model_name_or_path="Qwen/Qwen2.5-7B-Instruct", dtype="bfloat16", dry_run=True, output_dir="unused")
EIGHT_K = dict(load_in_4bit=True, lora_r=16, max_tokens_per_micro_batch=8192, gradient_checkpointing=True)


def test_the_plan_of_7b_in_4_bit(tmp_path, capsys):
    flags = SEVEN | EIGHT_K | dict(data=str(tmp_path / "q.jsonl"), max_completion_length=4096, dry_run_gb=24)
    result = train_rl.main(train_rl.Args(**flags, engine="fast", rollout_batch_size=16))
    out = capsys.readouterr().out
    assert result["fits"] == {16: True, 24: True, 80: True} and 11 * plan.GiB < result["peak"] < 15.2 * plan.GiB
    for text in ("not checked", "steps", "KV cache", "optimizer", "activations", "16 GB", "tokens per step, at most"):
        assert text in out, text
    assert "16 GB | tight" in out and "24 GB | fits" in out  # by a fifth
    assert not (tmp_path / "unused").exists()
    need = plan.need_of(train_rl.Args(**flags, engine="fast"), torch.device("cuda"), 2048, 96)
    parts = need.training(8192)
    assert parts["weights"] == pytest.approx(5.17 * plan.GiB, rel=0.01)
    assert parts["adapter"] == parts["gradients"] == 4 * 40_370_176 and parts["optimizer"] // parts["adapter"] == 2
    merged = plan.need_of(train_rl.Args(**flags, rollout_dtype="bfloat16"), torch.device("cuda"), 2048, 96)
    assert merged.rollout(8)["merged copy"] == merged.training(8192)["merged copy"] == 2 * 7_615_616_512
    large = plan.need_of(train_rl.Args(**flags | dict(gradient_checkpointing=False)), torch.device("cuda"), 2048, 96)
    assert plan.total(large.training(8192)) > 70 * plan.GiB  # what checkpointing saves


def test_what_does_not_fit_is_refused_with_flags(monkeypatch, tmp_path, capsys):
    flags = SEVEN | dict(data=str(tmp_path / "q.jsonl"), max_length=8192, dry_run_gb=24)
    with pytest.raises(
        DataError, match="24 GB has 22.8.*--gradient_checkpointing.*--optimizer adamw_8bit.*--load_in_4bit"
    ):
        train_sft.main(train_sft.Args(**flags))
    flags |= EIGHT_K | dict(optimizer="adamw_8bit")
    assert train_sft.main(train_sft.Args(**flags))["fits"] == {16: True, 24: True, 80: True}
    monkeypatch.setattr(plan, "capacity", lambda gb: (10 * plan.GiB, "here"))
    with pytest.raises(DataError, match="flags that help: a shorter --max_length"):
        train_sft.main(train_sft.Args(**flags))
    with pytest.raises(DataError, match="--engine fast, --rollout_batch_size"):
        flywheel.main(flywheel.Args(**SEVEN, load_in_4bit=True, data="q.jsonl"))
    assert "does not fit" in capsys.readouterr().out


def test_the_most_that_fits_is_at_the_border():
    assert [plan.most(lambda n: n <= border) for border in (0, 1, 5, 31)] == [0, 1, 5, 31]
    for border in (1000, 12345):
        assert 0.96 * border < plan.most(lambda n: n <= border) <= border
    assert plan.most(lambda n: n <= 50, above=60) == 0


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


def test_a_dry_run_checks_the_data(tmp_path, monkeypatch, capsys):
    data = tmp_path / "q.jsonl"
    data.write_text('{"id": "a", "question": "what ?", "answer": "x"}\n' * 1)
    flags = dict(model_name_or_path=TINY, data=str(data), output_dir=str(tmp_path / "out"), dry_run=True)
    with pytest.raises(DataError, match="holds 1 questions, fewer than --questions_per_step 12"):
        train_rl.main(train_rl.Args(**flags))
    train_rl.main(train_rl.Args(**flags, questions_per_step=1))
    assert "questions read, prompts of up to" in capsys.readouterr().out
    with pytest.raises(DataError, match="--max_prompt_length 3"):
        train_rl.main(train_rl.Args(**flags, questions_per_step=1, max_prompt_length=3))
    data.write_text('{"question": "what ?"}\n')
    with pytest.raises(DataError, match="q.jsonl:1"):
        flywheel.main(flywheel.Args(**flags))
    response = '[{"role": "model", "text": "<answer>x</answer>"}]'
    data.write_text(f'{{"id": "a", "question": "what ?", "answer": "x", "response": {response}}}\n')
    train_sft.main(train_sft.Args(**flags, per_device_train_batch_size=1))
    out = capsys.readouterr().out
    assert "1 examples of up to" in out and "steps                            3" in out
    assert not (tmp_path / "out").exists()


def test_unknown_models_are_named(tmp_path):
    with pytest.raises(DataError, match="out/none: no config.json there, and none of Qwen2.5-0.5B"):
        memory.read_config("out/none")
    (tmp_path / "config.json").write_text('{"model_type": "gpt2"}')
    with pytest.raises(DataError, match="'gpt2'"):
        memory.decoder_of(memory.read_config(str(tmp_path)))
    (tmp_path / "adapter_config.json").write_text('{"base_model_name_or_path": "Qwen/Qwen3-8B"}')
    assert memory.read_config(str(tmp_path)).hidden_size == 4096


def test_the_flag_ends_in_exit_code_2(monkeypatch, capsys):
    words = (
        "--model_name_or_path Qwen/Qwen2.5-14B --dtype bfloat16 --data q.jsonl --output_dir x --dry_run --dry_run_gb 16"
    )
    monkeypatch.setattr(sys, "argv", ["train_sft.py", *words.split()])
    with pytest.raises(SystemExit) as end:
        cli(train_sft.main, train_sft.Args)
    assert end.value.code == 2 and "flags that help" in capsys.readouterr().err


def test_a_plan_for_a_gpu_takes_the_precision_of_a_gpu(tmp_path):
    flags = dict(model_name_or_path="Qwen/Qwen2.5-7B", data="q.jsonl", output_dir=str(tmp_path))
    assert train_rl.Args(**flags, dry_run_gb=24).dtype == "bfloat16"
    assert train_rl.Args(**flags, dry_run_gb=24, dtype="float32").dtype == "float32"
