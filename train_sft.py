"""Supervised fine-tuning on trajectories: the warm-up of RL and the RFT of ET-Agent (PAPERS A2).

    python train_sft.py --model_name_or_path data/tiny --data D.jsonl --output_dir out/sft

1. Read trajectories, demonstrations (`question` + `response` parts), chat rows (`messages`) or TRL's pairs (`prompt`
   + `completion`, texts or messages) from jsonl, parquet, CSV or the hub; tokenise each once.
2. Per optimizer step: the next examples of a seeded permutation, in micro-batches sorted by length.
3. loss = − Σ logp of model-written tokens / their number in the whole step; tool results and prompts have no loss.
`torchrun --nproc_per_node N train_sft.py …` shares each step's examples among N processes.
Left out on purpose: packing several examples into one row.
"""

import json
import math
import re
import time
from collections.abc import Callable
from dataclasses import dataclass
from itertools import groupby
from typing import Literal

import jinja2
import torch
from tqdm import tqdm
from transformers import PreTrainedTokenizerBase

from core import distributed
from core.args import RunArgs, arg, cli, require_positive
from core.checkpoint import resume, save_checkpoint
from core.conversation import (
    Draft,
    behind_opening,
    check_declared,
    check_template,
    decode,
    dialect_of,
    encode,
    literal,
    open_draft,
    render,
    results_segments,
    split_opening,
    to_trajectory,
    turn_end,
)
from core.model import (
    ModelArgs,
    OptimizerName,
    ScheduleName,
    adamw,
    collate,
    device,
    enable_checkpointing,
    load_policy,
    packed,
    save_adapter,
    schedule,
    token_stats,
)
from core.run import shuffled, start_run
from core.trajectory import DataError, Question, Trajectory, check_tokenizer
from data.questions import ADDED_KEYS, SYSTEM_KEYS, UNASKED_KEYS, check_parts, question_of, read_rows, refuse_fields


@dataclass
class Args(ModelArgs, RunArgs):
    """Flags of an SFT run; ET-Agent's values stand in the help."""

    data: str = arg("", "trajectories, demonstrations, chats or prompt-completion pairs (required)")
    limit: int = arg(0, "first N rows only, 0 = all")
    max_length: int = arg(4096, "longest example in tokens; longer ones are an error unless --drop_long")
    drop_long: bool = arg(False, "leave out examples longer than --max_length and say how many")
    per_device_train_batch_size: int = arg(8, "examples per micro-batch")
    max_tokens_per_micro_batch: int = arg(0, "micro-batches of so many tokens, padding included; 0 = by number")
    gradient_accumulation_steps: int = arg(1, "an optimizer step takes this × per_device_train_batch_size × processes")
    num_train_epochs: float = arg(3.0, "passes over the data (ET-Agent 3)")
    max_steps: int = arg(0, "optimizer steps; overrides --num_train_epochs if > 0")
    learning_rate: float = arg(1e-3, "peak learning rate (ET-Agent, full parameters: 5e-6)")
    lr_scheduler_type: ScheduleName = arg("cosine", "schedule of the learning rate, as in transformers")
    warmup_ratio: float = arg(0.05, "share of the steps with rising learning rate")
    optimizer: OptimizerName = arg("adamw", "adamw_8bit: states in 8 bits (bitsandbytes)")
    max_grad_norm: float = arg(1.0, "gradient clipping, 0 = none")
    gradient_checkpointing: bool = arg(False, "recompute activations in the backward pass")
    save_steps: int = arg(100, "steps between checkpoints")
    save_total_limit: int = arg(2, "checkpoints kept, 0 = all")
    report_to: Literal["none", "wandb"] = arg("none", "tracker beside metrics.jsonl")

    def __post_init__(self):
        RunArgs.__post_init__(self)
        ModelArgs.__post_init__(self)
        if not self.data:
            raise ValueError("--data is required")
        require_positive(self, "per_device_train_batch_size", "gradient_accumulation_steps", "save_steps", "max_length")
        if self.warmup_ratio > 1:
            raise ValueError(f"--warmup_ratio must be from 0 to 1, not {self.warmup_ratio}")
        if self.max_steps < 1 and self.num_train_epochs <= 0:
            raise ValueError(f"--num_train_epochs must be positive, not {self.num_train_epochs}")


def main(args: Args) -> dict:
    """Train; returns (and writes to result.json) the first and last loss."""
    with distributed.processes():
        return train(args)


def train(args: Args) -> dict:
    """The run of this process; with torchrun each process has its share of every step's examples."""
    run = start_run(args, (args.data,))
    if run.finished:
        print(f"{args.output_dir}: finished before\n{json.dumps(run.finished, indent=1)}")
        return run.finished
    model, tokenizer = load_policy(args)
    model.to(device())
    examples = load_examples(args.data, tokenizer, args, model.get_input_embeddings().num_embeddings)
    if args.gradient_checkpointing:
        enable_checkpointing(model)
    per_step = args.per_device_train_batch_size * args.gradient_accumulation_steps * distributed.count()
    steps_per_epoch = math.ceil(len(examples) / per_step)
    steps = args.max_steps if args.max_steps > 0 else math.ceil(args.num_train_epochs * steps_per_epoch)
    optimizer = adamw(model, args.optimizer, args.learning_rate)
    trained = [p for p in model.parameters() if p.requires_grad]
    scheduler = schedule(optimizer, args.lr_scheduler_type, args.warmup_ratio, steps)
    first, state = resume(run.dir, model, optimizer, scheduler)
    run.forget_after(first)
    losses = state.get("losses", [])

    model.train()
    todo = range(first, steps)
    bar = tqdm(todo, initial=first, total=steps, desc="sft", unit="step", disable=distributed.rank() > 0)
    for step in bar:
        started = time.perf_counter()
        epoch, cut = divmod(step, steps_per_epoch)
        order = shuffled(len(examples), args.seed, "order", epoch)[cut * per_step : (cut + 1) * per_step]
        tokens = sum(examples[i].completion_tokens for i in order)
        mine = [examples[i] for i in distributed.share(order)]
        loss = 0.0
        for rows in packed(mine, args.per_device_train_batch_size, args.max_tokens_per_micro_batch):
            batch = collate(rows, tokenizer.pad_token_id, device())
            logp, _ = token_stats(model, batch)  # (B, T)
            part = -logp.sum() / tokens
            part.backward()
            loss += part.item()
        distributed.sum_gradients(trained)
        loss = distributed.sum_values({"loss": loss})["loss"]
        norm = torch.nn.utils.clip_grad_norm_(trained, args.max_grad_norm or math.inf).item()
        rate = scheduler.get_last_lr()[0]
        if math.isfinite(loss) and math.isfinite(norm):
            optimizer.step()
            scheduler.step()
        else:
            tqdm.write(f"step {step + 1} skipped: loss {loss}, gradient norm {norm}")
        optimizer.zero_grad()
        losses.append(loss)
        seconds = time.perf_counter() - started
        run.log(
            step + 1,
            {"loss": loss, "grad_norm": norm, "learning_rate": rate, "epoch": (step + 1) / steps_per_epoch}
            | {"num_tokens": tokens, "time/step": seconds},
        )
        bar.set_postfix(loss=f"{loss:.3f}", tokens_per_s=f"{tokens / seconds:.0f}")
        if distributed.rank() == 0 and ((step + 1) % args.save_steps == 0 or step + 1 == steps):
            counters = {"losses": losses}
            save_checkpoint(run.dir, step + 1, model, tokenizer, optimizer, scheduler, counters, args.save_total_limit)
    result = {"steps": steps, "examples": len(examples), "first_loss": losses[0], "loss": losses[-1]}
    if distributed.rank() == 0:
        save_adapter(model, tokenizer, run.dir)
        run.finish(result)
        moved = f"loss {losses[0]:.3f} → {losses[-1]:.3f}"
        print(f"{args.output_dir}: {steps} steps on {len(examples)} examples, {moved}; the adapter is there")
    return result


# ---------------------------------------------------------------------------------------------------- examples


def load_examples(path: str, tokenizer: PreTrainedTokenizerBase, args: Args, vocabulary: int) -> list[Trajectory]:
    """Every row as a Trajectory with its loss_mask; DataError names file, line and field of a bad or too long row.

    vocabulary: rows of the embedding, of which some models have more than their tokenizer uses.
    """
    examples, dropped = [], 0
    for where, row in read_rows(path):
        try:
            if "token_ids" in row:
                t = Trajectory.from_row(row)
                check_tokenizer([t], tokenizer, where)
            elif "response" in row:
                t = from_demonstration(row, tokenizer, where)
            elif "completion" in row:
                t = from_pair(row, tokenizer, where)
            elif "messages" in row:
                t = from_messages(row, tokenizer, where)
            else:
                raise DataError(f"{where}: a row needs 'token_ids', 'response', 'messages' or 'completion'")
        except DataError:
            raise
        except (ValueError, KeyError, TypeError, AttributeError, jinja2.TemplateError) as e:
            raise DataError(f"{where}: {e}") from None
        if max(t.token_ids) >= vocabulary:
            raise DataError(f"{where}: token id {max(t.token_ids)} is outside the vocabulary of {vocabulary}")
        if len(t.token_ids) > args.max_length:
            if not args.drop_long:
                raise DataError(f"{where}: {len(t.token_ids)} tokens, more than --max_length {args.max_length}")
            dropped += 1
        elif t.completion_tokens:
            examples.append(t)
        if args.limit and len(examples) == args.limit:
            break
    if dropped:
        print(f"{path}: left out {dropped} examples longer than --max_length {args.max_length}")
    if not examples:
        raise DataError(f"{path}: holds no example to train on")
    return examples


def from_demonstration(row: dict, tokenizer: PreTrainedTokenizerBase, where: str) -> Trajectory:
    """Tokenise a written response exactly as a rollout would have built it: part by part, results with mask 0.

    row["response"]: [{"role": "model", "text": …}, {"role": "tool", "text": …, "name": …}, …]; `name` may be missing.
    """
    question = question_of(row, where, default_id=where)
    check_parts(row["response"], "response", ("role", "text"), where)
    for i, part in enumerate(row["response"]):
        if part["role"] not in ("model", "tool"):
            raise DataError(f"{where}: field 'response' part {i}: role {part['role']!r} is not 'model' or 'tool'")
    dialect, end = dialect_of(question, "tags"), turn_end(tokenizer)
    check_template(question, tokenizer, dialect)
    draft = open_draft(question, tokenizer, dialect)
    draft.finish, draft.sampled = "eos", False
    for role, parts in groupby(row["response"], key=lambda part: part["role"]):
        parts = list(parts)
        if role == "tool":
            results, names = [p["text"] for p in parts], [p.get("name") or "tool" for p in parts]
            for who, ids in results_segments(results, names, draft, tokenizer):
                draft.add_segment(who, ids, decode(tokenizer, ids))
            continue
        for part in parts:
            opening = draft.segments[-1][3] if draft.segments and draft.segments[-1][0] == "given" else ""
            text = behind_opening(part["text"], opening)
            ended = text.endswith(end) or dialect == "hermes"  # where turns end at eos; with tags they end at a tag
            draft.write("model", literal(text.removesuffix(end), tokenizer) + end * ended, tokenizer)
    return to_trajectory(draft, tokenizer)


def from_pair(row: dict, tokenizer: PreTrainedTokenizerBase, where: str) -> Trajectory:
    """TRL's `prompt` and `completion`: two lists of messages, or two texts that no chat template touches."""
    prompt, completion = row.get("prompt"), row["completion"]
    if isinstance(prompt, list) and isinstance(completion, list):
        check_parts(prompt, "prompt", ("role",), where)
        check_parts(completion, "completion", ("role",), where)
        chat = {name: value for name, value in row.items() if name not in ("prompt", "completion")}
        return from_messages(chat | {"messages": prompt + completion}, tokenizer, where, first=len(prompt))
    for name, text in (("prompt", prompt), ("completion", completion)):
        if not isinstance(text, str):
            raise DataError(f"{where}: field {name!r} is {str(text)[:80]!r}: both are texts or both lists of messages")
    ids = tokenizer(prompt)["input_ids"]  # with the BOS of those that begin texts with one
    question = Question(str(row.get("id", where)), prompt, "", "qa")
    draft = Draft(question, 0, "tags", 0, ids, len(ids), finish="eos", sampled=False)
    text = completion.removesuffix(tokenizer.eos_token) + tokenizer.eos_token
    draft.add_segment("model", encode(tokenizer, text), text)
    return to_trajectory(draft, tokenizer)


def from_messages(row: dict, tokenizer: PreTrainedTokenizerBase, where: str, first: int = 0) -> Trajectory:
    """A chat as one trajectory: assistant messages from number `first` on are trained on, word for word.

    What the template puts around them is not, nor the empty think block that Qwen3's puts before them. A thought is,
    where the template (R1's) strips it. DataError if the template leaves out or adds anything else, or if it shows
    messages otherwise when the chat goes on (as those that strip earlier thoughts do).
    """
    messages, tools = row["messages"], row.get("tools")
    tools = json.loads(tools) if isinstance(tools, str) else tools
    check_parts(messages, "messages", ("role",), where)
    messages = [m | {"content": m.get("content") or ""} if m.get("tool_calls") else m for m in messages]  # a mere call
    check_parts(messages, "messages", ("content",), where)
    said = "\n".join(m["content"] for m in messages)
    lost = {name: value for name, value in row.items() if not isinstance(value, str) or value.strip() not in said}
    refuse_fields(lost, (*ADDED_KEYS, *SYSTEM_KEYS, *UNASKED_KEYS), where)
    turns = [i for i, m in enumerate(messages) if m["role"] == "assistant" and i >= first]
    if not turns or turns[0] == 0:
        raise DataError(f"{where}: field 'messages' needs an assistant message after the first")
    chat = [m if m["role"] == "system" else literal(m, tokenizer) for m in messages]
    if tools:
        check_declared(chat[: turns[0]], tools, tokenizer, f"{where}: leave out field 'tools' or take another model")

    def shown(part: list[dict], opening: bool) -> str:
        return render(part, tokenizer, tools, opening)

    question = Question(str(row.get("id", where)), messages[turns[0] - 1]["content"], "", "qa")
    draft, done = None, ""
    for i in turns:
        before = shown(chat[:i], True)
        if not before.startswith(done):
            raise DataError(f"{where}: the chat template changes messages before number {i} when the chat goes on")
        try:
            opening, text = own_text(chat[: i + 1], before, shown)
        except ValueError as e:
            raise DataError(f"{where}: field 'messages' part {i}: the chat template {e}") from None
        frame = before[len(done) : len(before) - len(opening)]
        if draft is None:
            prompt, dialect = encode(tokenizer, frame, start=True), "hermes" if tools else "tags"
            draft = Draft(question, 0, dialect, 0, prompt, len(prompt), finish="eos", sampled=False)
        else:
            draft.write("tool", frame, tokenizer)
        draft.write("given", opening, tokenizer)
        text, end, _ = text.partition(turn_end(tokenizer))  # what follows it is the template's
        draft.write("model", text + end, tokenizer)
        done = before + text + end
    return to_trajectory(draft, tokenizer)


def own_text(messages: list[dict], before: str, render: Callable[[list[dict], bool], str]) -> tuple[str, str]:
    """(opening, text): what the template opens the model's turn with, and what the last message then says.

    before: the rendered prompt of this turn, the opening at its end. The text is the row's own, then calls and what
    ends the turn as the template writes them. White space around the row's text may be the template's. ValueError if
    the template leaves out or adds anything.
    """
    *earlier, message = messages
    content, mark = message["content"], "ROW-TEXT"  # a text in the message's stead tells what is the template's
    whole = render(messages, False)
    head, found, tail = render([*earlier, message | {"content": mark}], False).rpartition(mark)
    if content and not found:
        raise ValueError(f"leaves out its text {content[:60]!r}")
    frame, opening = split_opening(before)
    head = head if found else frame
    if not head.startswith(frame):
        raise ValueError("shows the messages before it otherwise when it follows")
    added, thought = head[len(frame) :], (message.get("reasoning_content") or "").strip()
    text = whole[len(head) :] if whole.startswith(head) else ""
    if content and text.removesuffix(tail).strip() != content.strip():  # cut or rewritten
        text = content + tail
    if thought and thought not in added:
        raise ValueError(f"leaves out its reasoning_content {thought[:60]!r}")
    if not thought and (re.fullmatch(r"\s*<think>\s*</think>\s*", added) or opening and added.strip() == opening.strip()):
        added = ""
    if not thought and added.strip():
        raise ValueError(f"puts {added[:60]!r} before its text, which the row does not hold")
    calls = [call.get("function", call).get("name", "") for call in message.get("tool_calls") or []]
    if missing := [name for name in calls if name not in text]:
        raise ValueError(f"leaves out its call of {missing[0]!r}")
    text = added + text
    if "</think>" in opening:
        return opening, behind_opening(text, opening)
    if opening and not text.lstrip().startswith("<think>"):
        raise ValueError(f"opens a thought, which its text does not: {text[:60]!r}")
    return opening, text.lstrip().removeprefix("<think>").lstrip("\n") if opening else text


if __name__ == "__main__":
    cli(main, Args)
