"""Evaluate a trajectory file: the metrics of PAPERS A6, behaviour rates, and the analyses of ET-Agent sec. 3.

    python -m eval.evaluate --trajectories T.jsonl --output DIR

Writes DIR/metrics.json: overall, per family or task, and per number of terms where rows have them; no wall-clock in
it. `rollout.py --evaluate` does the same with what it has sampled.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Literal

from tqdm import tqdm

from core.args import arg, check_numbers, cli
from core.run import table, write_text
from core.trajectory import DataError, Trajectory, load_trajectories
from eval.behaviour import call_spread, failure_histogram, needed_calls, rates
from eval.grader import grade
from eval.metrics import acu, efficiency, exact_match, extract_answer, f1_et, reasoning_length, successful_execution

COLUMNS = (
    "n", "correctness", "efficiency", "conciseness", "successful_execution", "reasoning_length", "calls", "redundant",
    "redundant_calls", "insufficient", "failed", "tokens", "thinking_rate",
)  # fmt: skip


@dataclass
class Args:
    """Flags of evaluation."""

    trajectories: str = arg("", "trajectory file to evaluate, from rollout.py or a flywheel's pool (required)")
    output: str = arg("", "folder for metrics.json (required)")
    format: Literal["lenient", "strict"] = arg("lenient", "what counts as well formed, as in rollout.py")
    billion_parameters: float = arg(0.0, "size of the model; > 0 adds acu, points / (billions · hundreds of tokens)")

    def __post_init__(self):
        if not self.trajectories or not self.output:
            raise ValueError("--trajectories and --output are required")
        check_numbers(self)


def main(args: Args) -> dict:
    """Evaluate, print the table, write metrics.json and return its content."""
    trajectories = load_trajectories(args.trajectories)
    if not trajectories:
        raise DataError(f"--trajectories {args.trajectories}: holds no trajectories")
    return write_metrics(trajectories, Path(args.output, "metrics.json"), args.billion_parameters, args.format)


def write_metrics(
    trajectories: list[Trajectory], path: Path, billion_parameters: float = 0.0, format: str = "lenient"
) -> dict:
    """Evaluate, print the table, write the metrics to a json file and return them."""
    metrics = evaluate(trajectories, billion_parameters, format)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text(path, json.dumps(metrics, indent=1) + "\n")
    print(metrics_table({"all": metrics["all"], **metrics["families"], **metrics["subsets"]}))
    return metrics


def evaluate(trajectories: list[Trajectory], billion_parameters: float = 0.0, format: str = "lenient") -> dict:
    """{"all": metrics, "families": {name: metrics}, "subsets": …}; the family is the row's, else its task.

    subsets: the families whose rows have a number of `terms` (running_sum), by that number. failed_calls: trajectories
    by their failed calls; call_spread_of_correct: questions by max − min calls of their correct trajectories
    [2601.06860, sec. 3]. billion_parameters > 0 adds `acu` to every set. format: what `malformed` counts.
    """
    scored = [(t, *grade(t, format)) for t in tqdm(trajectories, desc="grade", unit="trajectory", leave=False)]
    families: dict[str, list] = {}
    subsets: dict[str, list] = {}
    for row in scored:
        family = row[0].family
        families.setdefault(family, []).append(row)
        if "terms" in row[0].meta:
            subsets.setdefault(f"{family}, {row[0].meta['terms']} terms", []).append(row)
    return {
        "all": _metrics(scored, billion_parameters),
        "families": {name: _metrics(rows, billion_parameters) for name, rows in sorted(families.items())},
        "subsets": {name: _metrics(rows, billion_parameters) for name, rows in sorted(subsets.items())},
        "failed_calls": {str(k): n for k, n in failure_histogram(trajectories).items()},  # as json will have it
        "call_spread_of_correct": {str(k): n for k, n in call_spread(trajectories, [s for _, s, _ in scored]).items()},
    }


def _metrics(scored: list[tuple[Trajectory, float, bool]], billion_parameters: float) -> dict[str, float]:
    """All numbers of one set; shares and means per trajectory, `failed` and `redundant_calls` shares of calls.

    correctness: S of training (math 0/1, SQuAD F1, calls 0/1); for qa also exact_match and f1_et, ET-Agent's variant.
    """
    trajectories = [t for t, _, _ in scored]
    correct = [s for _, s, _ in scored]
    calls = [t.n_calls for t in trajectories]
    tokens = [t.completion_tokens for t in trajectories]
    behaviour = rates(trajectories, correct)
    metrics = {
        "n": len(scored),
        "correctness": fmean(correct),
        "efficiency": efficiency(correct, calls),
        "conciseness": 1 - behaviour["redundant"],
        "successful_execution": successful_execution(correct, [t.failed_calls for t in trajectories]),
        "reasoning_length": reasoning_length(correct, tokens),
        "calls": fmean(calls),
        "redundant": behaviour["redundant"],
        "redundant_calls": behaviour["redundant_calls"],
        "insufficient": behaviour["insufficient"],
        "failed": behaviour["failed"],
        "tokens": fmean(tokens),
        "thinking_rate": fmean(t.mode == "think" for t in trajectories),
        "malformed": fmean(not formed for _, _, formed in scored),
        "void_turns": behaviour["void"],
    }
    if billion_parameters > 0:
        metrics["acu"] = acu(correct, tokens, billion_parameters)
    needed = [needed_calls(t) for t in trajectories]
    if None not in needed:
        metrics["needed_calls"] = fmean(needed)
    if qa := [t for t in trajectories if t.task == "qa"]:
        answers = [extract_answer(t.response_text) if t.finish == "eos" else "" for t in qa]
        metrics["exact_match"] = fmean(exact_match(a, t.gold) for a, t in zip(answers, qa))
        metrics["f1_et"] = fmean(f1_et(a, t.gold) for a, t in zip(answers, qa))
    return metrics


def metrics_table(rows: dict[str, dict]) -> str:
    """Markdown table of named metric sets; reasoning_length is shown ×1000 as in the paper."""
    shown = [
        [name, *(1000 * row[c] if c == "reasoning_length" else row[c] for c in COLUMNS)] for name, row in rows.items()
    ]
    return table(["", *(c + " ×1000" if c == "reasoning_length" else c for c in COLUMNS)], shown)


if __name__ == "__main__":
    cli(main, Args)
