"""The main job: trains the three methods in the calibration world from one base model and writes one report about them.

    ./reproduce.sh                                  one seed, on two cores (or: python -m experiments.reproduce)
    python -m experiments.reproduce --seeds 5       mean and standard deviation over paired seeds
    python -m experiments.reproduce --quick         a smoke run of the same path

1. Evaluate the shipped base, which calls tools too often, too rarely and wrongly at known rates.
2. GRPO from the base on the same questions with four rewards: right answers, ET-Agent, entropy, sparse and dense.
3. ET-Agent whole: SFT on right samples → flywheel → RFT → three rounds of (Pareto selection → RL).
4. AutoTool on running sums, where thinking pays on long ones only: warm-up → RL, with and without its constraint.
5. Evaluate all of them on held-out questions; write metrics.json, report.md and figures, and print the tables.
The runs are declared in experiments/variants.py (`reproduction`). Killed at any moment, the same command goes on.
"""

import json
import shutil
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass
from math import exp
from pathlib import Path
from statistics import fmean, stdev
from typing import Any, get_args

import torch

from core.args import arg, cli, require_positive
from core.run import environment, table, write_text
from core.segments import Segment
from core.trajectory import DataError, load_trajectories, read_jsonl
from eval.evaluate import COLUMNS, evaluate
from experiments.cells import Cell, CellArgs, hard_ids, plan_cell, plan_job, reached, row_file, run_job
from experiments.report import tables, write_report
from experiments.variants import ET, REPRODUCTION, ROUNDS, VARIANTS, WORLDS, Stage
from experiments.workers import run_missing

CURVES = ("outcome_rl", "et_agent", "entropy_sparse", "entropy_dense")
LAST = f"rl_round_{ROUNDS}"
HINTED = ("wrong", "fixed", "insufficient", "mean_extra_calls")


@dataclass
class Args(CellArgs):
    """Flags of the reproduction; the defaults are the README's numbers."""

    output_dir: str = arg("out/reproduce", "folder of the whole reproduction")
    quick: bool = arg(False, "few steps and questions: shows that the path works, not what the methods achieve")
    seeds: int = arg(1, "runs of each variant, paired by seed: 0 … N−1")
    overwrite: bool = arg(False, "remove what an earlier reproduction has left in the folder")

    def __post_init__(self):
        super().__post_init__()
        require_positive(self, "seeds")

    @property
    def kind(self) -> str:
        """Which of the declared reproductions."""
        return "quick" if self.quick else "reproduce"


Cells = dict[tuple[str, int], Cell]  # (stage, seed) -> its cell; stages on sums start with "sums_"


def main(args: Args) -> dict:
    """Run what is missing, write the report, return the content of metrics.json."""
    out = Path(args.output_dir)
    keys = [(variant, seed) for seed in range(args.seeds) for variant in REPRODUCTION[args.kind]]
    cells = {(v.removeprefix(f"{args.kind}_"), s): plan_cell(v, s, args) for v, s in keys}
    if args.overwrite and (out / "env.json").exists():
        shutil.rmtree(out)
    (out / "logs").mkdir(parents=True, exist_ok=True)
    write_text(out / "env.json", json.dumps(environment(threads=1), indent=1) + "\n")
    todo = [cell for cell in cells.values() if not row_file(cell, args).exists()]
    todo.sort(key=lambda cell: -sum(job.minutes for job in cell.jobs))  # long ones first
    if todo:
        print(f"{len(todo)} cells to run, {args.workers} at once; what each does: tail -f {out}/logs/*.log")
        if problems := run_missing(todo, args):
            raise DataError("cells failed: " + "; ".join(problems))
    rows = {key: json.loads(row_file(cell, args).read_text()) for key, cell in cells.items()}
    metrics = combine([seed_metrics(cells, rows, seed) for seed in range(args.seeds)])
    write_text(out / "metrics.json", json.dumps(metrics, indent=1) + "\n")
    print(f"analyses of the first seed: tail -f {out}/logs/analyses.log")
    with open(out / "logs" / "analyses.log", "a") as log, redirect_stdout(log), redirect_stderr(log):
        analyses(cells, args)
    labels = {stage: VARIANTS[cell.variant].label for (stage, _), cell in cells.items()}
    labels["sums_oracle"] = "base, told when to think"
    runs = {s: [cells[s, seed].jobs[0].folder for seed in range(args.seeds)] for s in CURVES}
    commits = {row["commit"] for row in rows.values()}
    report = write_report(out, metrics, runs, labels, notes(cells, commits, args), quick=args.quick)
    print(tables(metrics, labels), f"\nreport: {report}", sep="\n")
    return metrics


def seed_metrics(cells: Cells, rows: dict, seed: int) -> dict:
    """{"stages": {stage: {"all", "families"}}, "sums": {stage: {"all", "easy", "hard"}}} of one seed."""
    stages, sampled = {}, {}
    for (stage, s), cell in cells.items():
        if s == seed and WORLDS[VARIANTS[cell.variant].world].sums:
            sampled[stage.removeprefix("sums_")] = load_trajectories(cell.jobs[-1].output)
        elif s == seed:
            stages[stage] = {"all": rows[stage, s]["metrics"], "families": rows[stage, s]["families"]}
    hard = hard_ids(load_trajectories(cells["sums_base", seed].files["held_out_probe"]))
    sampled["oracle"] = [t for t in sampled["think"] if t.question_id in hard]
    sampled["oracle"] += [t for t in sampled["no_think"] if t.question_id not in hard]
    sums = {}
    for stage, found in sampled.items():
        parts = {"all": found, "easy": [t for t in found if t.question_id not in hard]}
        parts["hard"] = [t for t in found if t.question_id in hard]
        sums[stage] = {part: evaluate(members)["all"] for part, members in parts.items() if members}
    return {"stages": stages, "sums": sums}


def combine(per_seed: list[dict]) -> dict:
    """metrics.json: stage and family means over seeds and, for several seeds, the standard deviation of each metric."""
    whole, columns = mean(per_seed), [c for c in COLUMNS if c != "n"]
    metrics = {"stages": {s: m["all"] for s, m in whole["stages"].items()}}
    metrics |= {"families": {s: m["families"] for s, m in whole["stages"].items()}, "sums": whole["sums"]}
    if len(per_seed) > 1:
        stages = {s: [m["stages"][s]["all"] for m in per_seed] for s in whole["stages"]}
        metrics["spread"] = {s: {c: stdev(row[c] for row in rows) for c in columns} for s, rows in stages.items()}
        metrics["seeds"] = per_seed
    return metrics


def mean(rows: list) -> Any:
    """Mean of numbers, or of dicts number by number; what all agree on stays as it is."""
    if isinstance(rows[0], dict):
        return {key: mean([row[key] for row in rows if key in row]) for key in rows[0]}
    return rows[0] if all(value == rows[0] for value in rows) else fmean(rows)


def analyses(cells: Cells, args: Args) -> None:
    """For the first seed: what calls do to entropy, what hints repair, where the stages act [PAPERS A6, C1].

    What is not computed yet runs here; tables and figures are copied to the folder analyses.
    """
    torch.set_num_threads(1)
    folder, names = Path(args.output_dir) / "analyses", {**cells["base", 0].files, "base": args.base, "seed": 0}
    sampled = {stage: cells[stage, 0].jobs[-1].output for stage in ("base", "outcome_rl", "rft", LAST)}

    def run(name: str, script: str, model: str = args.base, **flags) -> Path:
        job = plan_job(Stage(name, script, flags, 0), model, names, args)
        run_job(job)
        return Path(job.output)

    for segment in get_args(Segment):
        made = run(segment, "entropy_pilot", trajectories=sampled["base"], segment=segment)
        shutil.copytree(made, folder / segment, dirs_exist_ok=True)
    files = [f"{stage}={file}" for stage, file in sampled.items()]
    shutil.copytree(run("action_space", "action_space", trajectories=files, limit=200), folder, dirs_exist_ok=True)
    rows = []
    for stage in ("base", LAST):
        model = reached(cells[stage, 0].jobs[-1].flags["model_name_or_path"])
        made = run(f"hints_{stage}", "insufficiency", model, trajectories=sampled[stage])
        found = json.loads((made / "result.json").read_text())["sets"]["all"]
        rows.append([VARIANTS[cells[stage, 0].variant].label, *(found[c] for c in HINTED)])
    text = "Wrong trajectories, and what up to three hints repair (another sample without a hint would repair some "
    text += "too): shares of the wrong ones, calls beyond theirs.\n\n"
    write_text(folder / "insufficiency.md", text + table(["", *HINTED], rows) + "\n")


def notes(cells: Cells, commits: set[str], args: Args) -> list[str]:
    """Sentences that say how the numbers were made."""
    first = cells[LAST, 0]
    n, sigma = sum(1 for _ in read_jsonl(first.files["held_out"])), ET["sigma_tool"]
    steps, rounds = cells["outcome_rl", 0].jobs[0].flags["max_steps"], first.jobs[-2].flags["max_steps"]
    curricula = [Path(cells[LAST, seed].jobs[-2].output) for seed in range(args.seeds)]
    ended = [json.loads((folder / "result.json").read_text())["ended"] for folder in curricula]
    return [
        f"Every run starts from the base model {args.base}; {args.seeds} seed(s), commit {', '.join(sorted(commits))}.",
        f"GRPO takes {steps} steps of 12 questions × 8 trajectories, each round of ET-Agent's curriculum {rounds}. The "
        "four GRPO runs share questions and their order; for right answers only, both σ of ET-Agent are 0.",
        f"ET-Agent's reward has sigma_tool {sigma} and sigma_length {ET['sigma_length']}, halved from round to round "
        "in the curriculum: one more call pays if it multiplies the probability of a right answer by more than "
        f"e^(sigma_tool/2) = {exp(sigma / 2):.2f}. The entropy rewards are as published (margin 0).",
        f"There are {n} held-out questions of each kind, sampled at temperature 1. One standard error of a share near "
        f"0.9 is {(0.09 / n) ** 0.5:.3f}, near 0.5 {(0.25 / n) ** 0.5:.3f}. {seen_share(first):.0%} of the held-out "
        "questions of the six families also occur in training, word for word: the world has few sums and few facts.",
        "redundant, insufficient and conciseness are shares of trajectories, failed and redundant_calls shares of "
        "calls; calls and tokens are means per trajectory. eval/behaviour.py defines them.",
        *(f"The curriculum of seed {s} ended early ({why}): rows of later rounds show the last one again."
          for s, why in enumerate(ended) if why),
    ]  # fmt: skip


def seen_share(cell: Cell) -> float:
    """Share of a cell's held-out questions that stand in its training questions too."""
    seen = {row["question"] for _, row in read_jsonl(cell.files["train"])}
    return fmean(row["question"] in seen for _, row in read_jsonl(cell.files["held_out"]))


if __name__ == "__main__":
    cli(main, Args)
