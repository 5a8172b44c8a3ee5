"""engines/merged.py: the sampling copy computes what the policy computes, also from a 4-bit base, and follows its updates.

python -m pytest tests/test_merged.py
"""

import pytest
import torch
from tiny_models import save_with_byte_tokenizer, tiny_multimodal

from core.model import ModelArgs, load_policy
from core.trajectory import DataError
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


@pytest.mark.parametrize("tied", [True, False])
def test_the_copy_of_a_multimodal_class(tmp_path, tied):
    """Its head is tied to another name, and a buffer of the checkpoint scales its layers."""
    base = tiny_multimodal(None, tied)
    for layer in base.model.language_model.layers:
        layer.layer_scalar.fill_(0.7)
    folder = save_with_byte_tokenizer(base, tmp_path, head=2.0)
    model, _ = load_policy(ModelArgs(model_name_or_path=folder, dtype="float32"))
    moved(model, 0)
    plain = merged_copy(model, "float32")
    torch.testing.assert_close(logits(plain), logits(model), rtol=1e-4, atol=1e-4)
    same = plain.get_output_embeddings().weight.data_ptr() == plain.get_input_embeddings().weight.data_ptr()
    assert same == tied


def test_other_quantisations_are_not_copied(tiny_model):
    model, _ = load_policy(ModelArgs(model_name_or_path=str(tiny_model), dtype="float32"))
    layer = model.get_base_model().model.layers[0].mlp.up_proj.base_layer
    layer.weight = torch.nn.Parameter(layer.weight.to(torch.int8), requires_grad=False)
    with pytest.raises(DataError, match="--rollout_dtype: the base is quantised to torch.int8"):
        merged_copy(model, "float32")
