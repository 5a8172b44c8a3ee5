"""Pre-trains the base model of the calibration world from scratch and writes it as a Hugging Face folder.

A small Qwen3-architecture model learns the demonstrations of data/world/text.py: loss on model-written tokens only, examples
packed into rows, Muon for the matrices and AdamW for the rest. Step s draws its text from (facts seed, s), so a killed
run resumes exactly; the same machine kind, versions and thread count give the same weights.
"""

import json
import random
import time
from pathlib import Path
from typing import NamedTuple

import torch
from tqdm import tqdm
from transformers import GenerationConfig, PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

from core.trajectory import DataError, read_lines
from data.world.facts import RATES, STYLE, Fact, World
from data.world.text import MIX, Demonstration, demonstrate
from data.world.tokenizer import build_tokenizer

ROW = 160  # tokens of a packed row; longer examples get a row of their own length
MUON_LR, ADAM_LR, WEIGHT_DECAY = 0.015, 0.03, 0.01  # AdamW: embeddings and norms
INIT_STD = 0.06
FINAL_WEIGHT = 4.0  # of a token of the final answer or call: few tokens, and all of the arithmetic is in them
WARMUP = 50  # steps; from there the learning rates fall linearly to zero
LOG_EVERY, SAVE_EVERY = 50, 200


def pretrain(output: Path, preset: str, thoughts: str, steps: int | None = None, threads: int = 2) -> None:
    """Train, or resume training, and write model, tokenizer and world.json to `output`.

    A finished folder of the same settings is left alone; DataError if it holds a run with other settings.
    """
    world, tokenizer = World(preset), build_tokenizer()
    steps = steps or world.size["steps"]
    device = "cuda" if torch.cuda.is_available() else "cpu"
    command = f"python -m data.world --pretrain --preset {preset} --thoughts {thoughts} --steps {steps}"
    command += f" --threads {threads} --output DIR"
    config = {"preset": preset, "thoughts": thoughts, "steps": steps, "facts_seed": world.seed, "size": world.size,
              "mix": MIX, "rates": RATES, "style": STYLE, "torch": torch.__version__, "device": device,
              "threads": threads, "command": command}  # fmt: skip
    if _finished(output, config):
        print(f"{output} already holds this base model")
        return
    torch.set_num_threads(threads)
    torch.manual_seed(world.seed)
    model = build_model(world, len(tokenizer)).to(device)
    optimizers = _optimizers(model)
    checkpoint, step, minutes = output / "pretrain.pt", 0, 0.0
    if checkpoint.exists():
        state = torch.load(checkpoint, map_location=device)
        model.load_state_dict(state["model"])
        for optimizer, saved in zip(optimizers, state["optimizers"]):
            optimizer.load_state_dict(saved)
        step, minutes = state["step"], state["minutes"]
    exposures = exposure_plan(world, steps)
    started, seen, losses = time.monotonic() - 60 * minutes, Accuracy(), []
    log = [line for line in _read_log(output) if line["step"] <= step]
    progress = tqdm(total=steps, initial=step, desc=f"pre-training {preset}", unit="step")
    while step < steps:
        examples = [encode(tokenizer, d) for d in step_text(world, step, exposures, thoughts)]
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = group["initial_lr"] * _schedule(step, steps)
        losses.append(_train_step(model, optimizers, examples, seen))
        step += 1
        progress.update()
        if step % LOG_EVERY == 0 or step == steps:
            loss, losses = sum(losses) / len(losses), []
            log.append({"step": step, "loss": round(loss, 4), "minutes": round((time.monotonic() - started) / 60, 2),
                        "accuracy": seen.take()})  # fmt: skip
            shares = " ".join(f"{family[:7]} {share:.2f}" for family, share in log[-1]["accuracy"].items())
            progress.set_postfix_str(f"loss {loss:.3f} {shares}")
        if step % SAVE_EVERY == 0 and step < steps:
            minutes = (time.monotonic() - started) / 60
            state = {"model": model.state_dict(), "optimizers": [o.state_dict() for o in optimizers], "step": step,
                     "minutes": minutes}  # fmt: skip
            torch.save(state, checkpoint.with_suffix(".tmp"))
            checkpoint.with_suffix(".tmp").replace(checkpoint)
            _write_log(output, log)
    progress.close()
    _write_log(output, log)
    model.cpu().save_pretrained(output)
    tokenizer.save_pretrained(output)
    checkpoint.unlink(missing_ok=True)


def build_model(world: World, vocab_size: int) -> Qwen3ForCausalLM:
    """A randomly initialised model of the preset's size: embeddings tied, branches silent at the start.

    Qwen3 rather than Qwen2: its normalised queries and keys learn to copy sooner, and for the model type qwen2
    AutoTokenizer of transformers 5 silently puts Qwen's own splitting in place of the folder's tokenizer.
    """
    size, tokenizer = world.size, build_tokenizer()
    config = Qwen3Config(
        vocab_size=vocab_size, hidden_size=size["hidden"], intermediate_size=size["intermediate"],
        num_hidden_layers=size["layers"], num_attention_heads=size["heads"], num_key_value_heads=size["heads"],
        head_dim=size["hidden"] // size["heads"], max_position_embeddings=2048, tie_word_embeddings=True,
        pad_token_id=tokenizer.pad_token_id, eos_token_id=tokenizer.eos_token_id, bos_token_id=None,
    )  # fmt: skip
    model = Qwen3ForCausalLM(config)
    for name, p in model.named_parameters():
        if name.endswith(("o_proj.weight", "down_proj.weight")):
            torch.nn.init.zeros_(p)
        elif p.ndim == 2:
            torch.nn.init.normal_(p, std=INIT_STD)
    model.generation_config = GenerationConfig(
        do_sample=True, pad_token_id=tokenizer.pad_token_id, eos_token_id=tokenizer.eos_token_id
    )
    return model


def exposure_plan(world: World, steps: int) -> dict[int, list[Fact]]:
    """Step -> graded and stale facts shown then; each as often as its exposures say, spread over the whole run."""
    rng = random.Random(f"exposures {world.seed} {steps}")
    plan: dict[int, list[Fact]] = {}
    for fact in world.facts["graded"] + world.facts["stale"]:
        for _ in range(fact.exposures):
            plan.setdefault(rng.randrange(steps), []).append(fact)
    return plan


def step_text(world: World, step: int, exposures: dict[int, list[Fact]], thoughts: str) -> list[Demonstration]:
    """The demonstrations of one step: a batch in the shares of MIX, and the exposures planned for the step."""
    rng = random.Random(f"text {world.seed} {step}")
    families = rng.choices(list(MIX), list(MIX.values()), k=world.size["batch"])
    text = [demonstrate(world, rng, family, thoughts) for family in families]
    return text + [demonstrate(world, rng, "recall", thoughts, fact) for fact in exposures.get(step, ())]


class Example(NamedTuple):
    """A demonstration in tokens."""

    family: str
    ids: list[int]
    labels: list[int]  # −100 on prompt and tool results
    final: int  # where the text of the final answer or call begins; the length where there is none
    counts: bool  # for the running accuracy: a clean response without thoughts, which cannot copy the answer from one


def encode(tokenizer: PreTrainedTokenizerFast, demo: Demonstration) -> Example:
    """Each piece is tokenised by itself, as the rollout does, and the end token closes the response."""
    prompt = tokenizer.apply_chat_template(
        [{"role": "user", "content": demo.question}], tools=demo.tools, add_generation_prompt=True, tokenize=False
    )
    encoded = tokenizer([prompt] + [text for text, _ in demo.pieces])["input_ids"]
    ids, labels = list(encoded[0]), [-100] * len(encoded[0])
    for piece, (_, written) in zip(encoded[1:], demo.pieces):
        ids += piece
        labels += piece if written else [-100] * len(piece)
    ids.append(tokenizer.eos_token_id)
    labels.append(tokenizer.eos_token_id)
    opening = tokenizer.convert_tokens_to_ids("<tool_call>\n" if demo.tools else "<answer>")
    final = ids.index(opening) + 1 if opening in ids else len(ids)
    return Example(demo.family, ids, labels, final, demo.no_think and demo.deviation == "clean")


class Accuracy:
    """Per family: share of examples that count whose final answer or call is predicted right, token by token."""

    def __init__(self):
        self.counts: dict[str, list[int]] = {}

    def add(self, family: str, right: bool) -> None:
        count = self.counts.setdefault(family, [0, 0])
        count[0] += right
        count[1] += 1

    def take(self) -> dict[str, float]:
        """The shares since the last call."""
        shares = {family: round(right / n, 3) for family, (right, n) in sorted(self.counts.items())}
        self.counts = {}
        return shares


def pack(examples: list[Example], row: int = ROW) -> list[list[Example]]:
    """Rows of whole examples, each at most `row` tokens (a longer example alone): longest first into the first gap."""
    rows: list[list[Example]] = []
    room: list[int] = []
    for example in sorted(examples, key=lambda e: -len(e.ids)):
        n = len(example.ids)
        i = next((i for i, free in enumerate(room) if free >= n), None)
        if i is None:
            rows.append([])
            room.append(max(row - n, 0) + n)
            i = len(rows) - 1
        rows[i].append(example)
        room[i] -= n
    return rows


def collate(rows: list[list[Example]]) -> tuple[dict, torch.Tensor, torch.Tensor, list[tuple]]:
    """Packed rows as (model inputs, labels (B, T), weights (B, T), counted).

    An example attends to itself only, and its positions start at 0. counted: (family, row, start, end) of the final
    answers that the running accuracy is taken over.
    """
    B, T = len(rows), max(sum(len(example.ids) for example in row) for row in rows)
    ids, position = torch.zeros(2, B, T, dtype=torch.long)
    labels = torch.full((B, T), -100)
    weights = torch.ones(B, T)
    owner = torch.full((B, T), -1)  # which example of its row a token belongs to
    counted = []
    for r, row in enumerate(rows):
        start = 0
        for i, example in enumerate(row):
            end = start + len(example.ids)
            ids[r, start:end], labels[r, start:end] = torch.tensor(example.ids), torch.tensor(example.labels)
            position[r, start:end], owner[r, start:end] = torch.arange(end - start), i
            weights[r, start + example.final : end] = FINAL_WEIGHT
            if example.counts:
                counted.append((example.family, r, start + example.final, end))
            start = end
    mask = (owner[:, :, None] == owner[:, None, :]) & torch.ones(T, T, dtype=torch.bool).tril()  # (B, T, T)
    return {"input_ids": ids, "position_ids": position, "attention_mask": mask[:, None]}, labels, weights, counted


def _train_step(model, optimizers, examples: list[Example], seen: Accuracy) -> float:
    """One optimizer step on the packed examples; returns the loss, weighted mean of nats per trained token."""
    inputs, labels, weights, counted = collate(pack(examples))
    inputs = {name: tensor.to(model.device) for name, tensor in inputs.items()}
    hidden = model.model(**inputs, use_cache=False).last_hidden_state  # (B, T, H)
    trained = labels[:, 1:] != -100  # (B, T-1): the token before a trained one predicts it
    targets = labels[:, 1:][trained].to(model.device)  # (N,)
    logits = model.lm_head(hidden[:, :-1][trained.to(model.device)])  # (N, V)
    weights = weights[:, 1:][trained].to(model.device)  # (N,)
    loss = (torch.nn.functional.cross_entropy(logits, targets, reduction="none") * weights).sum() / weights.sum()
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    for optimizer in optimizers:
        optimizer.step()
        optimizer.zero_grad()
    right = torch.ones_like(labels, dtype=torch.bool)  # (B, T)
    right[:, 1:][trained] = (logits.argmax(-1) == targets).cpu()
    for family, r, start, end in counted:
        seen.add(family, bool(right[r, start:end].all()))
    return loss.item()


def _optimizers(model: Qwen3ForCausalLM) -> list[torch.optim.Optimizer]:
    matrices = [p for name, p in model.named_parameters() if p.ndim == 2 and "embed" not in name]
    rest = [p for name, p in model.named_parameters() if p.ndim != 2 or "embed" in name]
    muon = torch.optim.Muon(matrices, lr=MUON_LR, weight_decay=WEIGHT_DECAY, momentum=0.95)
    adam = torch.optim.AdamW(rest, lr=ADAM_LR, betas=(0.9, 0.95), weight_decay=WEIGHT_DECAY)
    for optimizer in (muon, adam):
        for group in optimizer.param_groups:
            group["initial_lr"] = group["lr"]
    return [muon, adam]


def _schedule(step: int, steps: int) -> float:
    """Factor on the learning rates: short linear warm-up, then linear decay to zero."""
    return min((step + 1) / WARMUP, (steps - step) / steps)


def _finished(output: Path, config: dict) -> bool:
    """Whether `output` holds this run, finished; DataError if it holds one with other settings."""
    record = output / "world.json"
    if record.exists():
        held = json.loads(record.read_text())
        if differing := [key for key in config if held.get(key) != json.loads(json.dumps(config[key]))]:
            raise DataError(f"{output} holds a base made with another {differing[0]}; choose another --output")
        return (output / "model.safetensors").exists()
    output.mkdir(parents=True, exist_ok=True)
    record.write_text(json.dumps(config, indent=1) + "\n")
    return False


def _read_log(output: Path) -> list[dict]:
    path = output / "pretrain_log.jsonl"
    return [json.loads(line) for _, line in read_lines(path)] if path.exists() else []


def _write_log(output: Path, log: list[dict]) -> None:
    (output / "pretrain_log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in log))
