"""Writes the reproduction's report: tables of what the models do, training curves and figures, from numbers alone."""

from pathlib import Path
from statistics import fmean

from core.run import table
from eval.evaluate import metrics_table
from experiments.cells import HARD, PROBES, training_log
from experiments.figures import calls_and_correctness, pyplot, save

CURVES = (
    ("reward", "reward, each from its lowest to its highest value"),
    ("rewards/correct/mean", "correctness"),
    ("tools/call_frequency", "tool calls per trajectory"),
    ("completions/mean_length", "model-written tokens"),
    ("entropy", "token entropy (nats)"),
    ("think_rate", "thinking rate"),
    ("frac_reward_zero_std", "groups without signal"),
    ("grad_norm", "gradient norm"),
)
SUM_COLUMNS = ("n", "correctness", "thinking_rate", "tokens")
QUICK = "# A quick run: it shows that the path works, not what the methods achieve"
ON_SUMS = (
    f"A sum is hard if the base, without thinking, is right in less than {HARD:.0%} of {PROBES} samples, else easy. "
    "Told when to think, the base thinks on the hard ones only. AutoTool's warm-up is SFT on labelled answers (by "
    "majority); its RL runs on the refined half of the sums, with the asymmetric reward and the decoupled constraint. "
    "The rows behind it are controls: RL on all sums; without the constraint; from the base, without warm-up and "
    "constraint, on the sums that the warmed-up model has refined."
)


def write_report(
    folder: Path, metrics: dict, runs: dict[str, list[Path]], labels: dict[str, str], notes: list[str], quick: bool
) -> Path:
    """Write folder/report.md with its figures and return its path.

    metrics: as reproduce.combine makes them. runs: RL stage -> its run folders (one per seed). labels: stage (on sums:
    sums_STAGE) -> what it is called. notes: sentences that say how the numbers were made.
    """
    stages = {labels[s]: row for s, row in metrics["stages"].items()}
    families = {labels[s]: rows for s, rows in metrics["families"].items()}
    calls_per_family(folder / "calls.png", families)
    figure, axis = pyplot().subplots(figsize=(7, 5))
    points = {name: (row["calls"], row["correctness"]) for name, row in stages.items()}
    calls_and_correctness(axis, points, [30 + 300 * row["redundant"] for row in stages.values()])
    save(figure, folder / "trade.png")
    curves(folder / "curves.png", {labels[s]: folders for s, folders in runs.items()})
    parts = [QUICK if quick else "# Reproduction report", "", *(f"- {note}" for note in notes), "", "## Stages", ""]
    parts += [metrics_table(stages), "", *equal_rows(stages)]
    if spread := metrics.get("spread"):
        rows = [[labels[stage], *deviations.values()] for stage, deviations in spread.items()]
        parts += ["Standard deviation over seeds:", "", table(["", *spread["base"]], rows), ""]
    parts += ["![Tool calls per family](calls.png)", "", "![Training curves](curves.png)", ""]
    parts += ["![Calls and correctness; the larger a point, the more trajectories are redundant](trade.png)", ""]
    if metrics["sums"]:
        sums = {labels[f"sums_{s}"]: row for s, row in metrics["sums"].items()}
        parts += ["## Running sums: when to think", "", ON_SUMS, "", sums_table(sums), "", *equal_rows(sums)]
    for stage, rows in families.items():
        parts += [f"## Per family: {stage}", "", metrics_table(rows), ""]
    if (folder / "analyses").exists():
        parts += ["## Analyses", "", "What a call of the base does to the entropy of the segment behind it, which is",
                  "[the reasoning up to the next call or the answer](analyses/reasoning/entropy_pilot.md), the same",
                  "[with the answer](analyses/reasoning_with_answer/entropy_pilot.md),",
                  "[with the call's own tokens and the answer](analyses/with_call/entropy_pilot.md), or",
                  "[the thought alone](analyses/think/entropy_pilot.md).", "",
                  "![ΔH by label](analyses/reasoning/entropy_changes.png)", "",
                  "![Action space](analyses/action_space.png)", "",
                  (folder / "analyses" / "insufficiency.md").read_text(encoding="utf-8")]  # fmt: skip
    path = folder / "report.md"
    path.write_text("\n".join(parts), encoding="utf-8")
    return path


def tables(metrics: dict, labels: dict[str, str]) -> str:
    """The stage table and the table of sums."""
    stages = metrics_table({labels[s]: row for s, row in metrics["stages"].items()})
    return f"{stages}\n\n{sums_table({labels[f'sums_{s}']: row for s, row in metrics['sums'].items()})}"


def sums_table(sums: dict[str, dict[str, dict]]) -> str:
    """Markdown table of the stages on running sums: all of them, those easy and those hard for the base."""
    parts = [part for part in ("all", "easy", "hard") if any(part in row for row in sums.values())]
    names = [f"{column} {part}" for part in parts for column in SUM_COLUMNS]
    rows = [[s, *(row[p][c] if p in row else "" for p in parts for c in SUM_COLUMNS)] for s, row in sums.items()]
    return table(["sums", *names], rows)


def equal_rows(rows: dict[str, dict]) -> list[str]:
    """A paragraph for each set of rows whose numbers are all the same, which would look like a mistake unsaid."""
    alike: dict[str, list[str]] = {}
    for name, row in rows.items():
        alike.setdefault(str(row), []).append(f'"{name}"')
    said = "have the same numbers throughout: what sets them apart in training does not show in these samples."
    return [line for names in alike.values() if len(names) > 1 for line in (f"{' and '.join(names)} {said}", "")]


def calls_per_family(path: Path, families: dict[str, dict[str, dict]]) -> None:
    """Bars: mean tool calls per family, one bar per stage; the dashes mark the calls that are needed, where known."""
    names = list(next(iter(families.values())))
    figure, axis = pyplot().subplots(figsize=(1.6 * len(names) + 2, 3.6))
    width = 0.8 / len(families)
    for k, (stage, per_family) in enumerate(families.items()):
        at = [i + (k - (len(families) - 1) / 2) * width for i in range(len(names))]
        axis.bar(at, [per_family[n]["calls"] for n in names], width, label=stage)
    for i, name in enumerate(names):
        need = next(iter(families.values()))[name].get("needed_calls")
        if need is not None:
            axis.hlines(need, i - 0.45, i + 0.45, colors="black", linestyles="dashed", linewidth=1)
    axis.set_xticks(range(len(names)), names)
    axis.set_ylabel("tool calls per question")
    axis.legend(frameon=False, loc="center left", bbox_to_anchor=(1, 0.5))
    save(figure, path)


def curves(path: Path, runs: dict[str, list[Path]]) -> None:
    """Training curves over steps, one line per stage (thin lines: single seeds, if there are several).

    Rewards of different formulas have no common scale: each is drawn from its lowest to its highest value, which the
    legend names.
    """
    figure, axes = pyplot().subplots(2, 4, figsize=(15, 6))
    for k, (stage, folders) in enumerate(runs.items()):
        logs = [training_log(folder) for folder in folders]
        for axis, (key, label) in zip(axes.flat, CURVES):
            series = [[row[key] for row in log] for log in logs if log and key in log[0]]
            if not series:
                continue
            steps = range(1, min(map(len, series)) + 1)
            mean = [fmean(values) for values in zip(*series)]
            name, low, size = stage, 0.0, 1.0
            if key == "reward":
                low, size = min(mean), max(mean) - min(mean) or 1.0
                name = f"{stage} (reward {min(mean):.2f} to {max(mean):.2f})"
            for values in series if len(series) > 1 else []:
                axis.plot(steps, [(v - low) / size for v, _ in zip(values, steps)], f"C{k}", linewidth=0.5, alpha=0.4)
            axis.plot(steps, [(v - low) / size for v in mean], f"C{k}", label=name)
            axis.set_title(label, fontsize=10)
            axis.set_xlabel("step")
    handles = axes.flat[0].get_legend_handles_labels()
    figure.legend(*handles, frameon=False, loc="upper center", bbox_to_anchor=(0.5, 0), ncols=4)
    save(figure, path)
