"""Rollout: sample multi-turn trajectories with tools, on plain Hugging Face `generate`. Library and command line.

    python rollout.py --model_name_or_path data/tiny --data Q.jsonl --index DIR --search_top_k 1 --output T.jsonl

1. Render each question with the chat template, tokenise it once, make G drafts of it.
2. `generate` for all live drafts at once, until each closes a tool call or its answer, ends, or spends its budget.
3. Keep the sampled ids verbatim (loss_mask 1); run the tool calls of the batch concurrently.
4. Append each tool's result as ids (loss_mask 0) and go to 2 with the drafts that are not finished.

Nothing that was sampled is decoded and tokenised again. A draft's randomness is a pure function of (run seed, step,
question id, sample index, position), so a resumed run needs no replay. Every turn prefills its whole context again:
the readable reference. `--engine fast` (engines/fast.py) does the same work on a cache that lives across turns.
"""

import json
from collections import deque
from collections.abc import Callable
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor
from tqdm import tqdm
from transformers import (
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    PreTrainedTokenizerBase,
    RepetitionPenaltyLogitsProcessor,
    StoppingCriteria,
    StoppingCriteriaList,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from core.args import arg, cli, require_positive
from core.conversation import (
    Draft,
    RolloutArgs,
    ToolBox,
    check_index,
    check_prompts,
    encode,
    end_turn,
    open_tools,
    result_text,
    run_call,
    to_trajectory,
)
from core.model import ModelArgs, causal_lm, device, load_policy, sampling_mode
from core.parse import STOPS
from core.run import other_setting, write_text
from core.trajectory import DataError, ToolCall, Trajectory, load_trajectories, save_trajectories
from data.questions import Question, load_questions
from engines.branching import OPENING, Tree, entropy_share, grow, note_segment, plant

# ---------------------------------------------------------------------------------------------------- sampling


@lru_cache(maxsize=4)
def closing_tokens(tokenizer: PreTrainedTokenizerBase) -> Tensor:
    """(V,) bool: tokens whose text holds '>' — only at such a token can a stop tag be completed."""
    pieces = tokenizer.batch_decode([[i] for i in range(len(tokenizer))])
    return torch.tensor([">" in piece for piece in pieces])


def eos_ids(model: torch.nn.Module, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Every id that ends a turn: the tokenizer's and those of the model's generation config."""
    configured = causal_lm(model).generation_config.eos_token_id
    configured = configured if isinstance(configured, list) else [configured]
    return sorted({tokenizer.eos_token_id, *(i for i in configured if i is not None)})


def closes_tag(new_ids: list[int], stops: tuple[str, ...], tokenizer: PreTrainedTokenizerBase) -> bool:
    """True if the last of a turn's new tokens completes a stop tag, which may span tokens or end inside this one."""
    text = tokenizer.decode(new_ids[-32:])  # no tag is longer than 32 tokens, even byte by byte
    before = tokenizer.decode(new_ids[-32:-1])
    return any(text.count(stop) > before.count(stop) for stop in stops)


class StopAtTags(StoppingCriteria):
    """Stops a row at eos or at the token that completes one of its dialect's stop tags."""

    def __init__(self, drafts: list[Draft], width: int, eos: list[int], tokenizer: PreTrainedTokenizerBase):
        self.drafts, self.width, self.tokenizer = drafts, width, tokenizer
        self.eos_token_id = torch.tensor(eos)
        self.closing = closing_tokens(tokenizer)

    def __call__(self, input_ids: Tensor, scores: Tensor, **kwargs) -> Tensor:
        last = input_ids[:, -1].cpu()  # (B,)
        done = torch.isin(last, self.eos_token_id)
        in_range = last.clamp(max=len(self.closing) - 1)  # ids beyond the tokenizer's are padding of the embedding
        for row in (self.closing[in_range] & ~done).nonzero().flatten().tolist():
            new_ids = input_ids[row, self.width :].tolist()
            done[row] = closes_tag(new_ids, STOPS[self.drafts[row].dialect], self.tokenizer)
        return done.to(input_ids.device)


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


class GumbelSampling(LogitsProcessor):
    """Turns greedy decoding into sampling: the argmax of logits + Gumbel noise is a draw from softmax(logits)."""

    def __init__(self, drafts: list[Draft], width: int, keep_logp: bool):
        self.width, self.keep_logp = width, keep_logp
        self.seeds = torch.tensor([d.seed for d in drafts])
        self.lengths = torch.tensor([d.response_len for d in drafts])
        self.logp: list[Tensor] = []  # (B,) each: log-probabilities of the tokens chosen

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        step = input_ids.shape[1] - self.width
        seeds, positions = self.seeds.to(scores.device), (self.lengths + step).to(scores.device)
        noisy = scores + gumbel_noise(seeds, positions, scores.shape[-1])
        if self.keep_logp:
            self.logp.append(scores.log_softmax(-1).gather(1, noisy.argmax(-1, keepdim=True))[:, 0])
        return noisy


class OpeningEntropy(LogitsProcessor):
    """Keeps the entropies of the first steps of every row (see engines/branching.py); changes no score."""

    def __init__(self):
        self.steps: list[Tensor] = []  # (B,) each

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        if len(self.steps) < OPENING:
            self.steps.append(entropy_share(scores))
        return scores


def score_processors(args: RolloutArgs) -> LogitsProcessorList:
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


def generate_turn(
    model: torch.nn.Module, tokenizer: PreTrainedTokenizerBase, drafts: list[Draft], args: RolloutArgs
) -> None:
    """Extend every draft by one model segment; finish those that ended or spent their budget."""
    width = max(len(d.ids) for d in drafts)
    ids = torch.full((len(drafts), width), tokenizer.pad_token_id)  # (B, width) left-padded
    attention = torch.zeros_like(ids)
    for row, d in enumerate(drafts):
        ids[row, width - len(d.ids) :] = torch.tensor(d.ids)
        attention[row, width - len(d.ids) :] = 1
    budgets = [args.max_completion_length - d.response_len for d in drafts]
    eos = eos_ids(model, tokenizer)
    on = next(model.parameters()).device
    processors, opening = score_processors(args), OpeningEntropy()
    if args.branching in ("arpo", "threshold"):
        processors.append(opening)
    sampling = GumbelSampling(drafts, width, args.check)
    if args.temperature > 0:
        processors.append(sampling)
    config = GenerationConfig(  # greedy over noisy logits; the model's own settings must not shape the samples
        do_sample=False,
        max_new_tokens=max(budgets),
        eos_token_id=eos,
        pad_token_id=tokenizer.pad_token_id,
        repetition_penalty=1.0,
    )
    out = model.generate(
        input_ids=ids.to(on),
        attention_mask=attention.to(on),
        generation_config=config,
        logits_processor=processors,
        stopping_criteria=StoppingCriteriaList([StopAtTags(drafts, width, eos, tokenizer)]),
    )[:, width:].tolist()
    closing = closing_tokens(tokenizer)
    entropies = torch.stack(opening.steps, dim=1).tolist() if opening.steps else [[] for _ in drafts]  # (B, <= 20)
    logps = torch.stack(sampling.logp, dim=1).tolist() if sampling.logp else [None] * len(drafts)
    for d, new_ids, budget, entropy, logp in zip(drafts, out, budgets, entropies, logps):
        count, ended = turn_length(new_ids[:budget], set(eos), closing, STOPS[d.dialect], tokenizer)
        note_segment(d, entropy[:count], args.branching)
        d.append("model", new_ids[:count], tokenizer.decode(new_ids[:count]), logp and logp[:count])
        if not ended:
            d.finish = "length"


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


def end_if_spent(d: Draft, args: RolloutArgs) -> None:
    """Finish a draft that has no token of its budget left."""
    if d.response_len >= args.max_completion_length:
        d.finish = d.finish or "length"


Pending = list[tuple[Draft, list[Future]]]  # drafts whose tool calls are running


def submit_calls(drafts: list[Draft], toolbox: ToolBox, args: RolloutArgs, eos: set[int], pool: Executor) -> Pending:
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
            pending.append((d, [pool.submit(run_call, c, list(d.calls), toolbox, args) for c in calls]))
    return pending


def collect_results(pending: Pending, args: RolloutArgs, tokenizer: PreTrainedTokenizerBase) -> None:
    """Wait for the calls and append their results; a draft without room for them has spent its budget."""
    for d, futures in pending:
        done = [f.result() for f in futures]
        d.calls += done
        text = result_text([c.result for c in done], tokenizer, d.dialect)
        ids = encode(tokenizer, text)
        if d.response_len + len(ids) >= args.max_completion_length:
            d.finish = "length"
        else:
            d.append("tool", ids, text)


def rollout(
    model: torch.nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    questions: list[Question],
    args: RolloutArgs,
    toolbox: ToolBox,
    run: tuple,
) -> list[Trajectory]:
    """G trajectories of each question, in order (question by question, sample by sample).

    run: what seeds the sampling besides question and sample, e.g. (seed, step).
    """
    trees = [plant(q, tokenizer, args, run) for q in questions]
    complete_trees(model, tokenizer, trees, args, toolbox, run)
    return [to_trajectory(d, tokenizer) for tree in trees for d in tree.drafts]


def complete_trees(
    model: torch.nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    trees: list[Tree],
    args: RolloutArgs,
    toolbox: ToolBox,
    run: tuple,
) -> None:
    """Sample the drafts of the trees (see engines/branching.py) and those that the trees grow meanwhile."""
    drafts = [d for tree in trees for d in tree.drafts]
    complete(model, tokenizer, drafts, args, toolbox, lambda: [d for t in trees for d in grow(t, tokenizer, args, run)])


def complete(
    model: torch.nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    drafts: list[Draft],
    args: RolloutArgs,
    toolbox: ToolBox,
    more: Callable[[], list[Draft]] = list,
) -> None:
    """Sample every draft to its end, by `--engine`: engines/fast.py, engines/openai.py, or here turn by turn in batches.

    The batches take turns in a fixed order, so the tool calls of one run while the next one generates.
    more: asked after every turn for drafts that start now (branching).
    """
    if args.engine == "fast":
        from engines import fast  # here, because engines/fast.py builds on this module

        fast.complete(model, tokenizer, drafts, args, toolbox, more)
        return
    if args.engine == "openai":
        from engines import openai  # for the same reason

        openai.complete(model, tokenizer, drafts, args, toolbox)
        return
    eos, size = set(eos_ids(model, tokenizer)), args.rollout_batch_size
    with sampling_mode(model), ThreadPoolExecutor(args.tool_workers) as pool:
        batches = deque((drafts[at : at + size], []) for at in range(0, len(drafts), size))
        while batches:
            live, pending = batches.popleft()
            collect_results(pending, args, tokenizer)
            for d in live:
                end_if_spent(d, args)
            live = [d for d in live if d.finish is None]
            if live:
                generate_turn(model, tokenizer, live, args)
                batches.append((live, submit_calls(live, toolbox, args, eos, pool)))
            for d in more():
                if not batches or len(batches[-1][0]) >= size:
                    batches.append(([], []))
                batches[-1][0].append(d)


def load_sampler(args: Any) -> tuple[Any, PreTrainedTokenizerBase]:
    """(policy on its device, or the server of `--engine openai`; tokenizer): what `complete` samples from."""
    if args.engine == "openai":
        from engines import openai

        return openai.connect(args)
    model, tokenizer = load_policy(args, trainable=False)
    return model.to(device()), tokenizer


# ---------------------------------------------------------------------------------------------------- command line


@dataclass
class Args(RolloutArgs, ModelArgs):
    """Flags of the command line."""

    data: str = arg("", "questions: jsonl, verl parquet or dataset id (required)")
    output: str = arg("", "trajectory file to write (required); an unfinished one is continued")
    task: Literal["auto", "math", "qa", "function"] = arg("auto", "task of all rows; auto = what the row says")
    limit: int = arg(0, "first N questions only, 0 = all")
    split: str = arg("train", "split, if --data is a dataset id")
    seed: int = arg(0, "sampling seed")
    threads: int = arg(2, "CPU threads")
    overwrite: bool = arg(False, "replace an existing output file")

    def __post_init__(self):
        ModelArgs.__post_init__(self)
        RolloutArgs.__post_init__(self)
        if not self.data or not self.output:
            raise ValueError("--data and --output are required")
        require_positive(self, "threads")


def main(args: Args) -> list[Trajectory]:
    """Roll out a question file into a trajectory file, group by group; a killed run goes on where it stopped."""
    torch.set_num_threads(args.threads)
    output, config = Path(args.output), Path(args.output + ".config.json")
    done: list[Trajectory] = []
    if output.is_dir():
        raise DataError(f"--output {output} is a folder; name the file to write")
    check_index(args)
    if output.exists() and not args.overwrite:
        if not config.exists():
            raise DataError(f"--output {output} exists without a {config.name}; choose another file or --overwrite")
        if other := other_setting(json.loads(config.read_text()), args):
            raise DataError(f"--output {output} was written with {other}; choose another file or --overwrite")
        drop_torn_line(output)
        done = load_trajectories(output)
    questions = load_questions(args.data, args.task, args.limit, args.split)
    asked = {q.id: (q.question, q.gold) for q in questions}
    if changed := next((t for t in done if asked.get(t.question_id) != (t.question, t.gold)), None):
        raise DataError(f"--data {args.data}: question {changed.question_id!r} is another one than in --output {output}")
    complete_ids = {t.question_id for t in done if t.sample_idx == args.num_generations - 1}
    done = [t for t in done if t.question_id in complete_ids]
    todo = [q for q in questions if q.id not in complete_ids]
    if not todo:
        return done
    model, tokenizer = load_sampler(args)
    check_prompts(questions, tokenizer, args, model)
    output.parent.mkdir(parents=True, exist_ok=True)
    write_text(config, json.dumps(asdict(args), indent=1) + "\n")
    waves = 1 if args.engine == "hf" else 4  # more drafts than slots at a time, so that free slots are refilled
    per_batch = max(waves * args.rollout_batch_size // args.num_generations, 1)
    save_trajectories(output, done)
    with open_tools(args) as toolbox, open(output, "a", encoding="utf-8") as out:
        bar = tqdm(total=len(questions), initial=len(questions) - len(todo), desc="rollout", unit="question")
        for at in range(0, len(todo), per_batch):
            chunk = todo[at : at + per_batch]
            trees = [plant(q, tokenizer, args, (args.seed,)) for q in chunk]
            try:
                complete_trees(model, tokenizer, trees, args, toolbox, (args.seed,))
            finally:  # a server that went away leaves whole groups, which are kept
                whole = [tree for tree in trees if tree.full and all(d.finish for d in tree.drafts)]
                group = [to_trajectory(d, tokenizer) for tree in whole for d in tree.drafts]
                out.writelines(t.to_json() + "\n" for t in group)
                out.flush()
            done += group
            calls = sum(t.n_calls for t in done) / len(done)
            bar.set_postfix(calls=f"{calls:.2f}", tokens=f"{sum(t.completion_tokens for t in done) / len(done):.0f}")
            bar.update(len(chunk))
        bar.close()
    print(f"{output}: {len(done)} trajectories of {len(questions)} questions")
    return done


def drop_torn_line(path: Path) -> None:
    """Remove the last line of a file whose writer was killed in the middle of it."""
    text = path.read_text(encoding="utf-8", errors="replace")
    if text and not text.endswith("\n"):
        write_text(path, text[: text.rfind("\n") + 1])


if __name__ == "__main__":
    cli(main, Args)
