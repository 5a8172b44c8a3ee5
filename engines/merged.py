"""A plain copy of the policy for sampling: adapter merged into full-precision weights, no 4-bit arithmetic per token.

`--rollout_dtype bfloat16` trades memory (a whole second model) for speed of decoding. Its samples come from slightly
other logits than the trained model's; `--check` measures by how much.
"""

import copy

import torch
from accelerate import init_empty_weights
from peft.tuners.lora import LoraLayer
from torch import Tensor
from transformers import PreTrainedModel

from core.model import DTYPES, causal_lm
from core.trajectory import DataError


def plain_weight(layer: torch.nn.Module) -> Tensor:
    """The layer's weight as a matrix (outputs, inputs); a 4-bit one is unpacked to its compute dtype.

    DataError for other quantisations.
    """
    weight = layer.weight
    if not hasattr(weight, "quant_state"):
        if not weight.is_floating_point():
            raise DataError(f"--rollout_dtype: the base is quantised to {weight.dtype}, which is not unpacked here")
        return weight.data
    from bitsandbytes.functional import dequantize_4bit

    return dequantize_4bit(weight.data, weight.quant_state)


def adapted_layers(model: torch.nn.Module) -> dict[str, LoraLayer]:
    """Name in the plain model -> layer that carries an adapter."""
    return {name: m for name, m in causal_lm(model).named_modules() if isinstance(m, LoraLayer)}


def merged_copy(model: torch.nn.Module, dtype: str) -> PreTrainedModel:
    """A model without adapter or quantisation that computes what `model` does now, up to rounding to `dtype`.

    Tied weights stay tied. It is not trained and follows later updates only by `refresh`.
    """
    lm, kind = causal_lm(model), DTYPES[dtype]
    config = copy.deepcopy(lm.config)
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    with init_empty_weights(include_buffers=False):
        plain = type(lm)._from_config(config, dtype=kind, attn_implementation=config._attn_implementation)
    weights, copies = {}, {}  # of a parameter with two names there is one copy
    for name, module in lm.named_modules():
        if ".lora_" in f".{name}":
            continue
        own = name.removesuffix(".base_layer")
        for key, value in module.named_parameters(recurse=False):
            if value not in copies:
                matrix = plain_weight(module) if key == "weight" else value.data
                copies[value] = matrix.to(kind, copy=True)
            weights[f"{own}.{key}"] = copies[value]
        for key, value in module.named_buffers(recurse=False):
            if key not in module._non_persistent_buffers_set:
                weights[f"{own}.{key}"] = value.to(kind if value.is_floating_point() else value.dtype, copy=True)
    plain.load_state_dict(weights, assign=True)
    plain.requires_grad_(False).to(next(model.parameters()).device).eval()
    plain.generation_config = lm.generation_config
    refresh(plain, model)
    return plain


@torch.no_grad()
def refresh(plain: PreTrainedModel, model: torch.nn.Module, adapter: str = "default") -> None:
    """Put the weights of the policy as it is now into its copy."""
    for name, layer in adapted_layers(model).items():
        weight = plain_weight(layer.get_base_layer())
        merged = weight.float() + layer.get_delta_weight(adapter).float()
        plain.get_submodule(name).weight.copy_(merged)
