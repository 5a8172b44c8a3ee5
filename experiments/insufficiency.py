"""Asks how many more tool calls would have made wrong answers right, by hints [2601.06860, sec. 3; PAPERS A6].

    python -m experiments.insufficiency --model_name_or_path M --trajectories T.jsonl --index DIR --output_dir out/hints

Every wrong trajectory is cut just before its answer, given a hint that asks for another tool call, and sampled on;
while it stays wrong it gets another hint, up to `--hints`. Fixed by one call or more means that calls were
insufficient; fixed without a call, that the reasoning was. Writes hinted.jsonl (one line per wrong trajectory, in
order, with `hints` and `extra_calls` in its meta; a killed run goes on behind the last line) and result.json.
"""

import random
from collections import Counter
from dataclasses import dataclass, replace
from statistics import fmean

import torch
from tqdm import tqdm
from transformers import PreTrainedTokenizerBase

from core.args import RunArgs, arg, cli, require_positive
from core.conversation import to_trajectory
from core.model import ModelArgs
from core.run import drop_torn_line, seed_of, start_run, table
from core.trajectory import DataError, Question, Trajectory, check_tokenizer, load_trajectories
from engines.toolbox import ToolBox, open_tools
from eval.behaviour import CORRECT
from eval.grader import grade
from methods.operators import inject_hints
from rollout import RolloutArgs, complete, load_sampler, trained_flags


@dataclass
class Args(RolloutArgs, ModelArgs, RunArgs):
    """Flags of the analysis; the call limits count from the prompt on and are raised by the number of hints."""

    trajectories: str = arg("", "trajectory file of this model (required)")
    hints: int = arg(3, "most hints that a wrong trajectory gets, one after the other")

    def __post_init__(self):
        RunArgs.__post_init__(self)
        ModelArgs.__post_init__(self)
        RolloutArgs.__post_init__(self)
        if not self.trajectories:
            raise ValueError("--trajectories is required")
        require_positive(self, "hints")
        if self.branching != "none":
            raise ValueError(f"--branching {self.branching}: a hinted trajectory goes on as one")


def main(args: Args) -> dict:
    """Hint what is wrong and was not hinted yet; write result.json and print the table."""
    run = start_run(args, (args.trajectories,))
    if run.finished:
        print(f"{args.output_dir}: finished before\n{summary(run.finished)}")
        return run.finished
    trajectories = load_trajectories(args.trajectories)
    if not trajectories:
        raise DataError(f"--trajectories {args.trajectories}: holds no trajectories")
    wrong = [t for t in tqdm(trajectories, desc="grade", unit="trajectory") if grade(t)[0] <= CORRECT]
    output = run.dir / "hinted.jsonl"
    done: list[Trajectory] = []
    if output.exists():
        drop_torn_line(output)
        done = load_trajectories(output)
    model, tokenizer = load_sampler(args)
    check_tokenizer(wrong, tokenizer, f"--trajectories {args.trajectories}")
    with open_tools(args) as toolbox, open(output, "a", encoding="utf-8") as out:
        bar = tqdm(total=len(wrong), initial=len(done), desc="hint", unit="trajectory")
        for at in range(len(done), len(wrong), args.rollout_batch_size):
            chunk = hinted(wrong[at : at + args.rollout_batch_size], model, tokenizer, args, toolbox)
            out.writelines(t.to_json() + "\n" for t in chunk)
            out.flush()
            done += chunk
            bar.update(len(chunk))
        bar.close()
    sets: dict[str, list[Trajectory]] = {"all": done}
    for t in done:
        sets.setdefault(t.family, []).append(t)
    result = {"trajectories": len(trajectories), "sets": {name: measure(members) for name, members in sets.items()}}
    run.finish(result)
    print(summary(result))
    return result


def hinted(
    wrong: list[Trajectory], model: torch.nn.Module, tokenizer: PreTrainedTokenizerBase, args: Args, toolbox: ToolBox
) -> list[Trajectory]:
    """Each trajectory after its hints, graded; one without a finished answer, or without room, stays as it was."""
    raised = replace(args, **args.more_calls(args.hints))
    now = [replace(t, rewards={"correct": grade(t)[0]}, meta=t.meta | {"hints": 0, "extra_calls": 0}) for t in wrong]
    for hint in range(1, args.hints + 1):
        drafts = {}
        for i, t in enumerate(now):
            if _correct(t) or t.meta["hints"] < hint - 1:
                continue
            meta = {k: v for k, v in t.meta.items() if k != "tools"}
            question = Question(t.question_id, t.question, t.gold, t.task, tools=t.meta.get("tools"), meta=meta)
            rng = random.Random(seed_of(args.seed, t.question_id, t.sample_idx, hint))
            drafts |= {i: d for d in inject_hints(t, question, None, tokenizer, rng)}
        drafts = {i: d for i, d in drafts.items() if d.response_len < args.max_completion_length}
        complete(model, tokenizer, list(drafts.values()), raised, toolbox)
        for i, draft in drafts.items():
            t = to_trajectory(draft, tokenizer)
            meta = t.meta | {"hints": hint, "extra_calls": t.n_calls - wrong[i].n_calls}
            now[i] = replace(t, sample_idx=wrong[i].sample_idx, rewards={"correct": grade(t)[0]}, meta=meta)
    return now


def measure(hinted_ones: list[Trajectory]) -> dict:
    """Numbers of a set of wrong trajectories after their hints.

    fixed, insufficient (fixed by a call or more), not_hinted (they had no finished answer): shares of the wrong ones;
    extra_calls: number of fixed trajectories by calls beyond those of the wrong one; mean_extra_calls over the same.
    """
    fixed = [t.meta["extra_calls"] for t in hinted_ones if _correct(t)]
    n = max(len(hinted_ones), 1)
    return {
        "wrong": len(hinted_ones),
        "fixed": len(fixed) / n,
        "insufficient": sum(extra > 0 for extra in fixed) / n,
        "not_hinted": sum(t.meta["hints"] == 0 for t in hinted_ones) / n,
        "mean_extra_calls": fmean(fixed) if fixed else 0.0,
        "extra_calls": {str(extra): count for extra, count in sorted(Counter(fixed).items())},
    }


def summary(result: dict) -> str:
    """Table of all wrong trajectories and of each family (else task)."""
    columns = list(result["sets"]["all"])
    rows = [[name, *row.values()] for name, row in result["sets"].items()]
    return table(["", *columns], rows) + f"\n{result['trajectories']} trajectories in all"


def _correct(t: Trajectory) -> bool:
    return t.rewards["correct"] > CORRECT


if __name__ == "__main__":
    cli(main, Args, trained_flags)
