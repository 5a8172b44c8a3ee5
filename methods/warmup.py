"""AutoTool's warm-up set: each question with a short or a long answer as its label [2603.13348; PAPERS B1].

    python -m methods.warmup --model_name_or_path data/tiny --data Q.jsonl --index DIR --search_top_k 1 --output out/warmup

1. Sample `num_generations` answers without thinking and as many with it (from a second model, if one is named).
2. If the answers without thinking solve the question (--label_rule), its label is one of them; else one with thinking.
3. Write OUTPUT/sft.jsonl for train_sft.py and OUTPUT/statistics.json.
A label is always a right and well-formed sample, the first there is (our reading); questions without one are left out
and counted. The sampling files no_think.jsonl and think.jsonl stay there, and a killed run goes on where it stopped.
"""

import json
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import fmean
from typing import Literal

from tqdm import tqdm

import rollout
from core.args import arg, cli, flags_of
from core.run import table, write_text
from core.trajectory import Trajectory, groups_of, save_trajectories
from eval.behaviour import CORRECT
from eval.grader import grade

LabelRule = Literal["any", "majority"]


@dataclass
class Args(rollout.Args):
    """Flags of the builder: those of rollout.py, and how labels are chosen."""

    output: str = arg("", "folder for sft.jsonl, statistics.json and the two sampling files (required)")
    think_model_name_or_path: str = arg("", "model of the think samples (AutoTool: a larger one); default: the same")
    label_rule: LabelRule = arg("any", "short if any, or more than half, of the answers without thinking are right")

    def __post_init__(self):
        super().__post_init__()
        if self.mode != "auto":
            raise ValueError(f"--mode {self.mode}: both modes are sampled here")


def main(args: Args) -> list[Trajectory]:
    """Sample what is missing, choose the labels, write rows and statistics; returns the rows."""
    out = Path(args.output)
    out.mkdir(parents=True, exist_ok=True)
    samples = {mode: [] for mode in ("no_think", "think")}
    for mode in samples:
        flags = flags_of(rollout.Args, args)
        flags |= {"mode": mode, "output": str(out / f"{mode}.jsonl")}
        if mode == "think" and args.think_model_name_or_path:
            flags["model_name_or_path"] = args.think_model_name_or_path
        samples[mode] = rollout.main(rollout.Args(**flags))
    short, long = (
        {g[0].question_id: right_samples(g, args.format) for g in groups_of(samples[mode])} for mode in samples
    )
    first = {t.question_id: t for t in samples["no_think"]}
    rows, per_family = [], {}
    for question_id, t in first.items():
        row = label(short[question_id], long[question_id], args.label_rule)
        rows += [as_demonstration(row)] if row else []
        for family in ("all", t.family):
            per_family.setdefault(family, []).append((row, short[question_id], long[question_id]))
    save_trajectories(out / "sft.jsonl", rows)
    statistics = {family: _statistics(found) for family, found in per_family.items()}
    write_text(out / "statistics.json", json.dumps(statistics, indent=1) + "\n")
    print(table(["", *statistics["all"]], [[name, *values.values()] for name, values in statistics.items()]))
    return rows


def right_samples(group: list[Trajectory], format: str = "lenient") -> list[Trajectory | None]:
    """The samples of a group, None in place of those that are wrong or malformed."""
    graded = [(t, *grade(t, format)) for t in tqdm(group, desc="grade", leave=False)]
    return [t if s > CORRECT and formed else None for t, s, formed in graded]


def label(short: list[Trajectory | None], long: list[Trajectory | None], rule: LabelRule) -> Trajectory | None:
    """The sample that labels a question; None if the mode it calls for has no right one. A forced think block that the
    model closed at once is no thinking and labels nothing."""
    right = sum(t is not None for t in short)
    if right > (len(short) / 2 if rule == "majority" else 0):
        return next(t for t in short if t)
    return next((t for t in long if t and t.mode == "think"), None)


def as_demonstration(t: Trajectory) -> Trajectory:
    """The sample as an SFT row: the forced opening, which was given, is what it has to teach and gets mask 1."""
    mask = list(t.loss_mask)
    start = mask.index(1)
    mask[t.prompt_len : start] = [1] * (start - t.prompt_len)
    return replace(t, loss_mask=mask, sampled=False)


def _statistics(found: list[tuple]) -> dict[str, float]:
    """Shares of questions and mean accuracies; `short_by_luck`: share of short labels solved by at most half."""
    rows = [row for row, _, _ in found if row]
    accuracy = [fmean(t is not None for t in short) for _, short, _ in found]
    labelled_short = [a for a, (row, _, _) in zip(accuracy, found) if row and row.mode == "no_think"]
    return {
        "questions": len(found),
        "short": len(labelled_short),
        "long": len(rows) - len(labelled_short),
        "left_out": len(found) - len(rows),
        "no_think_accuracy": fmean(accuracy),
        "think_accuracy": fmean(fmean(t is not None for t in long) for _, _, long in found),
        "short_by_luck": fmean([a <= 0.5 for a in labelled_short] or [0]),
        "tokens": fmean([t.completion_tokens for t in rows] or [0]),
    }


if __name__ == "__main__":
    cli(main, Args)
