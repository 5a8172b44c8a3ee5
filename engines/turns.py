"""What every engine needs besides its own way of sampling: where a turn ends, its noise, and its tool calls.

An engine is one file with `complete(model, tokenizer, drafts, args, toolbox)`: it samples every draft to its end. A
turn ends at an eos id or at the token that completes a stop tag (`turn_length`). Then `submit_calls` starts the tool calls
that the turn asks for, `collect_results` appends what came back, and the draft goes on. `engines/hf.py` is the example
to start from.
"""

from concurrent.futures import Executor, Future
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from transformers import (
    LogitsProcessorList,
    PreTrainedTokenizerBase,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from core.conversation import (
    Draft,
    check_template,
    decode,
    dialect_of,
    end_turn,
    open_draft,
    results_segments,
    turn_end,
)
from core.model import causal_lm
from core.run import seed_of
from core.trajectory import DataError, Question, ToolCall
from engines.args import SamplingArgs
from engines.toolbox import ToolBox, run_call


def start_draft(q: Question, i: int, tokenizer: PreTrainedTokenizerBase, args: SamplingArgs, run: tuple) -> Draft:
    """Draft of sample i of a question, its prompt (and a forced mode's opening) in place; DataError if too long."""
    boxed = args.format == "strict" and q.task != "function"
    draft = open_draft(q, tokenizer, dialect_of(q, args.dialect), i, seed_of(*run, q.id, i), args.mode, boxed)
    if draft.prompt_len > args.max_prompt_length:
        raise DataError(
            f"question {q.id!r}: its prompt has {draft.prompt_len} tokens, more than --max_prompt_length "
            f"{args.max_prompt_length}"
        )
    return draft


def check_prompts(
    questions: list[Question], tokenizer: PreTrainedTokenizerBase, args: SamplingArgs, model: Any = None
) -> int:
    """The longest prompt in tokens. DataError for the first question whose prompt is too long, before any work.

    So is one that leaves less room among the model's positions than `--max_completion_length`, or whose dialect the
    chat template does not speak.
    """
    positions = getattr(getattr(model, "config", None), "max_position_embeddings", None)
    longest = 0
    for q in questions:
        check_template(q, tokenizer, dialect_of(q, args.dialect))
        prompt = start_draft(q, 0, tokenizer, args, ()).prompt_len
        longest = max(longest, prompt)
        if positions and prompt + args.max_completion_length > positions:
            raise DataError(
                f"question {q.id!r}: its prompt of {prompt} tokens and --max_completion_length "
                f"{args.max_completion_length} are more than the model's {positions} positions"
            )
    return longest


def eos_ids(model: torch.nn.Module, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Every id that ends a turn: the chat template's, the tokenizer's and those of the model's generation config."""
    configured = causal_lm(model).generation_config.eos_token_id
    configured = configured if isinstance(configured, list) else [configured]
    written = tokenizer.convert_tokens_to_ids(turn_end(tokenizer))
    return sorted({written, tokenizer.eos_token_id, *(i for i in configured if i is not None)})


@lru_cache(maxsize=4)
def closing_tokens(tokenizer: PreTrainedTokenizerBase) -> Tensor:
    """(V,) bool: tokens whose text holds '>' — only at such a token can a stop tag be completed."""
    pieces = tokenizer.batch_decode([[i] for i in range(len(tokenizer))])
    return torch.tensor([">" in piece for piece in pieces])


def closes_tag(new_ids: list[int], stops: tuple[str, ...], tokenizer: PreTrainedTokenizerBase) -> bool:
    """True if the last of a turn's new tokens completes a stop tag, which may span tokens or end inside this one."""
    text = tokenizer.decode(new_ids[-32:])  # no tag is longer than 32 tokens, even byte by byte
    before = tokenizer.decode(new_ids[-32:-1])
    return any(text.count(stop) > before.count(stop) for stop in stops)


def turn_length(
    new_ids: list[int], eos: set[int], closing: Tensor, stops: tuple[str, ...], tokenizer: PreTrainedTokenizerBase
) -> tuple[int, bool]:
    """(tokens that belong to the turn, whether it ended by eos or stop tag rather than by its budget)."""
    for n, token in enumerate(new_ids, 1):
        if token in eos:
            return n, True
        if token < len(closing) and closing[token] and closes_tag(new_ids[:n], stops, tokenizer):
            return n, True
    return len(new_ids), False


def score_processors(args: SamplingArgs) -> LogitsProcessorList:
    """What turns logits into the scores that are sampled from, by the flags; shared by the engines."""
    processors = LogitsProcessorList()
    if args.repetition_penalty != 1.0:
        processors.append(RepetitionPenaltyLogitsProcessor(args.repetition_penalty))
    if args.temperature not in (0.0, 1.0):
        processors.append(TemperatureLogitsWarper(float(args.temperature)))
    if args.top_k:
        processors.append(TopKLogitsWarper(args.top_k))
    if args.top_p < 1.0:
        processors.append(TopPLogitsWarper(args.top_p))
    return processors


def gumbel_noise(seeds: Tensor, positions: Tensor, vocab: int) -> Tensor:
    """Standard Gumbel noise (B, V) that depends on nothing but (seed, position, token id): a counter-based hash.

    seeds (B,) int64, positions (B,) int64. The same on every device and in every batch.
    """
    mix = torch.arange(vocab, device=seeds.device)[None, :]  # (1, V)
    for word in (seeds & 0xFFFFFFFF, seeds >> 32, positions):  # murmur3's finaliser, once per 32-bit word
        mix = (mix ^ (word & 0xFFFFFFFF)[:, None]) + 0x9E3779B9 & 0xFFFFFFFF
        mix = (mix ^ mix >> 16) * 0x85EBCA6B & 0xFFFFFFFF
        mix = (mix ^ mix >> 13) * 0xC2B2AE35 & 0xFFFFFFFF
        mix = mix ^ mix >> 16
    uniform = (mix.to(torch.float32) + 0.5) * 2.0**-32
    return -torch.log(-torch.log1p(-uniform.clamp(max=1 - 2**-24)))  # fine in the upper tail, which decides


def tokens_left(d: Draft, args: SamplingArgs) -> int:
    """Tokens that the model may still write in this turn: what `--max_completion_length` leaves, tool results counted,
    or what `--max_turn_length` leaves of the tokens written since the last result, if that is less."""
    left = args.max_completion_length - d.response_len
    if args.max_turn_length:
        last = max((i for i, (who, *_) in enumerate(d.segments) if who == "tool"), default=-1)
        written = sum(end - start for who, start, end, _ in d.segments[last + 1 :] if who == "model")
        left = min(left, args.max_turn_length - written)
    return left


def end_if_spent(d: Draft, args: SamplingArgs) -> None:
    """Finish a draft that has no token of its budget, or of its turn's, left."""
    if tokens_left(d, args) <= 0:
        d.finish = d.finish or "length"


Pending = list[tuple[Draft, list[Future]]]  # drafts whose tool calls are running


def submit_calls(drafts: list[Draft], toolbox: ToolBox, args: SamplingArgs, eos: set[int], pool: Executor) -> Pending:
    """Start the tool calls that the last turns ask for; a draft over its limits is finished instead."""
    pending = []
    for d in drafts:
        calls = end_turn(d, eos)
        used = [c.name for c in d.calls + calls]
        over_tool = any(used.count(name) > args.max_calls_per_tool for name in set(used))
        if calls and (len(used) > args.max_tool_calling_iterations or over_tool):
            d.calls += [ToolCall(c.name, c.arguments, "", False, "over the call limit") for c in calls]
            d.finish = "tool_limit"
        elif calls:
            pending.append((d, [pool.submit(run_call, c, list(d.calls), toolbox, args.max_tool_seconds) for c in calls]))
    return pending


def collect_results(pending: Pending, args: SamplingArgs, tokenizer: PreTrainedTokenizerBase) -> None:
    """Wait for the calls and append their results; a draft without room for them has spent its budget."""
    for d, futures in pending:
        done = [f.result() for f in futures]
        d.calls += done
        segments = results_segments([c.result for c in done], [c.name for c in done], d, tokenizer, args.mode)
        if d.response_len + sum(len(ids) for _, ids in segments) >= args.max_completion_length:
            d.finish = "length"
            continue
        for who, ids in segments:
            d.add_segment(who, ids, decode(tokenizer, ids))
