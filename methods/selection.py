"""Which questions to train on: group-wise Pareto sampling of ET-Agent [2601.06860, sec. 4.2.2; PAPERS A3] and controls.

    python -m methods.selection --trajectories T.jsonl --data Q.jsonl --selector pareto --num_questions 1000 --output S.jsonl

1. Grade the K trajectories of each question: S_corr = std of correctness, S_tool = std of the number of calls.
2. Leave out questions without signal: all right or all wrong (QA: without an F1 >= 0.75 and one below).
3. SELECTORS[--selector] takes N of the rest; their rows are written in the order of --data.
"""

import json
import random
from bisect import bisect_right
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, pstdev
from typing import Literal, NamedTuple

import numpy as np
from tqdm import tqdm

from core.args import arg, cli
from core.run import seed_of, table, write_text
from core.trajectory import DataError, Question, Task, Trajectory, read_jsonl, write_jsonl
from data.questions import load_questions
from eval.grader import grade

STATISTICS = ("n", "correctness", "calls", "S_corr", "S_tool")
QA_RIGHT = 0.75  # F1 from which a QA trajectory counts as right here (the flywheel asks for more than 0.8)


def pareto_select(points: list[tuple[float, float]], n: int) -> list[int]:
    """Indices (ascending) of the n best points by non-dominated fronts, then crowding distance [2601.06860, alg. 2, 3].

    points: (S_corr, S_tool) per question, both maximised; points with S_corr == 0 are dropped. Whole fronts are taken
    in order, the one that does not fit is cut by crowding distance, ties to the lower index. Returns min(n, available).
    O(N log N). ValueError for a negative n or a value that is not finite.
    """
    values = np.asarray(points, dtype=np.float64).reshape(-1, 2)  # (N, 2)
    if n < 0 or not np.isfinite(values).all():
        raise ValueError(f"pareto_select needs n >= 0 and finite points, n is {n}")
    kept = np.flatnonzero(values[:, 0] != 0)
    n = min(n, len(kept))
    if n == 0:
        return []
    values = values[kept]
    front = front_numbers(values)
    last = np.sort(front)[n - 1]
    whole, partial = np.flatnonzero(front < last), np.flatnonzero(front == last)
    least_crowded = np.argsort(-crowding_distance(values[partial]), kind="stable")[: n - len(whole)]
    return sorted(kept[np.concatenate([whole, partial[least_crowded]])].tolist())


def front_numbers(values: np.ndarray) -> np.ndarray:
    """Front of every point, 0 = dominated by none; equal points do not dominate each other. (N, 2) -> (N,)."""
    # By falling x, then falling y, all that can dominate a point come before it: those with a y at least as large.
    unique, inverse = np.unique(0.0 - values, axis=0, return_inverse=True)
    lowest, number = [], []  # per front: −(largest y so far), which rises from front to front
    for minus_y in unique[:, 1].tolist():
        front = bisect_right(lowest, minus_y)
        lowest[front : front + 1] = [minus_y]
        number.append(front)
    return np.array(number)[inverse.reshape(-1)]


def crowding_distance(values: np.ndarray) -> np.ndarray:
    """Σ over both axes of (next − previous) / range inside one front, ends infinite. (M, 2) -> (M,).

    An axis without range contributes nothing, no infinity either; equal values stand in the given order.
    """
    distance = np.zeros(len(values))
    for column in values.T:
        spread = column.max() - column.min()
        if spread == 0:
            continue
        order = np.argsort(column, kind="stable")
        distance[order[1:-1]] += (column[order[2:]] - column[order[:-2]]) / spread
        distance[order[[0, -1]]] = np.inf
    return distance


# ---------------------------------------------------------------------------------------------------- selectors


def take_all(points: list[tuple[float, float]], n: int, rng: random.Random) -> list[int]:
    """Every question; n is not read (the command refuses one)."""
    return list(range(len(points)))


def take_random(points: list[tuple[float, float]], n: int, rng: random.Random) -> list[int]:
    """n questions with equal chances: the control of Pareto sampling at equal N."""
    return rng.sample(range(len(points)), min(n, len(points)))


def take_pareto(points: list[tuple[float, float]], n: int, rng: random.Random) -> list[int]:
    """`pareto_select` after a shuffle: with K = 16 and binary correctness most points are ties [PAPERS A3]."""
    order = rng.sample(range(len(points)), len(points))
    return [order[i] for i in pareto_select([points[i] for i in order], n)]


def take_s_corr(points: list[tuple[float, float]], n: int, rng: random.Random) -> list[int]:
    """The n largest S_corr, ties in random order."""
    order = rng.sample(range(len(points)), len(points))
    return sorted(order, key=lambda i: -points[i][0])[:n]


def take_s_tool(points: list[tuple[float, float]], n: int, rng: random.Random) -> list[int]:
    """The n largest S_tool, ties in random order."""
    order = rng.sample(range(len(points)), len(points))
    return sorted(order, key=lambda i: -points[i][1])[:n]


# name -> (points, n, rng) -> indices
SELECTORS = {
    "all": take_all,
    "random": take_random,
    "pareto": take_pareto,
    "s_corr_only": take_s_corr,
    "s_tool_only": take_s_tool,
}


class Group(NamedTuple):
    """What selection needs to know of the K trajectories of one question."""

    question_id: str
    task: Task
    scores: list[float]
    calls: list[int]

    @property
    def point(self) -> tuple[float, float]:
        """(S_corr, S_tool): population standard deviations."""
        return pstdev(self.scores), pstdev(self.calls)

    @property
    def has_signal(self) -> bool:
        """False where all are right or all are wrong, so that a group advantage has nothing to say."""
        right = [s >= QA_RIGHT for s in self.scores] if self.task == "qa" else self.scores
        return min(right) < max(right)


def select(groups: list[Group], selector: Literal[tuple(SELECTORS)], n: int, seed: int) -> list[int]:
    """Indices (ascending) into groups; every selector but `all` sees only groups with signal."""
    eligible = [i for i, g in enumerate(groups) if selector == "all" or g.has_signal]
    chosen = SELECTORS[selector]([groups[i].point for i in eligible], n, random.Random(seed_of(seed, "select")))
    return sorted(eligible[i] for i in chosen)


# ---------------------------------------------------------------------------------------------------- command line


@dataclass
class Args:
    """Flags of the command line."""

    trajectories: str = arg("", "trajectory file with K samples of each question (required; ET-Agent K = 16)")
    data: str = arg("", "the questions they were sampled for: jsonl, verl parquet or dataset id (required)")
    output: str = arg("", "jsonl file for the selected questions (required)")
    selector: Literal[tuple(SELECTORS)] = arg("pareto", "how questions are chosen")
    num_questions: int = arg(0, "N, questions to choose (required, except for --selector all)")
    task: Literal["auto", "math", "qa", "function"] = arg("auto", "task of all rows; auto = what the row says")
    split: str = arg("train", "split, if --data is a dataset id")
    seed: int = arg(0, "seed of the shuffle that breaks ties")
    overwrite: bool = arg(False, "replace an existing output file")

    def __post_init__(self):
        if not (self.trajectories and self.data and self.output):
            raise ValueError("--trajectories, --data and --output are required")
        if (self.selector == "all") != (self.num_questions == 0) or self.num_questions < 0:
            raise ValueError(f"--num_questions {self.num_questions} does not go with --selector {self.selector}")


def main(args: Args) -> list[Question]:
    """Select questions, write their rows, print (and write beside them) how they differ from the rest."""
    if Path(args.output).exists() and not args.overwrite:
        raise DataError(f"--output {args.output} exists; use another or --overwrite")
    questions = {q.id: q for q in load_questions(args.data, args.task, split=args.split)}
    groups = read_groups(args.trajectories, questions)
    chosen = [groups[i] for i in select(groups, args.selector, args.num_questions, args.seed)]
    sets = {"sampled": groups, "with signal": [g for g in groups if g.has_signal], "selected": chosen}
    numbers = {name: statistics(members) for name, members in sets.items()}
    print(table(["questions", *STATISTICS], [[name, *row.values()] for name, row in numbers.items()]))
    Path(args.output).parent.mkdir(parents=True, exist_ok=True)
    write_text(Path(args.output + ".statistics.json"), json.dumps(numbers, indent=1) + "\n")
    write_jsonl(args.output, (row_of(questions[g.question_id]) for g in chosen))
    return [questions[g.question_id] for g in chosen]


def statistics(groups: list[Group]) -> dict[str, float]:
    """Number of questions, and means over them of correctness, calls, S_corr and S_tool (0 if there are none)."""
    rows = [(fmean(g.scores), fmean(g.calls), *g.point) for g in groups]
    return dict(zip(STATISTICS, (len(groups), *(map(fmean, zip(*rows)) if rows else [0.0] * 4))))


def read_groups(path: str, questions: dict[str, Question]) -> list[Group]:
    """Grade a trajectory file line by line (it may be larger than memory); groups in the order of `questions`."""
    groups: dict[str, Group] = {}
    for number, row in tqdm(read_jsonl(path), desc="grade", unit="trajectory"):
        try:
            t = Trajectory.from_row(row)
        except ValueError as e:
            raise DataError(f"{path}:{number}: {e}") from None
        if t.question_id not in questions:
            raise DataError(f"{path}:{number}: question_id {t.question_id!r} is not in --data")
        group = groups.setdefault(t.question_id, Group(t.question_id, t.task, [], []))
        group.scores.append(grade(t)[0])
        group.calls.append(t.n_calls)
    if not groups:
        raise DataError(f"{path}: holds no trajectories")
    return [groups[i] for i in questions if i in groups]


def row_of(question: Question) -> dict:
    """The jsonl row that `question_of` reads back as an equal question."""
    row = {"id": question.id, "question": question.question, "answer": question.gold, "task": question.task}
    if question.system:
        messages = [("system", question.system), ("user", row.pop("question"))]
        row["prompt"] = [{"role": role, "content": text} for role, text in messages]
    if question.tools is not None:
        row["tools"] = question.tools
    return row | question.meta


if __name__ == "__main__":
    cli(main, Args)
