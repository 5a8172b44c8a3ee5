"""Memory of a run by part, worked out from a model's config alone.

Parameters are counted on the meta device; weights, adapter, optimizer and cache are exact; activations follow the
formulas of `layer_bytes`, `saved_bytes`, `training` and `rollout`. Not counted: what the allocator loses to
fragmentation, and the cuBLAS workspace.
"""

import json
import math
from pathlib import Path
from typing import Any, NamedTuple

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig, Qwen2Config, Qwen3Config

from core.model import DTYPES
from core.trajectory import DataError
from engines.fast import PASS, PIECE, ROWS
from engines.slot_cache import WIDTH, round_up
from kernels.linear_logprob_entropy import UPCAST_ELEMENTS, chunk_rows

CONTEXT = 2**29  # bytes that CUDA itself takes: an allowance, not a measurement
QWEN2 = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads")
ARCHITECTURES = {  # published config.json files: the fields of QWEN2, then vocabulary and whether the lm_head is tied
    "Qwen2.5-0.5B": (Qwen2Config, (896, 4864, 24, 14, 2), 151936, True),
    "Qwen2.5-1.5B": (Qwen2Config, (1536, 8960, 28, 12, 2), 151936, True),
    "Qwen2.5-3B": (Qwen2Config, (2048, 11008, 36, 16, 2), 151936, True),
    "Qwen2.5-7B": (Qwen2Config, (3584, 18944, 28, 28, 4), 152064, False),
    "Qwen2.5-14B": (Qwen2Config, (5120, 13824, 48, 40, 8), 152064, False),
    "Qwen3-0.6B": (Qwen3Config, (1024, 3072, 28, 16, 8), 151936, True),
    "Qwen3-1.7B": (Qwen3Config, (2048, 6144, 28, 16, 8), 151936, True),
    "Qwen3-4B": (Qwen3Config, (2560, 9728, 36, 32, 8), 151936, True),
    "Qwen3-8B": (Qwen3Config, (4096, 12288, 36, 32, 8), 151936, False),
}
KNOWN_TYPES = ("qwen2", "qwen3", "llama", "mistral")  # RMSNorm, grouped attention, gated MLP
Parts = dict[str, int]  # what -> bytes


class Decoder(NamedTuple):
    """Sizes that memory depends on. `linears`: (name, outputs, inputs) of every Linear but the lm_head."""

    hidden: int
    intermediate: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    vocab: int
    qk_norm: bool
    parameters: int  # tied ones once
    linears: list[tuple[str, int, int]]


def read_config(path: str) -> PretrainedConfig:
    """The model's config: of a folder (or the base of an adapter folder), of the table above, or of the hub's cache.

    DataError if it is in none of them; nothing is downloaded.
    """
    adapter = Path(path, "adapter_config.json")
    if adapter.is_file():
        path = json.loads(adapter.read_text())["base_model_name_or_path"]
    name = path.rstrip("/").split("/")[-1].removesuffix("-Instruct").removesuffix("-Base")
    if not Path(path).is_dir() and name in ARCHITECTURES:
        cls, sizes, vocab, tied = ARCHITECTURES[name]
        more = {"head_dim": 128} if cls is Qwen3Config else {}
        return cls(**dict(zip(QWEN2, sizes)), vocab_size=vocab, tie_word_embeddings=tied, **more)
    try:
        return AutoConfig.from_pretrained(path, local_files_only=True)
    except (OSError, ValueError):
        raise DataError(
            f"--model_name_or_path {path}: no config.json there, and none of {', '.join(ARCHITECTURES)}: no plan"
        ) from None


def decoder_of(config: PretrainedConfig) -> Decoder:
    """Count the model on the meta device; DataError for an architecture whose activations have no formula here."""
    if config.model_type not in KNOWN_TYPES:
        raise DataError(f"model_type {config.model_type!r} is none of {KNOWN_TYPES}: no plan")
    with torch.device("meta"):
        lm = AutoModelForCausalLM.from_config(config)
    head, attention = lm.get_output_embeddings(), lm.base_model.layers[0].self_attn
    return Decoder(
        config.hidden_size,
        config.intermediate_size,
        config.num_hidden_layers,
        config.num_attention_heads,
        config.num_key_value_heads,
        attention.head_dim,
        config.vocab_size,
        hasattr(attention, "q_norm"),
        sum(p.numel() for p in lm.parameters()),
        [
            (name, m.out_features, m.in_features)
            for name, m in lm.named_modules()
            if isinstance(m, torch.nn.Linear) and m is not head
        ],
    )


def adapted(d: Decoder, targets: list[str]) -> list[tuple[str, int, int]]:
    """The Linears that get an adapter, by PEFT's rule: `all-linear`, or names that end with a target."""
    return [m for m in d.linears if targets == ["all-linear"] or any(f".{m[0]}".endswith(f".{t}") for t in targets)]


# ---------------------------------------------------------------------------------------------------- exact parts


def nf4_bytes(n: int) -> int:
    """A 4-bit weight of n values with double quantisation, as bitsandbytes keeps it.

    n/2; a scale of 1 byte per 64 values; a float32 scale per 256 of those; tables of 16 and 256 values and an offset.
    """
    blocks = math.ceil(n / 64)
    return math.ceil(n / 2) + blocks + 4 * math.ceil(blocks / 256) + 4 * (16 + 256 + 1)


def weight_bytes(d: Decoder, dtype: str, four_bit: bool) -> int:
    """The frozen base. In 4 bits: the Linears but not the lm_head; embeddings, norms and biases stay in `dtype`."""
    sizes = [out * inputs for _, out, inputs in d.linears] if four_bit else []
    return (d.parameters - sum(sizes)) * DTYPES[dtype].itemsize + sum(map(nf4_bytes, sizes))


def adapter_tensors(d: Decoder, r: int, targets: list[str]) -> list[int]:
    """Numbers of values of every LoRA matrix, A then B; PEFT keeps them in float32."""
    return [n for _, out, inputs in adapted(d, targets) for n in (r * inputs, out * r)]


def optimizer_bytes(tensors: list[int], name: str) -> int:
    """Two moments per value: float32 (and a step count per tensor), or 8 bits with a float32 scale per 256 values.

    bitsandbytes keeps tensors of fewer than 4096 values in float32, and two tables of 256 values for all of them.
    """
    if name == "adamw":
        return sum(8 * n + 4 for n in tensors)
    return 2 * 4 * 256 + sum(8 * n if n < 4096 else 2 * n + 2 * 4 * math.ceil(n / 256) for n in tensors)


def cache_bytes(d: Decoder, rows: int, width: int, dtype: str) -> int:
    """Keys and values of `width` positions in `rows` rows of the cache."""
    return 2 * d.layers * rows * d.kv_heads * width * d.head_dim * DTYPES[dtype].itemsize


# ---------------------------------------------------------------------------------------------------- estimates


def layer_bytes(d: Decoder, rows: int, length: int, b: int, targets: list[str], r: int, padded: bool) -> int:
    """What one layer saves for its backward pass under SDPA, LoRA and a frozen base; b: bytes per value of the model.

    Per token, with the adapters A in float32, H hidden, I intermediate, D per head, h heads, k key-value heads:
      norms        2 · (4H + 4); with norms of q and k also 4 (h + k) (D + 1)
      LoRA         4 r |A|; inputs: b < 4: a float32 copy, 4 · inputs, for each of A; b = 4: 4H for q, k, v together
                   and 4H for gate, up together (the inputs of o and down are counted below)
      attention    b D (2h + 2k) + 4h; padded: keys and values are repeated, b D · 4h, and a mask of b · length
      MLP          3 b I: gate, its activation, up; b = 4: 4 I for their product, the input of down
    """
    names = {name.split(".")[-1] for name, _, _ in adapted(d, targets)}
    in_layer = [m for m in adapted(d, targets) if ".layers.0." in f".{m[0]}"]
    per_token = 2 * (4 * d.hidden + 4) + 4 * r * len(in_layer)
    if d.qk_norm:
        per_token += 4 * (d.heads + d.kv_heads) * (d.head_dim + 1)
    if b < 4:
        per_token += sum(4 * inputs for _, _, inputs in in_layer)
    else:
        per_token += (
            4 * d.hidden * (bool(names & {"q_proj", "k_proj", "v_proj"}) + bool(names & {"gate_proj", "up_proj"}))
        )
        per_token += 4 * d.intermediate * ("down_proj" in names)
    per_token += b * d.head_dim * (4 * d.heads if padded else 2 * d.heads + 2 * d.kv_heads) + 4 * d.heads
    per_token += b * length * padded + 3 * b * d.intermediate
    return per_token * rows * length


def saved_bytes(d: Decoder, rows: int, length: int, dtype: str, targets: list[str], r: int, checkpointing: bool) -> int:
    """What autograd holds between the forward and the backward pass of a micro-batch.

    Without checkpointing all layers (the first one's first norm needs no gradient), the rotary tables; with it the
    input of every layer. Both: the final norm's input, and the gradient of the hidden states that the loss has made.
    Rows of unequal length (more than one row) count as padded.
    """
    b, tokens = DTYPES[dtype].itemsize, rows * length
    ends = tokens * (4 * d.hidden + 4 + b * d.hidden)
    if checkpointing:
        return ends + d.layers * tokens * d.hidden * b
    rotary = 2 * b * length * d.head_dim
    layers = d.layers * layer_bytes(d, rows, length, b, targets, r, rows > 1)
    return ends + rotary + layers - tokens * (4 * d.hidden + 4)


def kernel_bytes(d: Decoder, tokens: int, dtype: str, on: torch.device) -> int:
    """The chunk of logits and of their gradient in kernels.linear_policy_loss, whose rule for its size is used."""
    b = DTYPES[dtype].itemsize
    chunk = min(tokens, chunk_rows(d.vocab, on)) * d.vocab
    upcast = 4 * min(UPCAST_ELEMENTS, d.vocab * d.hidden) if on.type == "cpu" and b < 4 else 0
    return chunk * (4 + (b if on.type == "cuda" else 4)) + upcast


def largest_linear(d: Decoder, args: Any) -> int:
    """Bytes of the largest weight, which a 4-bit layer unpacks whenever it is used."""
    return max(out * inputs for _, out, inputs in d.linears) * DTYPES[args.dtype].itemsize * args.load_in_4bit


def held(d: Decoder, args: Any, on: torch.device, trains: bool) -> Parts:
    """What is there in every phase: weights, adapters, optimizer states, a copy for sampling, the CUDA context."""
    tensors = adapter_tensors(d, args.lora_r, args.lora_target_modules)
    has_adapter = trains or Path(args.model_name_or_path, "adapter_config.json").is_file()
    parts = {"weights": weight_bytes(d, args.dtype, args.load_in_4bit), "adapter": 4 * sum(tensors) * has_adapter}
    if trains:
        reference = getattr(args, "beta", 0) > 0 or getattr(args, "indicator", "") == "reference"
        parts["reference adapter"] = 4 * sum(tensors) * reference
        parts["optimizer"] = optimizer_bytes(tensors, args.optimizer)
        copied = getattr(args, "rollout_dtype", "policy")
        parts["merged copy"] = 0 if copied == "policy" else weight_bytes(d, copied, False)
    parts["CUDA context"] = CONTEXT * (on.type == "cuda")
    return parts


def training(d: Decoder, args: Any, on: torch.device, rows: int, length: int) -> Parts:
    """Parts of the training phase at its peak: forward and backward of a micro-batch of `rows` × `length` tokens.

    On top of what autograd holds comes the larger of the loss's chunk of logits and the backward pass of a layer: with
    checkpointing what the layer saves again, and 8 I (b = 4) or 4 I + 8 H bytes per token for values under way.
    """
    b, tokens = DTYPES[args.dtype].itemsize, rows * length
    shape = (d, rows, length)
    model = (args.lora_target_modules, args.lora_r)
    layer = layer_bytes(*shape, b, *model, rows > 1) if args.gradient_checkpointing else 0
    layer += tokens * (8 * d.intermediate if b == 4 else 4 * d.intermediate + 8 * d.hidden) + largest_linear(d, args)
    kernel = kernel_bytes(d, tokens, args.dtype, on)
    return held(d, args, on, True) | {
        "gradients": 4 * sum(adapter_tensors(d, args.lora_r, args.lora_target_modules)),
        "activations": saved_bytes(*shape, args.dtype, *model, args.gradient_checkpointing),
        "kernel chunk" if kernel > layer else "layer under way": max(kernel, layer),
    }


def pass_bytes(d: Decoder, b: int, with_adapter: bool) -> int:
    """Values under way in a pass without gradients, per token: (2 b + 8) (I + H) with adapters, else 3 b (I + H)."""
    return (2 * b + 8 if with_adapter else 3 * b) * (d.intermediate + d.hidden)


def rollout(d: Decoder, args: Any, on: torch.device, rows: int, prompt: int, trains: bool) -> Parts:
    """Parts of the rollout phase at its peak, `rows` trajectories at once, with all tokens that the flags allow.

    `--engine hf` prefills all rows again at the last turn, with repeated keys and values of a layer and a mask;
    `--engine fast` has passes of at most PASS tokens, the attention scores of one row's PIECE (2b + 4 bytes each) and
    a cache whose width doubles. Sampling takes 40 bytes per row and vocabulary entry: logits, scores, noise in int64.
    """
    b, width = DTYPES[args.dtype].itemsize, prompt + args.max_completion_length
    parts = held(d, args, on, trains)
    per_token = pass_bytes(d, b, parts["adapter"] > 0)
    if args.engine == "fast":
        rows, full = round_up(rows, ROWS), round_up(prompt, WIDTH)
        while full < width:
            full *= 2
        forward = min(PASS, rows * round_up(prompt, ROWS)) * per_token + PIECE * d.heads * width * (2 * b + 4)
        cache = cache_bytes(d, rows, full, args.dtype)
    else:
        repeated = 2 * d.heads * d.head_dim * b * rows * width * (d.heads > d.kv_heads)
        forward = rows * width * per_token + repeated + rows * width * width * (1 + b)
        cache = cache_bytes(d, rows, width, args.dtype)
    parts["KV cache"] = cache
    return parts | {"forward pass": max(forward, 40 * rows * d.vocab) + largest_linear(d, args)}
