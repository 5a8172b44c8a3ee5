"""Model side of training: a (4-bit) base with LoRA, batches, and per-token statistics through the fused kernels.

One time convention, applied in one place (`_targets`): index t of every (B, T) array describes token t, which is
predicted from the hidden state at t − 1. Only tokens with loss_mask 1 reach the lm_head, and the (N, V) logits are
never whole in memory (kernels/).
"""

import contextlib
import json
import logging
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Literal, NamedTuple

import torch

logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # else it warns that the hub package `kernels` is not ours
from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict  # noqa: E402
from safetensors.torch import load_file
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    get_scheduler,
)

import kernels
from core.args import arg, check_numbers, require_positive
from core.trajectory import DataError, Trajectory
from kernels.checks import check_lm_head

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "vocab.json")
OptimizerName = Literal["adamw", "adamw_8bit"]
ScheduleName = Literal["constant", "constant_with_warmup", "linear", "cosine", "polynomial", "inverse_sqrt"]
REFERENCE = "reference"  # name of the frozen copy of the starting adapter


@dataclass
class ModelArgs:
    """Flags of the base model and its adapter, named as in TRL."""

    model_name_or_path: str = arg("", "base model, or a folder with a LoRA adapter to go on from (required)")
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = arg(
        "auto", "auto: bfloat16 on a GPU, float32 on a CPU (recorded in config.json)"
    )
    load_in_4bit: bool = arg(False, "quantise the base to 4-bit NF4 (bitsandbytes)")
    attn_implementation: str = arg("sdpa", "attention of transformers: sdpa, eager, flash_attention_2, …")
    trust_remote_code: bool = arg(False, "allow code that comes with the model")
    date: str = arg("", "day that chat templates print, YYYY-MM-DD; default: the day on which the run was started")
    lora_r: int = arg(16, "LoRA rank")
    lora_alpha: int = arg(32, "LoRA scale is alpha / rank")
    lora_target_modules: list[str] = arg(["all-linear"], "modules that get an adapter; never the lm_head")

    def __post_init__(self):
        if not self.model_name_or_path:
            raise ValueError("--model_name_or_path is required")
        self.model_name_or_path = adapter_of(self.model_name_or_path)
        if self.dtype == "auto":  # resolved here: transformers would stumble over "auto" beside an adapter's files
            self.dtype = "bfloat16" if torch.cuda.is_available() else "float32"  # device() would take GPU 0 for all
        try:
            self.date = str(date.fromisoformat(self.date)) if self.date else ""
        except ValueError:
            raise ValueError(f"--date {self.date} is not a day as YYYY-MM-DD") from None
        check_numbers(self)
        require_positive(self, "lora_r", "lora_alpha")
        if "lm_head" in self.lora_target_modules:
            raise ValueError("--lora_target_modules lm_head: the lm_head stays frozen, the fused kernels need it")


def device() -> torch.device:
    """This process's GPU if there is one, else the CPU."""
    return torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")


def schedule(
    optimizer: torch.optim.Optimizer, name: ScheduleName, warmup_ratio: float, steps: int
) -> torch.optim.lr_scheduler.LRScheduler:
    """A transformers schedule by name over `steps` optimizer steps."""
    return get_scheduler(name, optimizer, int(warmup_ratio * steps), steps)


def adamw(model: torch.nn.Module, name: OptimizerName, lr: float) -> torch.optim.Optimizer:
    """AdamW over the trained parameters; adamw_8bit keeps its two moments in 8 bits per value, block by block."""
    trained = [p for p in model.parameters() if p.requires_grad]
    if name == "adamw":
        return torch.optim.AdamW(trained, lr=lr, weight_decay=0.0)
    from bitsandbytes.optim import AdamW8bit

    return AdamW8bit(trained, lr=lr, weight_decay=0.0)


def adapter_of(path: str) -> str:
    """The adapter folder that a curriculum ended with, where `path` is the curriculum's folder; else `path`."""
    result = Path(path) / "result.json"
    return json.loads(result.read_text()).get("adapter", path) if result.is_file() else path


def load_tokenizer(path: str, trust_remote_code: bool = False, date: str = "") -> PreTrainedTokenizerBase:
    """Tokenizer of a model folder, hub id or adapter folder; DataError if there is none or it has no chat template.

    Its attribute `date` is the day that the template prints (conversation.render), "" = today.
    """
    if not Path(path).exists() and (len(Path(path).parts) != 2 or Path(path).parent.is_dir()):
        raise DataError(f"--model_name_or_path {path}: no such folder, and no name on the hub (owner/model)")
    if Path(path).is_dir() and not any(Path(path, name).is_file() for name in TOKENIZER_FILES):
        raise DataError(f"--model_name_or_path {path}: no usable tokenizer: the folder holds none of {TOKENIZER_FILES}")
    try:
        tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=trust_remote_code)
    except Exception as e:  # transformers raises a different class for each way in which a folder can be incomplete
        raise DataError(f"--model_name_or_path {path}: no usable tokenizer: {_first_line(e)}") from None
    if not tokenizer.chat_template:
        raise DataError(f"--model_name_or_path {path}: the tokenizer has no chat template")
    if tokenizer.eos_token_id is None:
        raise DataError(f"--model_name_or_path {path}: the tokenizer has no eos token")
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token  # only fills rectangles: every mask is built from lengths
    tokenizer.clean_up_tokenization_spaces = False  # it would drop spaces: the text would not be that of the ids
    tokenizer.date = date
    return tokenizer


def load_base(args: ModelArgs, path: str) -> PreTrainedModel:
    """Frozen base in the requested precision on the first device; DataError if the folder is no model."""
    dtype, options = DTYPES[args.dtype], {}
    if args.load_in_4bit:
        from transformers import BitsAndBytesConfig

        options["quantization_config"] = BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=dtype, bnb_4bit_use_double_quant=True
        )
    try:
        base = AutoModelForCausalLM.from_pretrained(
            path,
            dtype=dtype,
            attn_implementation=args.attn_implementation,
            trust_remote_code=args.trust_remote_code,
            device_map={"": device()} if device().type == "cuda" else None,
            **options,
        )
    except (OSError, ValueError) as e:
        raise DataError(f"--model_name_or_path {path}: {_first_line(e)}") from None
    keep_cpu_weights_as_loaded(base)  # a checkpoint may be 4-bit without the flag
    base.requires_grad_(False)
    _check_head(base, path)
    check_scores(base, path)
    own = base.generation_config  # keep what ends a turn; how to sample is for the flags of rollout.py alone
    base.generation_config = GenerationConfig(eos_token_id=own.eos_token_id, pad_token_id=own.pad_token_id)
    return base


def _check_head(model: torch.nn.Module, path: str) -> None:
    head = model.get_output_embeddings()
    if head is None:
        raise DataError(f"--model_name_or_path {path}: {type(causal_lm(model)).__name__} has no lm_head")
    try:
        check_lm_head(head, causal_lm(model).config)
    except ValueError as e:
        raise DataError(f"--model_name_or_path {path}: {e}") from None


@torch.no_grad()
def check_scores(base: PreTrainedModel, path: str) -> None:
    """DataError unless `token_stats` scores 16 random ids of a base as its own logits do, up to rounding of these.

    Finds whatever stands between the last hidden state and the softmax (a cap, a scale, a bias, a layer), by any name.
    """
    generator = torch.Generator().manual_seed(0)
    rows = min(base.get_input_embeddings().num_embeddings, len(head_weight(base)))
    ids = torch.randint(rows, (1, 16), generator=generator).to(base.device)
    ones = torch.ones_like(ids)
    try:
        scored = token_stats(base, Batch(ids, ones, ones.cumsum(dim=1) > 1))[0][:, 1:]  # (1, 15)
    except ValueError as e:
        raise DataError(f"--model_name_or_path {path}: {e}") from None
    logits = base(input_ids=ids, attention_mask=ones, use_cache=False).logits[:, :-1]  # (1, 15, V)
    own = logits.float().log_softmax(-1).gather(2, ids[:, 1:, None])[..., 0]
    gap = (scored - own).abs().max().item()
    rounding = max(torch.finfo(logits.dtype).eps, 2**-11)  # TensorFloat-32, which a GPU may use for float32
    if not gap <= 1e-3 + rounding * logits.abs().max().item():
        raise DataError(
            f"--model_name_or_path {path}: {type(base).__name__} gives tokens log-probs that differ by up to {gap:.3g} "
            "nats from softmax(hidden @ lm_head.weight.T), which is what is trained here"
        )


def keep_cpu_weights_as_loaded(base: torch.nn.Module) -> None:
    """Stop bitsandbytes from repacking 4-bit weights on a CPU with AVX512-BF16.

    The first no-grad forward in eval mode repacks every Linear4bit for good: logits then differ from the training
    path by 0.01, and without a bias the gradient through the base weight is silently missing.
    """
    for module in base.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False


def load_policy(args: ModelArgs, trainable: bool = True) -> tuple[torch.nn.Module, PreTrainedTokenizerBase]:
    """(model, tokenizer). A model folder gets a fresh adapter if `trainable`; an adapter folder goes on from its own.

    The fresh adapter is zero (B = 0), so the policy starts as the base. Dropout of an adapter from elsewhere is off:
    it would make the first ratio differ from 1. DataError for what cannot be trained here.
    """
    path = args.model_name_or_path
    if trainable and args.dtype == "float16":
        raise DataError("--dtype float16: gradients underflow in it without loss scaling; train in bfloat16 or float32")
    tokenizer = load_tokenizer(path, args.trust_remote_code, args.date)
    if (Path(path) / "adapter_config.json").is_file():
        config = LoraConfig.from_pretrained(path)
        if trainable:
            check_adapter(config, args)
        config.lora_dropout = 0.0
        base = load_base(args, config.base_model_name_or_path)
        give_pad_a_row(tokenizer, base, path)
        model = PeftModel.from_pretrained(base, path, is_trainable=trainable, config=config)
        _check_head(model, path)
        return model, tokenizer
    base = load_base(args, path)
    give_pad_a_row(tokenizer, base, path)
    if not trainable:
        return base, tokenizer
    return with_adapter(base, args), tokenizer


def give_pad_a_row(tokenizer: PreTrainedTokenizerBase, base: PreTrainedModel, path: str) -> None:
    """Pad with eos where the embedding has no row for the tokenizer's own pad; DataError if it has none for eos."""
    rows = base.get_input_embeddings().num_embeddings
    if tokenizer.eos_token_id >= rows:
        eos = f"eos {tokenizer.eos_token} (id {tokenizer.eos_token_id})"
        raise DataError(f"--model_name_or_path {path}: the model's embedding has {rows} rows, none for the {eos}")
    if tokenizer.pad_token_id >= rows:
        tokenizer.pad_token = tokenizer.eos_token


def check_adapter(config: LoraConfig, args: ModelArgs) -> None:
    """DataError if an adapter is of a kind that is not trained here, or if flags ask for another one than it is."""
    path = args.model_name_or_path
    for name, plain in (("use_dora", False), ("bias", "none"), ("modules_to_save", None)):
        if getattr(config, name) not in (plain, []):
            kind = f"{name} {getattr(config, name)}"
            raise DataError(f"--model_name_or_path {path}: adapters with {kind} are not trained here")
    for flag, own in (("r", config.r), ("alpha", config.lora_alpha)):
        given = getattr(args, f"lora_{flag}")
        if given not in (own, getattr(ModelArgs, f"lora_{flag}")):
            raise DataError(f"--lora_{flag} {given}: the adapter in {path} goes on with its own, {own}")
    own, given = config.target_modules, args.lora_target_modules
    if given != ["all-linear"] and set(given) != set(own):
        raise DataError(f"--lora_target_modules {' '.join(given)}: the adapter in {path} goes on with its own, {own}")


def with_adapter(base: PreTrainedModel, args: ModelArgs) -> PeftModel:
    """The frozen base with a fresh adapter."""
    targets = args.lora_target_modules
    config = LoraConfig(
        r=args.lora_r,
        lora_alpha=args.lora_alpha,
        lora_dropout=0.0,  # dropout would make the first ratio differ from 1
        target_modules="all-linear" if targets == ["all-linear"] else targets,
        task_type="CAUSAL_LM",
    )
    return get_peft_model(base, config)


def save_adapter(model: PeftModel, tokenizer: PreTrainedTokenizerBase, directory: Path) -> None:
    """Write adapter_model.safetensors, adapter_config.json and the tokenizer (PEFT's layout)."""
    model.save_pretrained(directory, selected_adapters=["default"], save_embedding_layers=False)
    tokenizer.save_pretrained(directory)


def load_adapter(model: PeftModel, directory: Path) -> None:
    """Put saved adapter weights into the trained adapter, bit by bit."""
    set_peft_model_state_dict(model, load_file(directory / "adapter_model.safetensors"), "default")


def add_reference(model: PeftModel) -> None:
    """Freeze a copy of the current adapter as the KL reference ("adapter off" would be the base, not the start)."""
    model.add_adapter(REFERENCE, model.peft_config["default"])
    set_peft_model_state_dict(model, get_peft_model_state_dict(model, adapter_name="default"), REFERENCE)
    model.set_adapter("default")


@contextlib.contextmanager
def use_reference(model: PeftModel) -> Iterator[None]:
    """Inside: the reference adapter is active and gradients are off. Enter before any graph of the step exists."""
    model.set_adapter(REFERENCE, inference_mode=True)
    try:
        with torch.no_grad():
            yield
    finally:
        model.set_adapter("default")


@contextlib.contextmanager
def sampling_mode(model: torch.nn.Module) -> Iterator[None]:
    """Inside: eval mode and no gradient checkpointing, which would switch the KV cache of generate off."""
    was_training = model.training
    checkpointing = [m for m in model.modules() if getattr(m, "gradient_checkpointing", False)]
    model.eval()
    for module in checkpointing:  # transformers' own way to switch it on again would add a hook to the model each time
        module.gradient_checkpointing = False
    try:
        yield
    finally:
        for module in checkpointing:
            module.gradient_checkpointing = True
        model.train(was_training)


def enable_checkpointing(model: torch.nn.Module) -> None:
    """Recompute activations in the backward pass; without reentry, so that inputs need no gradient."""
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})


def packed(trajectories: list[Trajectory], size: int, max_tokens: int) -> Iterator[list[Trajectory]]:
    """Cut trajectories, shortest first, into micro-batches of `size` or, if `max_tokens` > 0, of so many tokens.

    The budget counts padding: rows × longest row ≤ max_tokens, except that a single row may be longer.
    """
    rows: list[Trajectory] = []
    for t in sorted(trajectories, key=lambda t: len(t.token_ids)):
        full = (len(rows) + 1) * len(t.token_ids) > max_tokens if max_tokens else len(rows) == size
        if rows and full:
            yield rows
            rows = []
        rows.append(t)
    if rows:
        yield rows


class Batch(NamedTuple):
    """Right-padded trajectories; masks are built from lengths, never from token identity."""

    input_ids: Tensor  # (B, T) int64
    attention_mask: Tensor  # (B, T) int64, 1 on real tokens
    loss_mask: Tensor  # (B, T) bool, True on tokens trained on


def collate(trajectories: list[Trajectory], pad_id: int, on: torch.device) -> Batch:
    """Pad a list of trajectories to its longest. ValueError if it is empty."""
    if not trajectories:
        raise ValueError("collate needs at least one trajectory")
    T = max(len(t.token_ids) for t in trajectories)
    ids = torch.full((len(trajectories), T), pad_id)
    attention, loss = torch.zeros_like(ids), torch.zeros_like(ids, dtype=torch.bool)
    for row, t in enumerate(trajectories):
        n = len(t.token_ids)
        ids[row, :n] = torch.tensor(t.token_ids)
        attention[row, :n] = 1
        loss[row, :n] = torch.tensor(t.loss_mask, dtype=torch.bool)
    return Batch(ids.to(on), attention.to(on), loss.to(on))


def causal_lm(model: torch.nn.Module) -> PreTrainedModel:
    """The transformers model inside an optional PEFT wrapper (adapters stay in place)."""
    return model.get_base_model() if isinstance(model, PeftModel) else model


def head_weight(model: torch.nn.Module) -> Tensor:
    """(V, H) frozen lm_head weight."""
    return causal_lm(model).get_output_embeddings().weight


def hidden_of_targets(model: torch.nn.Module, batch: Batch) -> tuple[Tensor, Tensor]:
    """Hidden states that predict the trained tokens, and those tokens: (N, H), (N,), N = loss_mask.sum().

    N runs over the batch row by row, as in `batch.loss_mask.nonzero()`.
    """
    decoder = causal_lm(model).base_model
    out = decoder(input_ids=batch.input_ids, attention_mask=batch.attention_mask, use_cache=False)
    hidden = out.last_hidden_state  # (B, T, H)
    return hidden[:, :-1][batch.loss_mask[:, 1:]], batch.input_ids[batch.loss_mask]


def token_stats(model: torch.nn.Module, batch: Batch, temperature: float = 1.0) -> tuple[Tensor, Tensor]:
    """(logp, entropy), each (B, T) fp32 in nats at `temperature`; index t describes token t, 0 where loss_mask is 0.

    Differentiable in both. token 0 has no prediction and must not be trained on.
    """
    hidden, targets = hidden_of_targets(model, batch)
    logp, entropy = kernels.linear_logprob_entropy(hidden, head_weight(model), targets, temperature)
    empty = torch.zeros(batch.loss_mask.shape, dtype=logp.dtype, device=logp.device)
    return empty.masked_scatter(batch.loss_mask, logp), empty.masked_scatter(batch.loss_mask, entropy)


def keep_values(rows: list[Trajectory], name: str, values: Tensor) -> None:
    """Write (B, T) values into a per-token field of the trajectories, without the padding."""
    for t, row in zip(rows, values.tolist()):
        setattr(t, name, row[: len(t.token_ids)])


@torch.no_grad()
def token_entropies(
    trajectories: list[Trajectory], model: torch.nn.Module, pad_id: int, batch_size: int
) -> list[list[float]]:
    """Entropy of every token in nats, (T,) each: as stored (at its run's temperature), else by a pass at T = 1."""
    found = {id(t): t.entropy for t in trajectories if t.entropy is not None}
    on = next(model.parameters()).device
    for rows in packed([t for t in trajectories if t.entropy is None], batch_size, 0):
        _, entropy = token_stats(model, collate(rows, pad_id, on))  # (B, T)
        found |= {id(t): values[: len(t.token_ids)] for t, values in zip(rows, entropy.tolist())}
    return [found[id(t)] for t in trajectories]


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
