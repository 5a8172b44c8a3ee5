"""The self-evolving flywheel of ET-Agent [2601.06860, sec. 4.1, alg. 1; PAPERS A1, A2]: sample, edit, keep, repeat.

    python flywheel.py --model_name_or_path data/tiny --data Q.jsonl --index DIR --search_top_k 1 --critic rule \\
        --output_dir out/flywheel

For a chunk of questions at a time:
1. Round 0: `num_generations` samples of each question.
2. Rounds 1 … R: the critic reads one trajectory of each question (`--per_round all`: its whole pool); the operators
   edit it; the edits are sampled to their end with tools. New token ids join the pool.
3. A question whose round added nothing is finished.

Writes pool.jsonl (a trajectory file; `meta` names operator, round and parent, `rewards` the grade), rounds.jsonl (what
each round did), and at the end rft.jsonl (for train_sft.py) and result.json. Killed at any moment, the same command
goes on: pool.jsonl is cut to the last finished round, and every seed is a function of (seed, question, round,
operator), so it ends with the same pool (if a critic behind an endpoint gives the same answers again).
"""

import json
import os
import random
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import torch
from tqdm import tqdm
from transformers import PreTrainedTokenizerBase

from core.args import RunArgs, arg, cli, require_positive
from core.conversation import Draft, show_prompt, to_trajectory, turn_text
from core.model import ModelArgs
from core.parse import parse_calls
from core.run import drop_torn_line, seed_of, start_run, table
from core.trajectory import DataError, Question, Trajectory, read_jsonl, save_trajectories
from data.questions import load_questions
from engines.toolbox import ToolBox, check_index, open_tools
from engines.turns import check_prompts, collect_results, eos_ids, start_draft, submit_calls
from eval.behaviour import CORRECT
from eval.grader import grade
from methods.critics import CRITICS
from methods.operators import OPERATORS
from rollout import RolloutArgs, complete, load_sampler

COUNTS = ("asked", "none", "malformed", "rejected", "duplicate", "added", "correct")


@dataclass
class Args(RolloutArgs, ModelArgs, RunArgs):
    """Flags of a flywheel run; ET-Agent's values stand in the help."""

    data: str = arg("", "questions: jsonl, verl parquet or dataset id (required)")
    task: Literal["auto", "math", "qa", "function"] = arg("auto", "task of all rows; auto = what the row says")
    limit: int = arg(0, "first N questions only, 0 = all")
    split: str = arg("train", "split, if --data is a dataset id")
    # --- rounds
    num_generations: int = arg(1, "samples of a question before the first round (ET-Agent's code: 1)")
    rounds: int = arg(3, "R, rounds of edits (ET-Agent: 3); 0 = plain sampling")
    per_round: Literal["best", "all"] = arg("best", "edit the best trajectory not edited before, or the whole pool")
    operators: list[str] = arg(list(OPERATORS), "operators in use")
    extra_calls: int = arg(4, "calls that trajectories of the rounds may make beyond the limits (ET-Agent: 4)")
    max_per_question: int = arg(64, "largest pool of a question (per_round all multiplies it by up to 4 per round)")
    # --- critic
    critic: Literal[tuple(CRITICS)] = arg("model", "who finds the steps to edit")
    critic_base_url: str = arg("", "critic model: an OpenAI-compatible endpoint instead of the policy itself")
    critic_model: str = arg("", "critic model: its name at the endpoint")
    critic_max_tokens: int = arg(1024, "critic model: longest answer in tokens")
    critic_batch_size: int = arg(32, "trajectories that the critic reads at once")
    # --- output
    rft_select: Literal["all", "fewest_calls"] = arg(
        "all",
        "rft.jsonl: all right, well-formed trajectories without a failed call (ET-Agent), or those that call least",
    )
    rft_per_question: int = arg(0, "rft.jsonl: most trajectories of one question, 0 = no limit (not for fewest_calls)")

    def __post_init__(self):
        RunArgs.__post_init__(self)
        ModelArgs.__post_init__(self)
        RolloutArgs.__post_init__(self)
        if not self.data:
            raise ValueError("--data is required")
        require_positive(self, "max_per_question", "critic_max_tokens", "critic_batch_size")
        if self.rounds < 0 or self.extra_calls < 0:
            raise ValueError(f"--rounds {self.rounds} and --extra_calls {self.extra_calls} must not be negative")
        if self.rft_select == "fewest_calls" and not self.rft_per_question:
            raise ValueError("--rft_select fewest_calls needs an --rft_per_question above 0")
        if unknown := [name for name in self.operators if name not in OPERATORS]:
            raise ValueError(f"--operators {unknown[0]!r} is not one of {tuple(OPERATORS)}")
        if self.mode != "auto":
            raise ValueError(f"--mode {self.mode}: an edit may replace the forced opening; the flywheel needs auto")
        if self.branching != "none":
            raise ValueError(f"--branching {self.branching}: the flywheel branches by its operators")
        if self.engine == "openai" and (
            self.critic == "entropy" or self.critic == "model" and not self.critic_base_url
        ):
            raise ValueError(
                f"--engine openai has no model here for --critic {self.critic}: use rule, or model at --critic_base_url"
            )
        if self.critic_base_url and self.critic != "model":
            raise ValueError(f"--critic_base_url goes with --critic model, not {self.critic}")


def main(args: Args) -> dict:
    """Run the flywheel, write rft.jsonl and result.json, print the yield of every operator."""
    run = start_run(args, (args.data,))
    if run.finished:
        print(f"{args.output_dir}: finished before\n{summary(run.finished)}")
        return run.finished
    check_index(args.index)
    questions = load_questions(args.data, args.task, args.limit, args.split)
    model, tokenizer = load_sampler(args)
    check_prompts(questions, tokenizer, args, model)
    show_prompt(questions[0], tokenizer, args.dialect)
    with open_tools(args) as toolbox:
        log = evolve(run.dir, questions, model, tokenizer, args, toolbox)
    kept = (t for group in pool_groups(run.dir, log) for t in rft_set(group, args.rft_select, args.rft_per_question))
    rft = save_trajectories(run.dir / "rft.jsonl", kept)
    result = {"questions": len(questions), **totals(log), "rft": rft}
    run.finish(result)
    print(summary(result))
    return result


# ---------------------------------------------------------------------------------------------------- the rounds


def evolve(
    directory: Path,
    questions: list[Question],
    model: torch.nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    args: Args,
    toolbox: ToolBox,
) -> list[dict]:
    """All rounds of all questions, chunk by chunk; returns the records of rounds.jsonl."""
    log = recover(directory)
    per_chunk = max(args.rollout_batch_size // max(args.num_generations, 3), 1)  # a round makes at most 3 edits
    bar = tqdm(total=len(questions), desc="flywheel", unit="question")
    for chunk, at in enumerate(range(0, len(questions), per_chunk)):
        members = questions[at : at + per_chunk]
        records = [record for record in log if record["chunk"] == chunk]
        pool: dict[str, list[Trajectory]] = {q.id: [] for q in members}
        if not _finished(records, args):
            for t in read_pool(directory, log, chunk):
                pool[t.question_id].append(t)
        while not _finished(records, args):
            record = {"chunk": chunk, "round": len(records), "picked": {}, "counts": {}}
            if not records:
                drafts = [
                    (start_draft(q, i, tokenizer, args, (args.seed,)), "sample", None)
                    for q in members
                    for i in range(args.num_generations)
                ]
                complete(model, tokenizer, [d for d, _, _ in drafts], args, toolbox)
                _count(record, "sample", "asked", len(drafts))
            else:
                drafts = edits(members, pool, records, record, model, tokenizer, args)
                finish_edits([d for d, _, _ in drafts], model, tokenizer, args, toolbox)
            added = accept(drafts, pool, record, tokenizer, args)
            append_round(directory, record, added)
            records.append(record)
            log.append(record)
            bar.set_postfix_str(progress(log))
        bar.update(len(members))
    bar.close()
    return log


def _finished(records: list[dict], args: Args) -> bool:
    """A chunk is finished after R rounds, or when a round has added nothing."""
    return len(records) > args.rounds or bool(records and not totals(records[-1:])["pool"])


Edit = tuple[Draft, str, int | None]  # draft, operator, sample_idx of its parent


def edits(
    members: list[Question],
    pool: dict[str, list[Trajectory]],
    records: list[dict],
    record: dict,
    model: torch.nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    args: Args,
) -> list[Edit]:
    """Drafts of one round: what the operators make of the picked trajectories, and fresh samples beside correct ones.

    Only questions to which the last round added something take part. Writes picks and refusals into the record.
    """
    r, critic = record["round"], CRITICS[args.critic](model, tokenizer, args)
    picked = []
    for q in members:
        if any(t.meta["round"] == r - 1 for t in pool[q.id]):
            before = {i for earlier in records for i in earlier["picked"].get(q.id, [])}
            parents = pick(pool[q.id], before) if args.per_round == "best" else pool[q.id]
            record["picked"][q.id] = [t.sample_idx for t in parents]
            picked += [(q, t) for t in parents]
    findings = {}
    for ask in dict.fromkeys(OPERATORS[name].ask for name in args.operators):
        on_correct = {OPERATORS[name].on_correct for name in args.operators if OPERATORS[name].ask == ask}
        asked = [t for _, t in picked if _correct(t) in on_correct]
        answers = getattr(critic, ask)(asked)
        findings |= {(ask, t.question_id, t.sample_idx): answer for t, answer in zip(asked, answers, strict=True)}
    drafts: list[Edit] = []
    for q, t in picked:
        for name in args.operators:
            operator = OPERATORS[name]
            if operator.on_correct != _correct(t):
                continue
            finding = findings[operator.ask, q.id, t.sample_idx]
            _count(record, name, "asked")
            if refused := isinstance(finding, str):
                _count(record, name, finding)
            rng = random.Random(seed_of(args.seed, q.id, r, name, t.sample_idx))
            made = operator.edit(t, q, None if refused else finding, tokenizer, rng)
            fit = [d for d in made if d.finish or d.response_len < args.max_completion_length]
            _count(record, name, "rejected", len(made) - len(fit) + (not made and not refused))
            drafts += [(d, name, t.sample_idx) for d in fit]
        if args.per_round == "best" and _correct(t):
            _count(record, "fresh", "asked")
            drafts.append((start_draft(q, r, tokenizer, args, (args.seed, "fresh")), "fresh", None))
    room = {q.id: args.max_per_question - len(pool[q.id]) for q in members}
    within = []
    for draft, name, parent in drafts:
        room[draft.question.id] -= 1
        if room[draft.question.id] >= 0:
            within.append((draft, name, parent))
        else:
            _count(record, name, "rejected")
    return within


def pick(group: list[Trajectory], before: set[int]) -> list[Trajectory]:
    """The trajectory to edit, not picked before: first the first sample, then higher S, then fewer calls; [] if none.

    A correct one has a higher S than any other.
    """
    if not before:
        return group[:1]
    rest = [t for t in group if t.sample_idx not in before]
    return sorted(rest, key=lambda t: (-t.rewards["correct"], t.n_calls, t.sample_idx))[:1]


def finish_edits(
    drafts: list[Draft], model: torch.nn.Module, tokenizer: PreTrainedTokenizerBase, args: Args, toolbox: ToolBox
) -> None:
    """Sample edited drafts to their end; where an edit ends in a call, that call is run first."""
    evolving = replace(args, **args.more_calls(args.extra_calls))
    calling = [d for d in drafts if not d.finish and parse_calls(turn_text(d), d.dialect)]
    with ThreadPoolExecutor(args.tool_workers) as pool:
        pending = submit_calls(calling, toolbox, evolving, set(eos_ids(model, tokenizer)), pool)
        collect_results(pending, evolving, tokenizer)
    complete(model, tokenizer, drafts, evolving, toolbox)


def accept(
    drafts: list[Edit], pool: dict[str, list[Trajectory]], record: dict, tokenizer: PreTrainedTokenizerBase, args: Args
) -> list[Trajectory]:
    """Grade finished drafts and add those with new token ids to the pool; returns them."""
    added = []
    for draft, operator, parent in drafts:
        group = pool[draft.question.id]
        draft.sample_idx = len(group)
        t = to_trajectory(draft, tokenizer)
        if any(t.token_ids == other.token_ids for other in group):
            _count(record, operator, "duplicate")
            continue
        correctness, formed = grade(t, args.format)
        t.rewards = {"correct": correctness, "format": 0.0 if formed else -1.0}
        for call in t.tool_calls:
            call.seconds = 0.0  # wall-clock: the same command has to give the same pool
        t.meta = t.meta | {"operator": operator, "round": record["round"], "parent": parent}
        _count(record, operator, "added")
        _count(record, operator, "correct", _correct(t))
        group.append(t)
        added.append(t)
    return added


def _correct(t: Trajectory) -> bool:
    return t.rewards["correct"] > CORRECT


def _count(record: dict, operator: str, what: str, n: int = 1) -> None:
    counts = record["counts"].setdefault(operator, dict.fromkeys(COUNTS, 0))
    counts[what] += int(n)


# ---------------------------------------------------------------------------------------------------- files


def append_round(directory: Path, record: dict, added: list[Trajectory]) -> None:
    """First the trajectories, then the record with the size that pool.jsonl has now: only a recorded round counts."""
    with open(directory / "pool.jsonl", "ab") as out:
        out.writelines((t.to_json() + "\n").encode() for t in added)
        out.flush()
        os.fsync(out.fileno())
        record["bytes"] = out.tell()
    with open(directory / "rounds.jsonl", "a", encoding="utf-8") as out:
        out.write(json.dumps(record, ensure_ascii=False) + "\n")


def recover(directory: Path) -> list[dict]:
    """The finished rounds of an earlier run; what pool.jsonl holds beyond them is cut off."""
    rounds, pool = directory / "rounds.jsonl", directory / "pool.jsonl"
    log = []
    if rounds.exists():
        drop_torn_line(rounds)
        log = [record for _, record in read_jsonl(rounds)]
    size = log[-1]["bytes"] if log else 0
    if pool.exists() or size:
        if not pool.exists() or pool.stat().st_size < size:
            raise DataError(f"{pool} is shorter than the {size} bytes that {rounds} has recorded; use --overwrite")
        os.truncate(pool, size)
    return log


def read_pool(directory: Path, log: list[dict], chunk: int) -> Iterator[Trajectory]:
    """The trajectories of one chunk, which lie together in pool.jsonl."""
    start = max((record["bytes"] for record in log if record["chunk"] < chunk), default=0)
    end = max((record["bytes"] for record in log if record["chunk"] <= chunk), default=0)
    if start < end:
        with open(directory / "pool.jsonl", "rb") as lines:
            lines.seek(start)
            while lines.tell() < end:
                yield Trajectory.from_json(lines.readline().decode())


def pool_groups(directory: Path, log: list[dict]) -> Iterator[list[Trajectory]]:
    """The pool, question by question, never more than a chunk of it in memory."""
    for chunk in dict.fromkeys(record["chunk"] for record in log):
        groups: dict[str, list[Trajectory]] = {}
        for t in read_pool(directory, log, chunk):
            groups.setdefault(t.question_id, []).append(t)
        yield from groups.values()


def rft_set(group: list[Trajectory], select: str = "all", most: int = 0) -> list[Trajectory]:
    """Of one question's pool: correct, well-formed, no failed call [2601.06860, sec. 4.2.1; PAPERS A2].

    select: all, in the order of the pool; fewest_calls, then fewest tokens, first. most: the first so many, 0 = all.
    """
    good = [t for t in group if _correct(t) and t.rewards["format"] == 0 and not t.failed_calls]
    if select == "fewest_calls":
        good.sort(key=lambda t: (t.n_calls, t.completion_tokens, t.sample_idx))
    return good[: most or None]


# ---------------------------------------------------------------------------------------------------- report


def totals(log: list[dict]) -> dict:
    """{"pool", "correct", "operators": {name: counts}} summed over rounds."""
    operators: dict[str, dict[str, int]] = {}
    for record in log:
        for name, counts in record["counts"].items():
            mine = operators.setdefault(name, dict.fromkeys(COUNTS, 0))
            for what, n in counts.items():
                mine[what] += n
    pool, correct = (sum(counts[what] for counts in operators.values()) for what in ("added", "correct"))
    return {"pool": pool, "correct": correct, "operators": operators}


def progress(log: list[dict]) -> str:
    """Pool size, share of correct trajectories and, per operator, added / asked."""
    now = totals(log)
    yields = " ".join(f"{name}={c['added']}/{c['asked']}" for name, c in now["operators"].items())
    return f"pool={now['pool']} correct={now['correct'] / max(now['pool'], 1):.2f} {yields}"


def summary(result: dict) -> str:
    """Table of what every operator was asked for and what it yielded."""
    rows = [[name, *c.values(), c["added"] / max(c["asked"], 1)] for name, c in result["operators"].items()]
    line = "{questions} questions, pool {pool} ({correct} correct), rft {rft}".format_map(result)
    return table(["operator", *COUNTS, "yield"], rows) + "\n" + line


if __name__ == "__main__":
    cli(main, Args)
