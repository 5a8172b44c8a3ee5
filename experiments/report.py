"""Report of a reproduction: markdown tables and figures from metrics and training logs.

Reads `metrics.json` (stage metrics, see experiments/reproduce.py) and the `metrics.jsonl` of RL runs; writes report.md and PNGs.
"""

import json
from pathlib import Path
from statistics import fmean

from core.run import table
from eval.evaluate import metrics_table
from experiments.figures import pyplot, save

CURVES = (
    ("reward", "reward"),
    ("rewards/correct/mean", "correctness"),
    ("tools/call_frequency", "tool calls per trajectory"),
    ("completions/mean_length", "model-written tokens"),
    ("entropy", "token entropy (nats)"),
    ("think_rate", "thinking rate"),
    ("frac_reward_zero_std", "groups without signal"),
    ("grad_norm", "gradient norm"),
)


def write_report(folder: Path, metrics: dict, runs: dict[str, list[Path]], notes: list[str]) -> Path:
    """Write folder/report.md with its figures and return its path.

    metrics: {"stages": {name: metrics}, "families": {stage: {family: metrics}}, "spread": {name: {metric: sd}}}.
    runs: RL stage -> its run folders (one per seed). notes: lines that say how the numbers were made.
    """
    calls_per_family(folder / "calls.png", metrics["families"])
    calls_and_correctness(folder / "trade.png", metrics["stages"])
    curves(folder / "curves.png", runs)
    parts = ["# Reproduction report", "", *(f"- {note}" for note in notes), "", "## Stages", ""]
    parts += [metrics_table(metrics["stages"]), ""]
    if metrics.get("spread"):
        names = list(next(iter(metrics["spread"].values())))
        rows = [[stage, *(spread[n] for n in names)] for stage, spread in metrics["spread"].items()]
        parts += ["Standard deviation over seeds:", "", table(["", *names], rows), ""]
    parts += ["![Tool calls per family](calls.png)", "", "![Training curves](curves.png)", ""]
    parts += ["![Calls and correctness](trade.png)", ""]
    if metrics.get("sums"):
        parts += ["## Running sums: when to think", "", sums_table(metrics["sums"]), ""]
    for stage, families in metrics["families"].items():
        parts += [f"## {stage}, per family", "", metrics_table(families), ""]
    if (folder / "analyses" / "entropy_pilot.md").exists():
        link = "[What a call does to the entropy of the next segment](analyses/entropy_pilot.md)"
        others = "; the same with the call's own tokens ([with_call](analyses/with_call/entropy_pilot.md)) and of the "
        others += "thought alone ([think](analyses/think/entropy_pilot.md))"
        parts += ["## Analyses", "", link + others, ""]
        parts += ["![ΔH by label](analyses/entropy_changes.png)", "", "![Action space](analyses/action_space.png)", ""]
        parts += [(folder / "analyses" / "insufficiency.md").read_text(encoding="utf-8")]
    path = folder / "report.md"
    path.write_text("\n".join(parts), encoding="utf-8")
    return path


SUM_COLUMNS = ("n", "correctness", "thinking_rate", "tokens")


def sums_table(sums: dict[str, dict[str, dict]]) -> str:
    """Markdown table of the stages on running sums: all of them, those easy and those hard for the base."""
    parts = [part for part in ("all", "easy", "hard") if any(part in row for row in sums.values())]
    names = [f"{column} {part}" for part in parts for column in SUM_COLUMNS]
    rows = [[s, *(row[p][c] if p in row else "" for p in parts for c in SUM_COLUMNS)] for s, row in sums.items()]
    return table(["sums", *names], rows)


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
    axis.legend(frameon=False)
    save(figure, path)


def calls_and_correctness(path: Path, stages: dict[str, dict]) -> None:
    """One point per stage: tool calls and correctness, the mark the larger the more trajectories are redundant."""
    figure, axis = pyplot().subplots(figsize=(6, 4))
    for name, row in stages.items():
        axis.scatter(row["calls"], row["correctness"], s=30 + 300 * row["redundant"], alpha=0.6)
        axis.annotate(name, (row["calls"], row["correctness"]), fontsize=8, xytext=(4, 4), textcoords="offset points")
    axis.set_xlabel("tool calls per question")
    axis.set_ylabel("correctness")
    save(figure, path)


def curves(path: Path, runs: dict[str, list[Path]]) -> None:
    """Training curves over steps, one line per stage (thin lines: single seeds, if there are several)."""
    plt = pyplot()
    figure, axes = plt.subplots(2, 4, figsize=(15, 6))
    colours = plt.rcParams["axes.prop_cycle"].by_key()["color"]
    for (stage, folders), colour in zip(runs.items(), colours):
        logs = [read_metrics(folder) for folder in folders]
        for axis, (key, label) in zip(axes.flat, CURVES):
            series = [[row[key] for row in log] for log in logs if log and key in log[0]]
            if not series:
                continue
            length = min(map(len, series))
            steps = range(1, length + 1)
            for values in series if len(series) > 1 else []:
                axis.plot(steps, values[:length], color=colour, linewidth=0.5, alpha=0.4)
            mean = [fmean(values[i] for values in series) for i in range(length)]
            axis.plot(steps, mean, color=colour, label=stage)
            axis.set_title(label, fontsize=10)
            axis.set_xlabel("step")
    axes.flat[0].legend(frameon=False)
    save(figure, path)


def read_metrics(folder: Path) -> list[dict]:
    """The lines of a run's metrics.jsonl."""
    text = (folder / "metrics.jsonl").read_text(encoding="utf-8")
    return [json.loads(line) for line in text.splitlines()]
