"""engines/merged.py: the sampling copy computes what the policy computes, also from a 4-bit base, and follows its updates.

python -m pytest tests/test_merged.py
"""

import pytest
import torch

from core.model import ModelArgs, load_policy
from engines.merged import merged_copy, refresh

IDS = torch.tensor([[5, 9, 200, 31, 7, 8]])


def moved(model, seed):
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "lora_B" in name:
                p.copy_(0.1 * torch.randn(p.shape, generator=generator))


def logits(model):
    with torch.no_grad():
        return model(IDS).logits


@pytest.mark.parametrize("four_bit", [False, True])
def test_the_copy_computes_what_the_policy_does(tiny_model, four_bit):
    if four_bit:
        pytest.importorskip("bitsandbytes")
    model, _ = load_policy(ModelArgs(model_name_or_path=str(tiny_model), load_in_4bit=four_bit, dtype="float32"))
    before = logits(model)
    moved(model, 0)
    plain = merged_copy(model, "float32")
    assert (logits(model) - before).abs().max() > 0.01
    torch.testing.assert_close(logits(plain), logits(model), rtol=1e-4, atol=1e-4)
    moved(model, 1)
    assert (logits(plain) - logits(model)).abs().max() > 0.01
    refresh(plain, model)
    torch.testing.assert_close(logits(plain), logits(model), rtol=1e-4, atol=1e-4)
    assert not any(p.requires_grad for p in plain.parameters()) and not hasattr(plain.config, "quantization_config")


def test_the_copy_may_be_coarser(tiny_model):
    model, _ = load_policy(ModelArgs(model_name_or_path=str(tiny_model), dtype="float32"))
    moved(model, 0)
    plain = merged_copy(model, "bfloat16")
    assert {p.dtype for p in plain.parameters()} == {torch.bfloat16}
    assert 0 < (logits(plain).float() - logits(model)).abs().max() < 0.2
