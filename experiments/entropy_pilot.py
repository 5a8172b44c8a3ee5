"""Asks whether a model is surer after a needed tool call than after a useless one: the pilot of the entropy rewards.

    python -m experiments.entropy_pilot --trajectories T.jsonl --output DIR [--model_name_or_path M] [--segment S]

ΔH is the change of mean token entropy from the segment before a call to the one behind it [2602.02050; PAPERS C1]. On a
file of trajectories with token entropies (or with the model that computes them, at T = 1) this gives the share of calls
that reduce it, ΔH by label, tool, correctness and family, the AUC of −ΔH for "needed" and correlations, with 95 %
bootstrap intervals over questions. Writes entropy_pilot.json, entropy_pilot.md and a figure.
"""

import json
from collections.abc import Callable
from dataclasses import dataclass
from math import isnan, nan
from pathlib import Path
from statistics import fmean, stdev
from typing import Any, NamedTuple

import numpy as np

from core.args import arg, check_numbers, cli
from core.model import ModelArgs, device, load_policy, token_entropies
from core.run import table, write_text
from core.segments import Segment, calls_by_turn, entropy_changes, reducing, segment_entropies
from core.trajectory import DataError, Trajectory, check_tokenizer, load_trajectories
from eval.behaviour import CORRECT, call_labels
from eval.grader import grade
from experiments.figures import pyplot, save

LABELS = ("needed", "redundant", "repeated", "failed")
RESAMPLES = 1000
FEW = 20  # calls of either class below which the AUC's interval would be narrower than the truth, and is left out


class Call(NamedTuple):
    """One call: H(r_{k−1}) before it and its ΔH_k in nats (nan: an empty segment), I_k, and what is known about it."""

    question_id: str
    before: float
    change: float
    reduces: bool
    label: str
    tool: str
    answer: str  # right | wrong, of the whole trajectory
    family: str


def calls_of(
    trajectories: list[Trajectory], correctness: list[float], segment: Segment = "reasoning", margin: float = 0.0
) -> list[Call]:
    """Every call of the trajectories; several calls in one turn are one, labelled and named by the first."""
    calls = []
    for t, s in zip(trajectories, correctness, strict=True):
        entropies, labels = segment_entropies(t, segment), call_labels(t)
        changes, indicators = entropy_changes(entropies), reducing(entropies, margin)
        answer = "right" if s > CORRECT else "wrong"
        for found, before, change, reduces in zip(calls_by_turn(t), entropies, changes, indicators):
            label, name = labels[found.start], t.tool_calls[found.start].name
            calls.append(Call(t.question_id, before, change, reduces, label, name, answer, t.family))
    return calls


# ---------------------------------------------------------------------------------------------------- statistics


def auc(scores: np.ndarray, positive: np.ndarray, weights: np.ndarray | None = None) -> float:
    """P(score of a positive > that of a negative), ties count half; nan without both kinds. All (N,), scores finite."""
    positive = np.asarray(positive, dtype=bool)
    weights = np.ones(len(positive)) if weights is None else weights
    _, level = np.unique(scores, return_inverse=True)
    up = np.bincount(level, weights * positive)  # weight of the positives at each distinct score, rising
    down = np.bincount(level, weights * ~positive)
    pairs = up.sum() * down.sum()
    return float((up * (down.cumsum() - down / 2)).sum() / pairs) if pairs else nan


def correlation(x: np.ndarray, y: np.ndarray, weights: np.ndarray | None = None) -> float:
    """Pearson's r, nan if either does not vary. All (N,)."""
    weights = np.ones(len(x)) if weights is None else weights
    if not weights.sum():
        return nan
    x, y = x - np.average(x, weights=weights), y - np.average(y, weights=weights)
    spread = np.average(x * x, weights=weights) * np.average(y * y, weights=weights)
    return float(np.average(x * y, weights=weights) / spread**0.5) if spread > 1e-24 else nan


def with_interval(
    statistic: Callable[..., float], x: np.ndarray, y: np.ndarray, clusters: list[str], seed: int = 0
) -> dict[str, float | None]:
    """The statistic of (x, y, weights) with its 95 % percentile interval over resampled clusters (questions).

    None where the statistic is not defined; resamples in which it is not are left out.
    """
    names, of = np.unique(np.asarray(clusters, dtype=object).astype(str), return_inverse=True)
    rng, values = np.random.default_rng(seed), []
    for _ in range(RESAMPLES if len(names) else 0):
        drawn = np.bincount(rng.integers(len(names), size=len(names)), minlength=len(names))
        values.append(statistic(x, y, drawn[of].astype(float)))
    defined = [v for v in values if not isnan(v)]
    low, high = np.percentile(defined, [2.5, 97.5]) if defined else (nan, nan)
    point = statistic(x, y) if len(names) else nan
    return {k: None if isnan(v) else float(v) for k, v in (("value", point), ("low", low), ("high", high))}


def summary(calls: list[Call]) -> dict[str, float | None]:
    """n, share with I_k = 1, mean and std of ΔH and mean H before, over the calls without an empty segment."""
    known = [c for c in calls if not isnan(c.change)]
    return {
        "n": len(calls),
        "empty": len(calls) - len(known),
        "reducing": fmean(c.reduces for c in known) if known else None,
        "change": fmean(c.change for c in known) if known else None,
        "change_std": stdev(c.change for c in known) if len(known) > 1 else None,
        "before": fmean(c.before for c in known) if known else None,
    }


def analyse(
    trajectories: list[Trajectory], correctness: list[float], segment: Segment = "reasoning", margin: float = 0.0
) -> tuple[dict, list[Call]]:
    """(the whole analysis as plain numbers, the calls). AUC: needed against redundant and repeated calls."""
    calls = calls_of(trajectories, correctness, segment, margin)
    result: dict[str, Any] = {"segment": segment, "delta_margin": margin, "all": summary(calls)}
    for field in ("label", "tool", "answer", "family"):
        names = sorted({getattr(c, field) for c in calls}, key=lambda v: (LABELS.index(v) if v in LABELS else 0, v))
        result[field] = {name: summary([c for c in calls if getattr(c, field) == name]) for name in names}
    judged = [c for c in calls if c.label != "failed" and not isnan(c.change)]
    scores, needed = np.array([-c.change for c in judged]), np.array([c.label == "needed" for c in judged], dtype=bool)
    result["auc_needed"] = with_interval(auc, scores, needed, [c.question_id for c in judged])
    result["auc_calls"] = {"needed": int(needed.sum()), "others": int((~needed).sum())}
    if min(result["auc_calls"].values()) < FEW:
        result["auc_needed"] |= {"low": None, "high": None}
    rows = [(t, s, reducing(segment_entropies(t, segment), margin)) for t, s in zip(trajectories, correctness)]
    called = [(t, s, found) for t, s, found in rows if found]
    pairs = {
        "reducing_share_and_correctness": [(t.question_id, fmean(found), s) for t, s, found in called],
        "calls_and_correctness": [(t.question_id, len(found), s) for t, s, found in rows],
        "change_and_answer": [(c.question_id, c.change, c.answer == "right") for c in calls if not isnan(c.change)],
    }
    result["correlations"] = {}
    for name, values in pairs.items():
        x, y = np.array([(a, b) for _, a, b in values], dtype=float).reshape(-1, 2).T
        result["correlations"][name] = with_interval(correlation, x, y, [i for i, _, _ in values])
    return result, calls


def fill_entropies(
    trajectories: list[Trajectory], model_name_or_path: str, batch_size: int = 32, where: str = "trajectories"
) -> None:
    """Give every trajectory without token entropies those of a model at T = 1, in nats.

    DataError, which begins with `where`, for one that was sampled with another tokenizer.
    """
    model, tokenizer = load_policy(ModelArgs(model_name_or_path=model_name_or_path), trainable=False)
    check_tokenizer((t for t in trajectories if t.entropy is None), tokenizer, where)
    model.to(device()).eval()
    for t, values in zip(trajectories, token_entropies(trajectories, model, tokenizer.pad_token_id, batch_size)):
        t.entropy = values


# ---------------------------------------------------------------------------------------------------- report


@dataclass
class Args:
    """Flags of the pilot."""

    trajectories: str = arg("", "trajectory file (required)")
    output: str = arg("", "folder for tables and figures (required)")
    segment: Segment = arg("reasoning", "which tokens between two tool results make a segment")
    delta_margin: float = arg(0.0, "a call counts as reducing below −margin, in nats")
    model_name_or_path: str = arg("", "computes entropies that the trajectories do not have")

    def __post_init__(self):
        if not self.trajectories or not self.output:
            raise ValueError("--trajectories and --output are required")
        check_numbers(self)


def main(args: Args) -> str:
    """Write tables and figure of a trajectory file; returns the markdown. DataError where entropies are missing."""
    trajectories = load_trajectories(args.trajectories)
    if not trajectories:
        raise DataError(f"--trajectories {args.trajectories}: holds no trajectories")
    if args.model_name_or_path:
        fill_entropies(trajectories, args.model_name_or_path, where=args.trajectories)
    if missing := next((t for t in trajectories if t.entropy is None), None):
        raise DataError(
            f"{args.trajectories}: trajectory {missing.question_id}/{missing.sample_idx} has no field 'entropy'; "
            "name the model that sampled it by --model_name_or_path"
        )
    scores = [grade(t)[0] for t in trajectories]
    result, calls = analyse(trajectories, scores, args.segment, args.delta_margin)
    folder = Path(args.output)
    folder.mkdir(parents=True, exist_ok=True)
    write_text(folder / "entropy_pilot.json", json.dumps(result, indent=1, allow_nan=False) + "\n")
    groups = {"all": result["all"]}
    for field in ("label", "tool", "answer", "family"):
        groups |= {f"{field}: {name}": row for name, row in result[field].items()}
    intervals = {"AUC of −ΔH for needed calls": result["auc_needed"]}
    intervals |= {"correlation of " + name.replace("_", " "): v for name, v in result["correlations"].items()}
    counts = result["auc_calls"]
    note = f"The AUC compares {counts['needed']} needed calls with {counts['others']} others"
    note += f"; fewer than {FEW} of either give no interval." if min(counts.values()) < FEW else "."
    text = f"""# Entropy reduction of tool calls

Segment {args.segment}, margin {args.delta_margin}; entropies in nats;
reducing = share of calls with I = 1; intervals: 95 %, bootstrap over questions.
{note}

{table(["calls", *result["all"]], [[name, *row.values()] for name, row in groups.items()])}

{table(["", "value", "low", "high"], [[name, *found.values()] for name, found in intervals.items()])}

![ΔH by label](entropy_changes.png)
"""
    write_text(folder / "entropy_pilot.md", text)
    draw(folder / "entropy_changes.png", [c for c in calls if not isnan(c.change)])
    print(text)
    return text


def draw(path: Path, calls: list[Call]) -> None:
    """Histograms of ΔH by label and by answer; nothing is drawn where there are no calls."""
    figure, axes = pyplot().subplots(1, 2, figsize=(10, 3.6))
    bins = np.histogram_bin_edges([c.change for c in calls] or [0.0], 40)
    for axis, field, names in zip(axes, ("label", "answer"), (LABELS, ("right", "wrong"))):
        for name in names:
            if values := [c.change for c in calls if getattr(c, field) == name]:
                axis.hist(values, bins, alpha=0.5, density=True, label=f"{name} ({len(values)})")
                axis.legend(frameon=False)
        axis.axvline(0, color="black", linewidth=0.5)
        axis.set_xlabel("ΔH of the call (nats)")
    axes[0].set_ylabel("density of calls")
    save(figure, path)


if __name__ == "__main__":
    cli(main, Args)
