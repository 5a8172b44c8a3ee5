"""Token statistics, adapters, checkpoints of weights and the 4-bit trap on CPUs.

    python -m pytest tests/test_model.py
"""

import shutil
from dataclasses import replace

import pytest
import torch
from peft import LoraConfig, get_peft_model
from tiny_models import byte_tokenizer, save_tiny_model, save_with_byte_tokenizer, tiny_multimodal
from transformers import AutoConfig, Qwen2Config, Qwen2ForCausalLM, RecurrentGemmaConfig, RecurrentGemmaForCausalLM

import kernels.checks
from core import model as m
from core.trajectory import DataError, Trajectory


def trajectory(ids, mask, prompt_len=1):
    return Trajectory("q", 0, "think", ids, prompt_len, mask, True, "", [], [], "eos", "")


ROWS = [trajectory([5, 6, 7, 8, 9], [0, 1, 0, 1, 1]), trajectory([9, 8, 7], [0, 0, 1])]
CPU = torch.device("cpu")


@pytest.fixture
def policy(tiny_model):
    torch.manual_seed(0)
    return m.load_policy(m.ModelArgs(model_name_or_path=str(tiny_model)))


def randomise(model, name="default"):
    """Give the fresh adapter (B = 0) an effect."""
    with torch.no_grad():
        for key, p in model.named_parameters():
            if f"lora_B.{name}" in key:
                p.normal_(std=0.1, generator=torch.Generator().manual_seed(len(key)))


def naive_stats(model, row, temperature):
    logits = model(torch.tensor([row.token_ids])).logits[0].double() / temperature
    logp = logits.log_softmax(-1)
    entropy = -(logp.exp() * logp).sum(-1)
    out = []
    for t, mask in enumerate(row.loss_mask):
        out.append((logp[t - 1, row.token_ids[t]].item(), entropy[t - 1].item()) if mask else (0.0, 0.0))
    return out


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_token_stats_match_a_naive_softmax_row_by_row(policy, temperature):
    model, tokenizer = policy
    randomise(model)
    logp, entropy = m.token_stats(model, m.collate(ROWS, tokenizer.pad_token_id, CPU), temperature)
    assert logp.shape == (2, 5)
    for i, row in enumerate(ROWS):
        expected = naive_stats(model, row, temperature)
        assert logp[i, : len(expected)].tolist() == pytest.approx([e[0] for e in expected], abs=2e-5)
        assert entropy[i, : len(expected)].tolist() == pytest.approx([e[1] for e in expected], abs=2e-5)
    assert logp[1, 3:].tolist() == [0.0, 0.0]


def test_token_stats_are_differentiable_and_equal_without_gradient(policy):
    model, tokenizer = policy
    batch = m.collate(ROWS, tokenizer.pad_token_id, CPU)
    logp, entropy = m.token_stats(model, batch)
    with torch.no_grad():
        again, _ = m.token_stats(model, batch)
    assert torch.equal(logp, again)
    (logp.sum() + entropy.sum()).backward()
    assert any(p.grad.abs().sum() > 0 for p in model.parameters() if p.requires_grad)


def test_padding_by_pad_or_eos_id_changes_nothing(policy):
    model, tokenizer = policy
    first = m.token_stats(model, m.collate(ROWS, tokenizer.pad_token_id, CPU))[0]
    second = m.token_stats(model, m.collate(ROWS, tokenizer.eos_token_id, CPU))[0]
    assert torch.equal(first, second)


def test_reference_is_the_start_of_the_run_and_stays_frozen(policy):
    model, tokenizer = policy
    randomise(model)  # an adapter that went on from SFT
    batch = m.collate(ROWS, tokenizer.pad_token_id, CPU)
    start = m.token_stats(model, batch)[0].detach()
    m.add_reference(model)
    trained = {n for n, p in model.named_parameters() if p.requires_grad}
    assert trained and all(".default." in n for n in trained)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1.0)
    m.token_stats(model, batch)[0].sum().backward()
    optimizer.step()
    with m.use_reference(model):
        reference = m.token_stats(model, batch)[0]
    moved = m.token_stats(model, batch)[0]
    assert torch.equal(reference, start) and not torch.allclose(moved, start)
    assert moved.requires_grad and {n for n, p in model.named_parameters() if p.requires_grad} == trained


def test_adapter_round_trip_is_exact_and_keeps_the_reference_out(policy, tmp_path, tiny_model):
    model, tokenizer = policy
    randomise(model)
    m.add_reference(model)
    m.save_adapter(model, tokenizer, tmp_path / "a")
    loaded, _ = m.load_policy(m.ModelArgs(model_name_or_path=str(tmp_path / "a")))
    batch = m.collate(ROWS, tokenizer.pad_token_id, CPU)
    assert torch.equal(m.token_stats(model, batch)[0], m.token_stats(loaded, batch)[0])
    assert any(p.requires_grad for p in loaded.parameters())
    fresh, _ = m.load_policy(m.ModelArgs(model_name_or_path=str(tiny_model)))
    m.load_adapter(fresh, tmp_path / "a")
    assert torch.equal(m.token_stats(model, batch)[0], m.token_stats(fresh, batch)[0])


@pytest.mark.parametrize("bias", [True, False])
def test_4bit_gradients_survive_an_evaluation_pass_on_a_cpu(tmp_path, bias):
    """bitsandbytes repacks weights at the first no-grad forward on CPUs with AVX512-BF16: must not happen here."""
    pytest.importorskip("bitsandbytes")
    folder = save_tiny_model(tmp_path / "m")
    args = m.ModelArgs(model_name_or_path=str(folder), load_in_4bit=True)

    def gradients(evaluate_first):
        torch.manual_seed(0)
        model, tokenizer = m.load_policy(args)
        assert sum(type(x).__name__ == "Linear4bit" for x in model.modules()) > 0
        if not bias:
            for x in model.modules():
                if hasattr(x, "support_avx512bf16_for_cpu"):
                    x.bias = None
        randomise(model)
        batch = m.collate(ROWS, tokenizer.pad_token_id, CPU)
        if evaluate_first:
            model.eval()
            with torch.no_grad():
                before = m.token_stats(model, batch)[0]
            model.train()
        logp, _ = m.token_stats(model, batch)
        if evaluate_first:
            assert torch.equal(before, logp)
        logp.sum().backward()
        return {n: p.grad for n, p in model.named_parameters() if p.requires_grad}

    plain, after = gradients(False), gradients(True)
    assert all(torch.equal(plain[n], after[n]) for n in plain)
    assert any(g.abs().sum() > 0 for g in plain.values())


def test_sampling_mode_switches_checkpointing_off_and_on(policy):
    model, _ = policy
    m.enable_checkpointing(model)
    model.train()

    def on():
        return any(getattr(x, "gradient_checkpointing", False) for x in model.modules())

    hooks = sum(len(x._forward_hooks) for x in model.modules())
    for _ in range(2):
        with m.sampling_mode(model):
            assert not model.training and not on()
        assert model.training and on()
    assert sum(len(x._forward_hooks) for x in model.modules()) == hooks


def test_gradient_checkpointing_gives_the_same_gradients(policy):
    model, tokenizer = policy
    randomise(model)
    batch = m.collate(ROWS, tokenizer.pad_token_id, CPU)

    def gradient():
        model.zero_grad()
        m.token_stats(model, batch)[0].sum().backward()
        return [p.grad.clone() for p in model.parameters() if p.requires_grad]

    plain = gradient()
    m.enable_checkpointing(model)
    model.train()
    assert all(torch.equal(a, b) for a, b in zip(plain, gradient()))


def test_bad_model_folders_are_named(tmp_path, tiny_model):
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="--model_name_or_path .*empty: no usable tokenizer"):
        m.load_tokenizer(str(tmp_path / "empty"))
    bare = tmp_path / "bare"
    shutil.copytree(tiny_model, bare, ignore=shutil.ignore_patterns("tokenizer*", "*.jinja"))
    with pytest.raises(DataError, match="bare: no usable tokenizer"):
        m.load_tokenizer(str(bare))
    untemplated = tmp_path / "untemplated"
    shutil.copytree(tiny_model, untemplated, ignore=shutil.ignore_patterns("*.jinja"))
    with pytest.raises(DataError, match="no chat template"):
        m.load_tokenizer(str(untemplated))
    weightless = tmp_path / "weightless"
    shutil.copytree(tiny_model, weightless, ignore=shutil.ignore_patterns("*.safetensors"))
    with pytest.raises(DataError, match="--model_name_or_path .*weightless"):
        m.load_policy(m.ModelArgs(model_name_or_path=str(weightless)))


def test_collate_refuses_nothing():
    with pytest.raises(ValueError, match="at least one"):
        m.collate([], 0, CPU)


def test_a_curriculum_is_loaded_by_its_last_adapter(tmp_path):
    assert m.adapter_of(str(tmp_path)) == str(tmp_path)
    (tmp_path / "result.json").write_text('{"loss": 1.0}')
    assert m.adapter_of(str(tmp_path)) == str(tmp_path)
    (tmp_path / "result.json").write_text('{"adapter": "x/round-3/rl"}')
    assert m.adapter_of(str(tmp_path)) == "x/round-3/rl"
    assert m.ModelArgs(model_name_or_path=str(tmp_path)).model_name_or_path == "x/round-3/rl"  # for loaders and plans
    with pytest.raises(DataError, match="--model_name_or_path x/round-3/rl: no such folder"):
        m.load_policy(m.ModelArgs(model_name_or_path=str(tmp_path)))


def test_paths_that_are_no_folder_are_not_looked_up_on_the_hub(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data").mkdir()
    for path in ("/no/such/folder", "data/tinyy", "gone"):
        with pytest.raises(DataError, match=f"--model_name_or_path {path}: no such folder"):
            m.load_tokenizer(path)


def test_adapters_from_elsewhere(tiny_model, tmp_path):
    """Dropout is off; what the loop does not train, or the kernels do not see, is refused by name."""

    def adapter(name, **changes):
        base = m.load_base(m.ModelArgs(str(tiny_model)), str(tiny_model))
        config = LoraConfig(task_type="CAUSAL_LM", r=4, **{"target_modules": ["q_proj"], **changes})
        m.save_adapter(get_peft_model(base, config), m.load_tokenizer(str(tiny_model)), tmp_path / name)
        return m.ModelArgs(str(tmp_path / name))

    model, tokenizer = m.load_policy(adapter("dropout", lora_dropout=0.5))
    model.train()
    batch = m.collate(ROWS, tokenizer.pad_token_id, CPU)
    assert torch.equal(m.token_stats(model, batch)[0], m.token_stats(model, batch)[0])
    assert {x.p for x in model.modules() if isinstance(x, torch.nn.Dropout)} <= {0.0}
    for changes, message in (
        ({"use_dora": True}, "adapters with use_dora True are not trained here"),
        ({"bias": "all"}, "adapters with bias all"),
        ({"modules_to_save": ["embed_tokens"]}, "adapters with modules_to_save"),
        ({"target_modules": ["q_proj", "lm_head"]}, "is an adapter on lm_head"),
    ):
        with pytest.raises(DataError, match=message):
            m.load_policy(adapter("x", **changes))
    with pytest.raises(DataError, match="--lora_target_modules v_proj: the adapter in .* goes on with its own"):
        m.load_policy(replace(adapter("q"), lora_target_modules=["v_proj"]))
    with pytest.raises(DataError, match="--dtype float16: gradients underflow"):
        m.load_policy(m.ModelArgs(str(tiny_model), dtype="float16"))
    m.load_policy(m.ModelArgs(str(tiny_model), dtype="float16"), trainable=False)


def test_an_adapter_goes_on_with_its_own_rank(tiny_model, tmp_path):
    model, tokenizer = m.load_policy(m.ModelArgs(model_name_or_path=str(tiny_model), lora_r=4))
    m.save_adapter(model, tokenizer, tmp_path / "a")
    again, _ = m.load_policy(m.ModelArgs(model_name_or_path=str(tmp_path / "a")))  # the default says nothing
    assert again.peft_config["default"].r == 4
    with pytest.raises(DataError, match="--lora_r 8: the adapter in .* goes on with its own, 4"):
        m.load_policy(m.ModelArgs(model_name_or_path=str(tmp_path / "a"), lora_r=8))
    m.load_policy(m.ModelArgs(model_name_or_path=str(tmp_path / "a"), lora_r=8), trainable=False)  # not used there


SMALL = {
    "vocab_size": 264, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2,
}  # fmt: skip


def recurrent_gemma():
    torch.manual_seed(0)
    config = RecurrentGemmaConfig(**SMALL, head_dim=16, lru_width=64, attention_window_size=32, logits_soft_cap=30.0)
    return RecurrentGemmaForCausalLM(config)


class Biased(Qwen2ForCausalLM):
    """A head that no name in a configuration tells of."""

    def forward(self, *args, **kwargs):
        out = super().forward(*args, **kwargs)
        out.logits = out.logits + torch.linspace(0, 0.1, out.logits.shape[-1], dtype=out.logits.dtype)
        return out


@pytest.mark.parametrize("build, name", [(lambda: tiny_multimodal(2.0), "final_logit_softcapping = 2.0"),
                                         (recurrent_gemma, "logits_soft_cap = 30.0")])  # fmt: skip
def test_a_head_that_caps_its_logits_is_refused(tmp_path, monkeypatch, build, name):
    """By the name of its setting; by what it computes where the name is not known."""
    args = m.ModelArgs(save_with_byte_tokenizer(build(), tmp_path, head=20.0))
    with pytest.raises(DataError, match=f"--model_name_or_path .*: config.{name}"):
        m.load_policy(args)
    monkeypatch.setattr(kernels.checks, "LOGIT_SETTINGS", {})
    with pytest.raises(DataError, match=r"gives tokens log-probs that differ by up to \d+\.?\d* nats from softmax"):
        m.load_policy(args)


@pytest.mark.parametrize("four_bit", [False, True])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_what_a_model_adds_to_its_logits_is_found(tmp_path, monkeypatch, dtype, four_bit):
    torch.manual_seed(0)
    folder = save_with_byte_tokenizer(Qwen2ForCausalLM(Qwen2Config(**SMALL)), tmp_path)
    args = m.ModelArgs(folder, dtype=dtype, load_in_4bit=four_bit)
    m.load_policy(args)
    monkeypatch.setattr(m.AutoModelForCausalLM, "from_pretrained", Biased.from_pretrained)
    with pytest.raises(DataError, match="Biased gives tokens log-probs that differ by up to 0.0"):
        m.load_policy(args)


def test_a_multimodal_class_without_a_cap_is_scored_rightly(tmp_path):
    model, tokenizer = m.load_policy(m.ModelArgs(save_with_byte_tokenizer(tiny_multimodal(None), tmp_path, head=2.0)))
    logp, _ = m.token_stats(model, m.collate(ROWS, tokenizer.pad_token_id, CPU))
    for i, row in enumerate(ROWS):
        expected = naive_stats(model, row, 1.0)
        assert logp[i, : len(expected)].tolist() == pytest.approx([e[0] for e in expected], abs=2e-5)


def test_padding_has_a_row_in_the_embedding(tmp_path):
    """The pad token of some checkpoints lies beyond the embedding; an eos there could never be sampled."""
    tokenizer = byte_tokenizer()
    eos, pad = tokenizer.eos_token_id, tokenizer.pad_token_id
    assert pad == eos + 1
    for rows in (eos + 1, eos):
        torch.manual_seed(0)
        base = Qwen2ForCausalLM(Qwen2Config(**SMALL | {"vocab_size": rows}))
        save_with_byte_tokenizer(base, tmp_path / str(rows))
    model, tokenizer = m.load_policy(m.ModelArgs(str(tmp_path / str(eos + 1))))
    assert tokenizer.pad_token_id == eos
    m.token_stats(model, m.collate(ROWS, tokenizer.pad_token_id, CPU))
    with pytest.raises(DataError, match=f"embedding has {eos} rows, none for the eos <.im_end.> .id {eos}"):
        m.load_policy(m.ModelArgs(str(tmp_path / str(eos))))


def test_a_4bit_checkpoint_needs_no_flag(tmp_path, monkeypatch):
    """Loaded without `--load_in_4bit` it scores as with it, and is not repacked on a CPU with AVX512-BF16."""
    pytest.importorskip("bitsandbytes")
    monkeypatch.setattr("bitsandbytes.nn.modules.has_avx512bf16", lambda: True)
    flag = m.ModelArgs(str(save_tiny_model(tmp_path / "plain")), load_in_4bit=True)
    base, tokenizer = m.load_policy(flag, trainable=False)
    base.save_pretrained(tmp_path / "4bit")
    tokenizer.save_pretrained(tmp_path / "4bit")
    assert AutoConfig.from_pretrained(tmp_path / "4bit").quantization_config["load_in_4bit"]
    for args in (m.ModelArgs(str(tmp_path / "4bit")), replace(flag, model_name_or_path=str(tmp_path / "4bit"))):
        model, _ = m.load_policy(args)
        assert not any(getattr(x, "support_avx512bf16_for_cpu", False) for x in model.modules())
        batch = m.collate(ROWS, tokenizer.pad_token_id, CPU)
        assert torch.equal(m.token_stats(model, batch)[0], m.token_stats(base, batch)[0])


def test_rank_stabilised_adapters_are_scored_as_peft_computes_them(tiny_model, tmp_path):
    base = m.load_base(m.ModelArgs(str(tiny_model)), str(tiny_model))
    config = LoraConfig(task_type="CAUSAL_LM", r=4, target_modules=["q_proj"], use_rslora=True)
    adapted = get_peft_model(base, config)
    randomise(adapted)
    tokenizer = m.load_tokenizer(str(tiny_model))
    m.save_adapter(adapted, tokenizer, tmp_path)
    model, _ = m.load_policy(m.ModelArgs(str(tmp_path)))
    batch = m.collate(ROWS, tokenizer.pad_token_id, CPU)
    assert torch.equal(m.token_stats(model, batch)[0], m.token_stats(adapted, batch)[0])
    expected = naive_stats(model, ROWS[0], 1.0)[1][0]
    assert m.token_stats(model, batch)[0][0, 1].item() == pytest.approx(expected, abs=2e-5)
