"""How much memory a run needs, part by part, worked out from the model's config before any weights are loaded.

The model is built on the meta device, where its parameters and Linears can be counted without storage. Weights,
adapter, optimizer states and KV cache are exact. Activations are estimated by the formulas below for layers like
Llama's (RMSNorm, grouped attention by SDPA, gated MLP). Not counted: what the allocator loses to fragmentation, and
the cuBLAS workspace. `bench/plan.py` makes a `Setup` of a script's flags and prints the parts.
"""

import json
import math
import re
from pathlib import Path
from typing import NamedTuple

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig, Qwen2Config, Qwen3Config

from core.model import DTYPES
from core.trajectory import DataError
from engines.fast import PASS, PIECE, ROWS
from engines.slot_cache import WIDTH, round_up
from kernels.checks import check_lm_head
from kernels.linear_logprob_entropy import UPCAST_ELEMENTS, chunk_rows

CONTEXT = 2**29  # bytes that CUDA itself takes: an allowance, not a measurement
SIZES = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
ARCHITECTURES = {  # published config.json files: SIZES, key-value heads, vocabulary, whether the lm_head is tied
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
LIKE_LLAMA = ("qwen2", "qwen3", "llama", "mistral")  # types whose activations the formulas are made for
SAME_INPUT = {"k_proj": "q_proj", "v_proj": "q_proj", "up_proj": "gate_proj"}  # -> a Linear that reads the same
Parts = dict[str, int]  # what -> bytes


class Decoder(NamedTuple):
    """Sizes that memory depends on. `linears`: (name, outputs, inputs) of every Linear but the lm_head."""

    kind: str  # model_type
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


class Setup(NamedTuple):
    """What a run keeps in memory and how it computes: all of its flags that memory depends on."""

    on: torch.device
    dtype: str  # of the base: a key of DTYPES
    four_bit: bool  # Linears in NF4
    lora_r: int
    targets: list[str] | str  # target_modules as PEFT takes them
    has_adapter: bool  # there is one before training: the model is an adapter folder
    optimizer: str = ""  # adamw, adamw_8bit; "" = nothing is trained
    checkpointing: bool = False
    reference: bool = False  # a frozen copy of the adapter
    sampling_copy: str = ""  # dtype of a merged copy that samples; "" = the policy samples itself
    engine: str = ""  # hf, fast; "" = nothing is sampled here
    prompt: int = 0  # tokens of the longest prompt
    completion: int = 0  # tokens of the longest response


def read_config(path: str) -> PretrainedConfig:
    """The model's config: of a folder (or the base of an adapter folder), of the table above, or of the hub's cache.

    DataError if it is in none of them; nothing is downloaded.
    """
    adapter = Path(path, "adapter_config.json")
    if adapter.is_file():
        path = json.loads(adapter.read_text())["base_model_name_or_path"]
    name = path.rstrip("/").split("/")[-1].removesuffix("-Instruct").removesuffix("-Base")
    if not Path(path).is_dir() and name in ARCHITECTURES:
        cls, (*sizes, kv_heads), vocab, tied = ARCHITECTURES[name]
        more = {"head_dim": 128} if cls is Qwen3Config else {}
        more |= dict(num_key_value_heads=kv_heads, vocab_size=vocab, tie_word_embeddings=tied)
        return cls(**dict(zip(SIZES, sizes)), **more)
    try:
        return AutoConfig.from_pretrained(path, local_files_only=True)
    except (OSError, ValueError):
        raise DataError(
            f"--model_name_or_path {path}: no config.json there, and none of {', '.join(ARCHITECTURES)}: no plan"
        ) from None


def decoder_of(config: PretrainedConfig) -> Decoder:
    """Count the model on the meta device. DataError if it is no causal LM, if the formulas lack a size of it, or if
    the kernels do not compute its lm_head."""
    text = config.get_text_config()
    if missing := [name for name in SIZES if getattr(text, name, None) is None]:
        raise DataError(f"model_type {config.model_type!r}: its config has no {missing[0]}: no plan")
    try:
        with torch.device("meta"):
            lm = AutoModelForCausalLM.from_config(config).requires_grad_(False)
        head = lm.get_output_embeddings()
        check_lm_head(head, config)
    except ValueError as e:
        raise DataError(f"model_type {config.model_type!r}: {str(e).splitlines()[0]}: no plan") from None
    hidden, intermediate, layers, heads = (getattr(text, name) for name in SIZES)
    modules = list(lm.named_modules())
    return Decoder(
        config.model_type,
        hidden,
        intermediate,
        layers,
        heads,
        getattr(text, "num_key_value_heads", None) or heads,
        getattr(text, "head_dim", None) or hidden // heads,
        text.vocab_size,
        any(name.endswith("q_norm") for name, _ in modules),
        sum(p.numel() for p in lm.parameters()),
        [(n, m.out_features, m.in_features) for n, m in modules if isinstance(m, torch.nn.Linear) and m is not head],
    )


def adapted(d: Decoder, targets: list[str] | str) -> list[tuple[str, int, int]]:
    """The Linears that get an adapter, by PEFT's rules: `all-linear`, a pattern, or names that end with a target."""
    if isinstance(targets, str):
        found = [m for m in d.linears if re.fullmatch(targets, m[0])]
    else:
        ends = tuple(f".{target}" for target in targets)
        found = [m for m in d.linears if targets == ["all-linear"] or f".{m[0]}".endswith(ends)]
    if not found:
        raise DataError(f"--lora_target_modules {targets}: the model ({d.kind}) has no such Linear")
    return found


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


def adapter_tensors(d: Decoder, s: Setup) -> list[int]:
    """Numbers of values of every LoRA matrix, A then B; PEFT keeps them in float32."""
    return [n for _, out, inputs in adapted(d, s.targets) for n in (s.lora_r * inputs, out * s.lora_r)]


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


def layer_bytes(d: Decoder, s: Setup, rows: int, length: int) -> int:
    """What one layer saves for its backward pass under SDPA, LoRA and a frozen base.

    Per token, with b bytes per value of the model and the adapters A in float32, H hidden, I intermediate, D per head,
    h heads, k key-value heads; rows of unequal length (more than one row) count as padded:
      norms        2 · (4H + 4); with norms of q and k also 4 (h + k) (D + 1)
      LoRA         4 r |A|; b < 4: a float32 copy of its input, 4 · inputs, for each of A; b = 4: 4 · inputs once for
                   Linears that read the same tensor, none for o (its input is counted under attention)
      attention    b D (2h + 2k) + 4h; padded: keys and values are repeated, b D · 4h, and a mask of b · length
      MLP          3 b I: gate, its activation, up
    """
    b, padded, linears = DTYPES[s.dtype].itemsize, rows > 1, adapted(d, s.targets)
    per_token = 2 * (4 * d.hidden + 4) + 4 * s.lora_r * len(linears) // d.layers
    if d.qk_norm:
        per_token += 4 * (d.heads + d.kv_heads) * (d.head_dim + 1)
    if b < 4:
        per_token += 4 * sum(inputs for _, _, inputs in linears) // d.layers
    else:
        names = [(name.split(".")[-1], inputs) for name, _, inputs in linears]
        read = {SAME_INPUT.get(name, name): inputs for name, inputs in names if name != "o_proj"}
        per_token += 4 * sum(read.values())
    per_token += b * d.head_dim * (4 * d.heads if padded else 2 * d.heads + 2 * d.kv_heads) + 4 * d.heads
    per_token += b * length * padded + 3 * b * d.intermediate
    return per_token * rows * length


def saved_bytes(d: Decoder, s: Setup, rows: int, length: int) -> int:
    """What autograd holds between the forward and the backward pass of a micro-batch.

    Without checkpointing all layers (the first one's first norm needs no gradient), the rotary tables; with it the
    input of every layer. Both: the final norm's input, and the gradient of the hidden states that the loss has made.
    """
    b, tokens = DTYPES[s.dtype].itemsize, rows * length
    ends = tokens * (4 * d.hidden + 4 + b * d.hidden)
    if s.checkpointing:
        return ends + d.layers * tokens * d.hidden * b
    rotary = 2 * b * length * d.head_dim
    return ends + rotary + d.layers * layer_bytes(d, s, rows, length) - tokens * (4 * d.hidden + 4)


def kernel_bytes(d: Decoder, s: Setup, tokens: int) -> int:
    """The chunk of logits and of their gradient in kernels.linear_policy_loss, whose rule for its size is used."""
    b, cuda = DTYPES[s.dtype].itemsize, s.on.type == "cuda"
    chunk = min(tokens, chunk_rows(d.vocab, s.on)) * d.vocab
    upcast = 0 if cuda or b == 4 else 4 * min(UPCAST_ELEMENTS, d.vocab * d.hidden)
    return chunk * (4 + (b if cuda else 4)) + upcast


def unpacked_bytes(d: Decoder, s: Setup) -> int:
    """The largest weight, which a 4-bit layer unpacks whenever it is used."""
    return max(out * inputs for _, out, inputs in d.linears) * DTYPES[s.dtype].itemsize if s.four_bit else 0


def held(d: Decoder, s: Setup) -> Parts:
    """What is there in every phase: weights, adapters, optimizer states, a copy for sampling, the CUDA context."""
    parts = {"weights": weight_bytes(d, s.dtype, s.four_bit)}
    if s.has_adapter or s.optimizer:
        tensors = adapter_tensors(d, s)
        parts["adapter"] = 4 * sum(tensors)
        if s.reference:
            parts["reference adapter"] = parts["adapter"]
        if s.optimizer:
            parts["optimizer"] = optimizer_bytes(tensors, s.optimizer)
    if s.sampling_copy:
        parts["merged copy"] = weight_bytes(d, s.sampling_copy, False)
    if s.on.type == "cuda":
        parts["CUDA context"] = CONTEXT
    return parts


def training(d: Decoder, s: Setup, rows: int, length: int) -> Parts:
    """Parts of the training phase at its peak: forward and backward of a micro-batch of `rows` × `length` tokens.

    On top of what autograd holds comes the larger of the loss's chunk of logits and the backward pass of a layer: with
    checkpointing what the layer saves again, and 8 I (b = 4) or 4 I + 8 H bytes per token for values under way.
    """
    tokens = rows * length
    layer = layer_bytes(d, s, rows, length) if s.checkpointing else 0
    layer += tokens * (8 * d.intermediate if s.dtype == "float32" else 4 * d.intermediate + 8 * d.hidden)
    layer += unpacked_bytes(d, s)
    kernel = kernel_bytes(d, s, tokens)
    return held(d, s) | {
        "gradients": 4 * sum(adapter_tensors(d, s)),
        "activations": saved_bytes(d, s, rows, length),
        "kernel chunk" if kernel > layer else "layer under way": max(kernel, layer),
    }


def pass_bytes(d: Decoder, b: int, with_adapter: bool) -> int:
    """Values under way in a pass without gradients, per token: (2 b + 8) (I + H) with adapters, else 3 b (I + H)."""
    return (2 * b + 8 if with_adapter else 3 * b) * (d.intermediate + d.hidden)


def rollout(d: Decoder, s: Setup, rows: int) -> Parts:
    """Parts of the rollout phase at its peak, `rows` trajectories at once, with all tokens that the flags allow.

    `--engine hf` prefills all rows again at the last turn, with repeated keys and values of a layer and a mask;
    `--engine fast` has passes of at most PASS tokens, the attention scores of one row's PIECE (2b + 4 bytes each) and
    a cache whose width doubles. Sampling takes 40 bytes per row and vocabulary entry: logits, scores, noise in int64.
    """
    parts, width = held(d, s), s.prompt + s.completion
    dtype = s.sampling_copy or s.dtype
    b = DTYPES[dtype].itemsize
    per_token = pass_bytes(d, b, "adapter" in parts and not s.sampling_copy)
    if s.engine == "fast":
        rows, full = round_up(rows, ROWS), round_up(s.prompt, WIDTH)
        while full < width:
            full *= 2
        forward = min(PASS, rows * round_up(s.prompt, ROWS)) * per_token + PIECE * d.heads * width * (2 * b + 4)
        parts["KV cache"] = cache_bytes(d, rows, full, dtype)
    else:
        repeated = 2 * d.heads * d.head_dim * b * rows * width if d.heads > d.kv_heads else 0
        forward = rows * width * per_token + repeated + rows * width * width * (1 + b)
        parts["KV cache"] = cache_bytes(d, rows, width, dtype)
    parts["forward pass"] = max(forward, 40 * rows * d.vocab) + (0 if s.sampling_copy else unpacked_bytes(d, s))
    return parts
