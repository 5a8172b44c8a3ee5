"""AutoTool's data refinement for RL: balanced difficulty, then the steadiest rewards [2603.13348; PAPERS B2].

    python -m methods.refine --trajectories probe-1.jsonl probe-2.jsonl --data Q.jsonl --output R.jsonl --num_questions 700

Each file holds samples of the same questions from one probe epoch: rollouts of the checkpoints of a short RL run.
1. Drop half of the questions that every sample of every epoch solves, and half of those that none solves.
2. Keep N of the rest by --refine; their rows are written in the order of --data, statistics to OUTPUT.statistics.json.
"""

import json
import random
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, variance
from typing import Literal, NamedTuple

from tqdm import tqdm

from core.args import arg, cli, require_positive
from core.run import seed_of, table, write_text
from core.trajectory import DataError, Question, groups_of, load_trajectories, write_jsonl
from data.questions import load_questions
from eval.behaviour import CORRECT
from eval.grader import grade
from grpo.advantages import MIN_STD
from grpo.rewards import REWARDS
from methods.selection import row_of

RefineName = Literal["epochs_low", "rollouts_low", "rollouts_high", "random"]


class Probe(NamedTuple):
    """Rewards of one question: its samples' rewards, a list for each epoch, and the share of samples that are right."""

    question_id: str
    epochs: list[list[float]]
    solved: float

    @property
    def over_epochs(self) -> float:
        """Var(r) = Σ (r_i − μ)² / (n − 1) of the group means r_i; 0 for a single epoch."""
        means = [fmean(rewards) for rewards in self.epochs]
        return variance(means) if len(means) > 1 else 0.0

    @property
    def over_rollouts(self) -> float:
        """Sample variance within a group, mean over the epochs; 0 where no group ever has a signal."""
        return fmean(variance(rewards) if len(rewards) > 1 else 0.0 for rewards in self.epochs)


def balanced(probes: list[Probe], rng: random.Random) -> list[Probe]:
    """Without half (rounded down) of the always solved and half of the never solved questions, drawn at random."""
    dropped = set()
    for share in (1.0, 0.0):
        ids = [p.question_id for p in probes if p.solved == share]
        dropped |= set(rng.sample(ids, len(ids) // 2))
    return [p for p in probes if p.question_id not in dropped]


def refine(probes: list[Probe], how: RefineName, n: int, rng: random.Random) -> list[Probe]:
    """min(n, available) of the questions, ties in random order.

    epochs_low: lowest variance across training, questions whose groups never vary removed first (our reading) ·
    rollouts_low, rollouts_high: lowest, highest variance across the samples of a group · random: the control.
    """
    pool = rng.sample(probes, len(probes))
    if how == "epochs_low":
        pool = sorted((p for p in pool if p.over_rollouts > MIN_STD**2), key=lambda p: p.over_epochs)
    elif how == "rollouts_low":
        pool.sort(key=lambda p: p.over_rollouts)
    elif how == "rollouts_high":
        pool.sort(key=lambda p: -p.over_rollouts)
    return pool[:n]


# ---------------------------------------------------------------------------------------------------- command line


@dataclass
class Args:
    """Flags of the command line."""

    trajectories: list[str] = arg([], "one trajectory file per probe epoch, in order (required)")
    data: str = arg("", "the questions they were sampled for: jsonl, verl parquet or dataset id (required)")
    output: str = arg("", "jsonl file for the kept questions (required)")
    num_questions: int = arg(0, "N, questions to keep (required; AutoTool keeps a third)")
    refine: RefineName = arg("epochs_low", "which questions are kept")
    reward: Literal["autotool", "correct"] = arg("autotool", "reward whose variance counts")
    format: Literal["lenient", "strict"] = arg("lenient", "what counts as well formed, as in train_rl.py")
    task: Literal["auto", "math", "qa", "function"] = arg("auto", "task of all rows; auto = what the row says")
    split: str = arg("train", "split, if --data is a dataset id")
    seed: int = arg(0, "seed of what is dropped, of ties and of the random control")
    overwrite: bool = arg(False, "replace an existing output file")

    def __post_init__(self):
        if not (self.trajectories and self.data and self.output):
            raise ValueError("--trajectories, --data and --output are required")
        require_positive(self, "num_questions")
        if self.refine == "epochs_low" and len(self.trajectories) < 2:
            raise ValueError("--refine epochs_low needs the --trajectories of two epochs at least")


def main(args: Args) -> list[Question]:
    """Refine the questions, write rows and statistics and print how the kept ones differ from the rest."""
    if Path(args.output).exists() and not args.overwrite:
        raise DataError(f"--output {args.output} exists; use another or --overwrite")
    questions = {q.id: q for q in load_questions(args.data, args.task, split=args.split)}
    probes = read_probes(args.trajectories, questions, args)
    rng = random.Random(seed_of(args.seed, "refine"))
    pool = balanced(probes, rng)
    chosen = {p.question_id for p in refine(pool, args.refine, args.num_questions, rng)}
    kept = [p for p in probes if p.question_id in chosen]
    write_jsonl(args.output, (row_of(questions[p.question_id]) for p in kept))
    sets = {"sampled": probes, "balanced": pool, "kept": kept}
    statistics = {name: _statistics(set_) for name, set_ in sets.items() if set_}
    write_text(Path(args.output + ".statistics.json"), json.dumps(statistics, indent=1) + "\n")
    print(table(["questions", *statistics["sampled"]], [[name, *row.values()] for name, row in statistics.items()]))
    return [questions[p.question_id] for p in kept]


def read_probes(paths: list[str], questions: dict[str, Question], args: Args) -> list[Probe]:
    """Grade the files of all epochs; questions in the order of --data. DataError if they do not hold the same ones."""
    epochs, right = {}, {}
    for epoch, path in enumerate(paths):
        groups = groups_of(load_trajectories(path))
        for group in tqdm(groups, desc=f"grade {path}", unit="question"):
            question_id = group[0].question_id
            if question_id not in questions:
                raise DataError(f"{path}: question_id {question_id!r} is not in --data")
            correctness, formed = zip(*(grade(t, args.format) for t in group))
            terms = REWARDS[args.reward](group, list(correctness), list(formed), args)
            epochs.setdefault(question_id, []).append([t["total"] for t in terms])
            right.setdefault(question_id, []).extend(s > CORRECT for s in correctness)
        if odd := next((i for i, found in epochs.items() if len(found) != epoch + 1), None):
            raise DataError(f"{path}: question_id {odd!r} is not in every file of --trajectories")
    if not epochs:
        raise DataError(f"{paths[0]}: holds no trajectories")
    return [Probe(i, epochs[i], fmean(right[i])) for i in questions if i in epochs]


def _statistics(probes: list[Probe]) -> dict[str, float]:
    return {
        "n": len(probes),
        "solved": fmean(p.solved for p in probes),
        "always": fmean(p.solved == 1 for p in probes),
        "never": fmean(p.solved == 0 for p in probes),
        "variance_over_epochs": fmean(p.over_epochs for p in probes),
        "variance_over_rollouts": fmean(p.over_rollouts for p in probes),
    }


if __name__ == "__main__":
    cli(main, Args)
