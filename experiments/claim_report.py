"""Writes the report of the claims from their rows alone: what held, by how much, and what was not run.

report.md holds an overview of all claims; of every claim with a pair that was run the differences of its pairs and the
metrics of its variants; two figures.
"""

from collections.abc import Iterable
from math import ceil, isnan
from pathlib import Path
from statistics import fmean, stdev

from core.run import table, write_text
from core.trajectory import DataError
from eval.intervals import Interval, failure, paired_interval, verdict
from experiments.cells import column
from experiments.claim_list import Claim
from experiments.entropy_pilot import LABELS
from experiments.figures import calls_and_correctness, pyplot, save
from experiments.frontier import draw_frontier, frontier_table
from experiments.variants import VARIANTS, WORLDS

Rows = dict[tuple[str, int], dict]  # (variant, seed) -> its row of rows.jsonl
TOOL_METRICS = ("correctness", "efficiency", "calls", "redundant", "insufficient", "tokens", "thinking")
MODE_METRICS = ("correctness", "correctness|easy", "correctness|hard", "thinking|easy", "thinking|hard", "tokens")
COLLAPSED = 0.1  # thinking on hard items below which a policy has collapsed
WORDS = ("holds", "fails", "undecided", "unfinished", "not run")
ENDS = ("sums_35", "sums_85")  # worlds of the figure on modes
DRAWN = {  # its variants
    "none_none": "no warm-up, no constraint", "none_decoupled": "constraint alone",
    "none_adaptive": "one coefficient for both modes", "majority_none": "warm-up alone",
    "majority_decoupled": "warm-up and constraint", "correct": "correctness reward", "length": "price on length",
}  # fmt: skip


def write_report(folder: Path, claims: dict[str, Claim], rows: Rows, seeds: int) -> dict[str, list[str]]:
    """Write folder/report.md and its figures; returns claim -> verdicts of its pairs, in words."""
    found = {name: [decide(claim, pair, rows, seeds) for pair in claim.pairs] for name, claim in claims.items()}
    verdicts = {name: [line[-1] for line in lines] for name, lines in found.items()}
    variants = variants_of(claims.values())
    commits = sorted({row["commit"] for row in rows.values()})
    counts = {name: [sum(v.startswith(word) for v in verdicts[name]) for word in WORDS] for name in claims}
    questions = sorted({len(column(row, "correctness")) for row in rows.values()}) or ["no"]
    complete = sum(sum(row[:3]) for row in counts.values())
    overview = [[name, claim.says, *(n or "" for n in counts[name])] for name, claim in claims.items()]
    parts = [
        "# Claims", "",
        f"- {len(rows)} of {len(variants) * seeds} cells; commits {', '.join(commits) or 'none'}",
        f"- {seeds} paired seeds, {', '.join(map(str, questions))} held-out questions, the same for all of a world",
        "- difference: first variant minus second, mean [95 % interval over seeds and questions]; thresholds are in "
        "experiments/claim_list.py, each written before the rows of its pairs",
        "- holds: the interval excludes 0, its mean reaches the threshold, and correctness is certainly not lower by "
        "the margin; fails: the interval lies the other way (opposite), does not reach the threshold (smaller), or "
        "correctness is certainly lower by more than the margin (correctness); else undecided; unfinished: seeds miss",
        "- seeds for margin: as many would shrink the interval of correctness, at the spread seen, to ± the margin; "
        "where more than were run, a claim of equal correctness can only fail or stay undecided",
        f"- every interval stands for itself: of the {complete} pairs with all seeds, which share variants, one in 20 "
        "would exclude 0 by chance if there were no difference anywhere",
        "- some of the held-out questions with tools also occur in training, word for word: the world has few sums and "
        "facts (the reproduction's report counts them)",
        "", "Number of pairs by verdict:", "", table(["claim", "says", *WORDS], overview), "",
        "## The price frontier", "",
        "Does a method beat a plain price on calls? GRPO with the reward S − λ n, n calls, gives a curve of correctness "
        "over calls; height is a method's correctness above that curve at its own number of calls, with a 95 % interval "
        "over seeds and questions. A method is worth its code if it lies above.", "",
        table(["world", "method", "seeds", "calls", "correctness", "height", "so it lies"], frontier_table(rows, seeds)), "",
        "![Correctness over calls](frontier.png)", "",
        "![Calls and correctness](calls.png)", "", "![Thinking over the steps of training](modes.png)", "",
    ]  # fmt: skip
    for name, claim in claims.items():
        if not any(line[2] for line in found[name]):
            continue  # no pair has a seed
        rule = f"`{claim.metric}` {'higher' if claim.sign > 0 else 'lower'} by at least {claim.at_least:g}"
        rule += "" if claim.margin is None else f", correctness lower by less than {claim.margin:g}"
        parts += [f"## {name}", "", f"{claim.says} ({claim.where}). Holds if: {rule}.", ""]
        head = ["first", "second", "seeds", in_words(claim.metric), "correctness", "seeds for margin", "verdict"]
        left_out = ({4} if claim.metric == "correctness" else set()) | ({5} if claim.margin is None else set())
        shown = [i for i in range(len(head)) if i not in left_out]
        parts += [table([head[i] for i in shown], [[line[i] for i in shown] for line in found[name]]), ""]
        parts += [variants_table(claim, rows), ""]
        if name.startswith("en_"):
            parts += ["By what a call was worth: share with ΔH below −margin, mean ΔH, mean H before it (nats), of the "
                      "calls between two segments that are not empty:", ""]  # fmt: skip
            parts += [calls_table(claim, rows), ""]
    missing = in_short((v, s) for v in variants for s in range(seeds) if (v, s) not in rows)
    parts += ["## Not run", "", f"Cells as variant/seeds: {missing}.", ""]
    folder.mkdir(parents=True, exist_ok=True)
    draw_calls(folder / "calls.png", rows)
    draw_frontier(folder / "frontier.png", rows)
    draw_modes(folder / "modes.png", rows)
    write_text(folder / "report.md", "\n".join(parts))
    return verdicts


def variants_of(claims: Iterable[Claim]) -> list[str]:
    """The variants that the claims compare, each once, in their order."""
    return list(dict.fromkeys(v for claim in claims for pair in claim.pairs for v in pair))


def in_short(cells: Iterable[tuple[str, int]]) -> str:
    """Cells as variant/seeds: "rft/0,1 rl_et/4"."""
    found: dict[str, list[str]] = {}
    for variant, seed in cells:
        found.setdefault(variant, []).append(str(seed))
    return " ".join(f"{variant}/{','.join(seeds)}" for variant, seeds in found.items()) or "none"


def in_words(metric: str) -> str:
    """A metric as a table's head: the bar of "column|subset" would end the cell."""
    return metric.replace("|", " on ")


# ---------------------------------------------------------------------------------------------------- verdicts


def decide(claim: Claim, pair: tuple[str, str], rows: Rows, seeds: int) -> list:
    """One line of a claim's table: differences over the seeds that both variants have, and the verdict.

    Fewer seeds than asked for leave it unfinished. DataError if the two were not asked the same questions.
    """
    shared = [s for s in range(seeds) if all((variant, s) in rows for variant in pair)]
    if not shared:
        return [*pair, 0, "", "", "", "not run"]
    first, second = ([rows[variant, s] for s in shared] for variant in pair)
    if len({row["asked"] for row in first + second}) > 1:
        raise DataError(f"{pair[0]} and {pair[1]} were evaluated on different questions")
    effect = difference(first, second, claim.metric)
    correctness = difference(first, second, "correctness")
    signed = effect if claim.sign > 0 else Interval(-effect.mean, -effect.high, -effect.low)
    rule = signed, claim.at_least, None if claim.margin is None else correctness, claim.margin or 0.0
    word = verdict(*rule)
    if len(shared) < seeds:
        word = f"unfinished ({len(shared)} of {seeds} seeds)"
    elif word == "fails":
        word += f" ({failure(*rule)})"
    return [*pair, len(shared), _shown(effect), _shown(correctness), seeds_for_margin(correctness, claim, shared), word]


def seeds_for_margin(correctness: Interval, claim: Claim, seeds: list[int]) -> int | str:
    """Seeds at which an interval of this spread is ± the claim's margin: it shrinks with the root of their number."""
    if claim.margin is None or isnan(correctness.low):
        return ""
    half = (correctness.high - correctness.low) / 2
    return ceil(len(seeds) * (half / claim.margin) ** 2)


def difference(first: list[dict], second: list[dict], metric: str) -> Interval:
    """Interval of a metric's paired difference over the seeds' rows."""
    return paired_interval([values(row, metric) for row in first], [values(row, metric) for row in second])


def values(row: dict, metric: str) -> list[float]:
    """A metric of every held-out question of a row; "column|subset" takes only the questions of the subset."""
    name, _, subset = metric.partition("|")
    found = column(row, name)
    return [value for value, keep in zip(found, column(row, subset)) if keep] if subset else found


def _shown(interval: Interval) -> str:
    if isnan(interval.low):
        return f"{interval.mean:+.3f} (one seed)"
    return f"{interval.mean:+.3f} [{interval.low:+.3f}, {interval.high:+.3f}]"


# ---------------------------------------------------------------------------------------------------- variants


def seeds_of(variant: str, rows: Rows) -> list[dict]:
    """The rows of a variant, by seed."""
    return [row for (name, _), row in sorted(rows.items(), key=lambda item: item[0]) if name == variant]


def variants_table(claim: Claim, rows: Rows) -> str:
    """Mean ± standard deviation over the seeds of each variant of a claim that has rows.

    On sums also how many seeds collapsed, and the share of groups without signal in the last steps; with branching
    the share of sampled tokens that it saved.
    """
    sums = WORLDS[VARIANTS[claim.pairs[0][0]].world].sums
    found = {variant: mine for variant in variants_of([claim]) if (mine := seeds_of(variant, rows))}
    metrics = MODE_METRICS if sums else TOOL_METRICS
    branched = any(saved_tokens(row) for mine in found.values() for row in mine)
    head = ["variant", "seeds", *map(in_words, metrics), *["tokens saved"] * branched]
    lines = []
    for variant, mine in found.items():
        means = [[fmean(values(row, metric)) for row in mine] for metric in metrics]
        line = [variant, len(mine), *(f"{fmean(m):.3f}" + (f" ± {stdev(m):.3f}" if len(m) > 1 else "") for m in means)]
        if branched:
            line.append(fmean(saved_tokens(row) for row in mine))
        if sums:
            silent = [row["curves"]["frac_reward_zero_std"][-1] for row in mine if row["curves"]]
            line.append(sum(fmean(values(row, "thinking|hard")) < COLLAPSED for row in mine))
            line.append(fmean(silent) if silent else "")
        lines.append(line)
    return table([*head, *["collapsed", "groups without signal"] * sums], lines)


def saved_tokens(row: dict) -> float:
    """Share of the sampled tokens that branching saved in the last steps of training."""
    return row["curves"].get("rollout/tokens_saved", [0.0])[-1]


def calls_table(claim: Claim, rows: Rows) -> str:
    """How entropy changed over the calls of each variant's evaluation, mean over the seeds [PAPERS C1].

    A line per segment and margin: as published, and as the variant was trained.
    """
    lines = []
    for variant in variants_of([claim]):
        analyses: dict[tuple, list[dict]] = {}
        for row in seeds_of(variant, rows):
            for e in row.get("entropy", []):
                analyses.setdefault((e["segment"], e["delta_margin"]), []).append(e)
        for settings, mine in analyses.items():
            line = [variant, *settings, len(mine), fmean(e["all"]["empty"] / max(e["all"]["n"], 1) for e in mine)]
            for label in LABELS:
                found = [e["label"][label] for e in mine if e["label"].get(label, {}).get("change") is not None]
                means = [fmean(f[key] for f in found) for key in ("reducing", "change", "before")] if found else []
                line.append("{:.2f}, {:+.3f}, {:.3f}".format(*means) if means else "")
            areas = [e["auc_needed"]["value"] for e in mine if e["auc_needed"]["value"] is not None]
            lines.append([*line, fmean(areas) if areas else ""])
    return table(["variant", "segment", "margin", "seeds", "empty", *LABELS, "AUC of −ΔH for needed"], lines)


# ---------------------------------------------------------------------------------------------------- figures


def draw_calls(path: Path, rows: Rows) -> None:
    """Tool calls and correctness of every variant with tools, mean over its seeds; one panel per world."""
    worlds = ("noisy", "plain")
    figure, axes = pyplot().subplots(1, len(worlds), figsize=(13, 5))
    for axis, world in zip(axes, worlds):
        points = {}
        for variant in dict.fromkeys(name for name, _ in rows if VARIANTS[name].world == world):
            mine = seeds_of(variant, rows)
            point = (fmean(fmean(values(row, metric)) for row in mine) for metric in ("calls", "correctness"))
            points[variant.removesuffix("_plain")] = tuple(point)
        calls_and_correctness(axis, points)
        axis.set_title(f"{world} world", fontsize=10)
    save(figure, path)


def draw_modes(path: Path, rows: Rows) -> None:
    """Thinking rate and entropy of the mode decision over the steps, mean over the seeds that have the curve."""
    figure, axes = pyplot().subplots(2, len(ENDS), figsize=(11, 6), sharex=True)
    curves = (("think_rate/long", "thinking on long sums"), ("entropy/decision", "entropy of the decision (nats)"))
    for at, world in enumerate(ENDS):
        share = world.removeprefix("sums_")
        for (key, label), axis in zip(curves, axes[:, at]):
            for k, (name, shown) in enumerate(DRAWN.items()):
                found = [row["curves"] for row in seeds_of(f"at_{share}_{name}", rows) if key in row["curves"]]
                if found:
                    points = [[v for v in window if v is not None] for window in zip(*(c[key] for c in found))]
                    axis.plot(found[0]["step"], [fmean(p) if p else float("nan") for p in points], f"C{k}", label=shown)
            axis.set_ylabel(label)
        axes[0, at].set_title(f"{share} % easy sums in training", fontsize=10)
        axes[1, at].set_xlabel("step")
    lines = {line.get_label(): line for axis in axes.flat for line in axis.get_lines()}  # each variant once
    figure.legend(lines.values(), lines.keys(), loc="upper center", bbox_to_anchor=(0.5, 0), ncols=4, fontsize=8)
    save(figure, path)
