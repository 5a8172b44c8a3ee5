"""What the public functions share: argument checks that name the offending value, and the torch.compile boundary."""

import functools
import math

import torch

IGNORE = -100  # target of a token that no loss reads: (logp, entropy) = (0, 0), no gradient

LOGIT_SETTINGS = {  # of transformers' configurations -> the value that changes no logit
    "final_logit_softcapping": None, "logits_soft_cap": None, "output_logit_soft_cap": None, "logit_scale": 1,
    "logits_scaling": 1, "lm_head_multiplier": 1,
}  # fmt: skip


def graph_break(function):
    """`torch.compiler.disable`, applied under torch.compile only: a bare import of the kernels stays seconds faster.

    A compiled model breaks its graph here once, and compiles nothing for a new number of tokens; fullgraph=True raises.
    """

    @functools.wraps(function)
    def wrapper(*args, **kwargs):
        if torch.compiler.is_compiling():
            return torch.compiler.disable(function)(*args, **kwargs)
        return function(*args, **kwargs)

    return wrapper


def check_temperature(temperature: float) -> None:
    """Raise ValueError unless `temperature` is a finite number above 0."""
    if not isinstance(temperature, (int, float)) or not math.isfinite(temperature) or temperature <= 0:
        raise ValueError(f"temperature must be a finite float above 0, got {temperature!r}")


def check_targets(targets: torch.Tensor, rows: int, vocab: int, device: torch.device, check: bool) -> None:
    """Targets are (rows,) integers on `device`, each -100 or inside [0, vocab).

    The values are read on a CPU always, on CUDA only with `check` (reading them waits for the device). Unchecked, a
    value outside gives logp = nan on CUDA, never a read outside the row. Raises ValueError naming row and value.
    """
    if targets.dtype not in (torch.int32, torch.int64):
        raise ValueError(f"targets must be int32 or int64, got {targets.dtype}")
    if targets.shape != (rows,) or targets.device != device:
        raise ValueError(
            f"targets must have shape ({rows},) on {device}, got {tuple(targets.shape)} on {targets.device}"
        )
    if check or device.type == "cpu":
        bad = ((targets != IGNORE) & ((targets < 0) | (targets >= vocab))).nonzero()
        if len(bad):
            row = bad[0].item()
            raise ValueError(f"targets[{row}] = {targets[row].item()} is neither {IGNORE} nor inside [0, {vocab})")


def check_linear(hidden: torch.Tensor, weight: torch.Tensor) -> None:
    """`hidden` (N, H) and a frozen floating-point `weight` (V, H) on one device, in dtypes that keep the fast path.

    Raises ValueError on a trainable weight, and on CUDA for an fp32 weight under a half-precision decoder
    (peft.prepare_model_for_kbit_training upcasts lm_head so): both GEMMs would leave the bf16 tensor cores.
    """
    if weight.requires_grad:
        raise ValueError("frozen lm_head only: weight.requires_grad is True, and no gradient for it is computed")
    if hidden.ndim != 2 or weight.ndim != 2 or hidden.shape[1] != weight.shape[1]:
        raise ValueError(f"hidden (N, H) and weight (V, H) expected, got {tuple(hidden.shape)}, {tuple(weight.shape)}")
    if not (hidden.is_floating_point() and weight.is_floating_point()):
        raise ValueError(f"hidden and weight must be floating point, got {hidden.dtype} and {weight.dtype}")
    if weight.device != hidden.device:
        raise ValueError(f"hidden is on {hidden.device}, weight on {weight.device}")
    if hidden.is_cuda and weight.dtype == torch.float32 and hidden.dtype in (torch.bfloat16, torch.float16):
        raise ValueError(f"lm_head is float32 under a {hidden.dtype} decoder; cast it back: lm_head.to(...)")


def check_lm_head(lm_head: torch.nn.Module, config=None) -> torch.Tensor:
    """The frozen weight (V, H) of a model's output head, or ValueError where logits are not `hidden @ weight.T`.

    Refused: LoRA or modules_to_save on the head, a bias, a quantised or trainable weight, and what the model's
    `config`, or its `text_config`, says of caps (a value) and scales (other than 1) of the logits.
    """
    if hasattr(lm_head, "base_layer") or hasattr(lm_head, "modules_to_save"):
        raise ValueError(f"frozen lm_head only: {type(lm_head).__name__} is an adapter on lm_head")
    if getattr(lm_head, "bias", None) is not None:
        raise ValueError("lm_head has a bias, which the kernels do not add")
    if not lm_head.weight.is_floating_point():
        raise ValueError(f"lm_head is quantised ({lm_head.weight.dtype}); leave it out of the quantisation")
    if lm_head.weight.requires_grad:
        raise ValueError("frozen lm_head only: lm_head.weight.requires_grad is True")
    for name, neutral in LOGIT_SETTINGS.items():
        for part in (config, getattr(config, "text_config", None)):
            value = getattr(part, name, None)
            if value is not None and value != neutral:
                raise ValueError(f"config.{name} = {value}: logits of this model are not hidden @ lm_head.weight.T")
    return lm_head.weight
