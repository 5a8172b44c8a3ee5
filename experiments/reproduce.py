"""The main job: the three methods in the calibration world, from the shipped base to one report.

    ./reproduce.sh                      (or: python -m experiments.reproduce) one seed, on two cores
    python -m experiments.reproduce --seeds 5       mean and standard deviation over paired seeds
    python -m experiments.reproduce --quick         a smoke run of the same path
    python -m experiments.reproduce --full          the claims: variants × seeds, cell by cell (experiments/claims.py)

1. Evaluate the shipped base, which calls tools too often, too rarely and wrongly at known rates.
2. GRPO from the base on the same questions with four rewards: outcome, ET-Agent, entropy reduction sparse and dense.
3. ET-Agent whole: SFT on right samples → flywheel → RFT → three rounds of (Pareto selection → RL).
4. AutoTool on running sums, where thinking pays on long ones only: warm-up → RL, with and without its constraint.
5. Evaluate all of them on held-out questions; write metrics.json, report.md and figures, and print the tables.
Every part is a resumable folder under --output_dir; what is finished is not computed again.
"""

import ctypes
import json
import math
import os
import signal
import sys
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from statistics import fmean, stdev
from typing import Literal

from tqdm import tqdm

from core.args import RunArgs, arg, cli, require_positive
from core.run import start_run, write_text
from core.trajectory import DataError
from data.questions import load_questions
from data.world import __main__ as world
from eval.evaluate import COLUMNS, metrics_table
from experiments import claims
from experiments.chains import CHAINS, QUESTIONS, STAGES, SUM_NOTES, Job, analyses
from experiments.report import sums_table, write_report
from experiments.shared import PROBES

BASES = {"tiny": "data/tiny", "small": "data/small"}
KINDS = ("stages", "sums")
CURVES = ("outcome_rl", "et_agent", "entropy_sparse", "entropy_dense")


@dataclass
class Args(RunArgs):
    """Flags of the reproduction; the defaults are the README's numbers."""

    output_dir: str = arg("out/reproduce", "folder of the whole reproduction")
    preset: Literal["tiny", "small"] = arg("tiny", "size of the world: tiny for a CPU, small for a GPU")
    base: str = arg("", "base model folder; default: the preset's")
    quick: bool = arg(False, "few steps and questions: shows that the path works, not what it achieves")
    full: bool = arg(False, "run the claims instead (python -m experiments.claims --full has more flags)")
    engine: Literal["hf", "fast"] = arg("fast", "sampler; both sample the same trajectories, up to ties")
    threads: int = arg(1, "CPU threads of each process; results are identical only for equal counts")
    workers: int = arg(2, "processes that train at once")
    seeds: int = arg(1, "runs per stage, paired by seed: --seed, --seed + 1, …")
    train_questions: int = arg(2000, "questions to train on")
    eval_questions: int = arg(600, "held-out questions to evaluate on")
    max_steps: int = arg(80, "RL steps of each single run")
    round_steps: int = arg(30, "RL steps of each round of ET-Agent's curriculum")
    sum_questions: int = arg(1600, "running sums to warm up and train on")
    evolve_questions: int = arg(240, "questions of SFT samples and flywheel")
    select_questions: int = arg(400, "questions sampled before each round of the curriculum; half are kept")
    sigma_tool: float = arg(0.5, "ET-Agent reward: weight of tool calls (paper 0.1, on a 7B model)")
    sigma_length: float = arg(0.1, "ET-Agent reward: weight of reasoning length")

    def __post_init__(self):
        super().__post_init__()
        require_positive(self, "seeds", "workers")
        if self.full and self.quick:
            raise ValueError("--quick does not go with --full; for a smoke run of the claims: experiments/claims.py --max_steps N")
        if self.quick:
            self.train_questions, self.eval_questions, self.max_steps = 240, 120, 6
            self.round_steps, self.evolve_questions, self.select_questions, self.sum_questions = 3, 24, 36, 60


def main(args: Args) -> dict:
    """Run what is missing, write the report, return the content of metrics.json."""
    if args.full:
        own = dict(base=args.base or BASES[args.preset], preset=args.preset, workers=args.workers)
        return claims.main(claims.Args(full=True, **own))
    run = start_run(args)
    out, base = Path(args.output_dir), args.base or BASES[args.preset]
    if run.finished:
        metrics = json.loads((out / "metrics.json").read_text())
        print(f"{out}: finished before", tables(metrics), f"report: {out / 'report.md'}", sep="\n")
        return metrics
    if not Path(base).is_dir():
        command = f"python -m data.world --pretrain --preset {args.preset} --output {base}"
        raise DataError(f"--base {base}: no such folder; make it with: {command}")
    index = out / "index"
    if not index.exists():
        world.main(["--index", str(index), "--preset", args.preset])
    seeds = range(args.seed, args.seed + args.seeds)
    jobs = [Job(out / f"seed-{seed}", base, str(index), seed, args) for seed in seeds]
    per_seed = run_chains(jobs, args.workers)
    metrics = combine(per_seed)
    write_text(out / "metrics.json", json.dumps(metrics, indent=1) + "\n")
    notes = [
        f"base {base}, {args.seeds} seed(s) from {args.seed}, {args.max_steps} steps of 12 questions × 8 trajectories "
        f"(rl_round_*: {args.round_steps} each), {args.eval_questions} held-out questions, temperature 1",
        f"ET-Agent reward with sigma_tool {args.sigma_tool}, sigma_length {args.sigma_length}, halved from round to "
        "round in the curriculum: one more call pays if it multiplies the probability of a right answer by more than "
        f"e^(sigma_tool/2) = {math.exp(args.sigma_tool / 2):.2f}; entropy rewards as published (margin 0)",
        "outcome_rl, et_agent, entropy_sparse, entropy_dense: single runs from the base, which share questions and their "
        "order; outcome_rl: the ET-Agent reward with both sigma 0; sft → rft → rl_round_1 …: ET-Agent whole, et_agent its "
        "reward alone",
        "redundant, insufficient, conciseness: shares of trajectories; failed, redundant_calls: shares of calls; "
        "calls, tokens: means per trajectory; definitions in eval/behaviour.py",
        f"one standard error of a share near 0.9 is {math.sqrt(0.09 / args.eval_questions):.3f}, near 0.5 "
        f"{math.sqrt(0.25 / args.eval_questions):.3f}; {seen_share(jobs[0]):.0%} of the held-out questions of the six "
        "families also occur in training, word for word: the world has few sums and few facts",
        f"sums are hard if the base, without thinking, is right in fewer than half of {PROBES} samples, else easy",
        *SUM_NOTES,
    ]
    runs = {stage: [out / f"seed-{seed}" / stage for seed in seeds] for stage in CURVES}
    report = write_report(out, metrics, runs, notes)
    run.finish({"report": str(report)})
    print(tables(metrics), f"\nreport: {report}", sep="\n")
    return metrics


def run_chains(jobs: list[Job], workers: int) -> list[dict]:
    """Every chain of every seed, `workers` at once, each in a process of its own; the parts of each seed put together.

    A process writes what it does to CHAIN.log in its seed's folder; it ends when this one does.
    """
    for job in jobs:
        for part in QUESTIONS:
            job.questions(part)
    tasks = [(job, name, chain) for job in jobs for name, chain in CHAINS.items()]
    results: dict[tuple, dict] = {}
    with ProcessPoolExecutor(workers, get_context("spawn"), initializer=end_with_parent) as pool:
        futures = {pool.submit(run_chain, *task): (task[0].seed, task[1]) for task in tasks}
        print(f"{len(tasks)} chains, {workers} at once; what each does: tail -f {jobs[0].folder}/*.log")
        bar = tqdm(as_completed(futures), total=len(tasks), desc="reproduce", unit="chain")
        for future in bar:
            results[futures[future]] = future.result()
            bar.set_postfix(done="/".join(map(str, futures[future])))
        pool.submit(run_chain, jobs[0], "analyses", analyses).result()
    merged = []
    for job in jobs:
        parts = [results[job.seed, name] for name in CHAINS]
        merged.append({kind: {k: v for part in parts for k, v in part.get(kind, {}).items()} for kind in KINDS})
    return merged


def seen_share(job: Job) -> float:
    """Share of the held-out questions of the six families that stand in the training questions too."""
    seen = {q.question for q in load_questions(job.questions("train"))}
    return fmean(q.question in seen for q in load_questions(job.questions("eval")))


def end_with_parent() -> None:
    """Ask the kernel to end this process when the one that started it is gone, so that no two work on a folder."""
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG


def run_chain(job: Job, name: str, chain: Callable[[Job], dict]) -> dict:
    """One chain in this process, its output in the log file of that name; returns what the chain does."""
    with open(job.folder / f"{name}.log", "a", buffering=1) as log:
        os.dup2(log.fileno(), sys.stdout.fileno())
        os.dup2(log.fileno(), sys.stderr.fileno())
    return chain(job)


def combine(per_seed: list[dict]) -> dict:
    """metrics.json: stage and family means over seeds and, for several seeds, the standard deviation of each metric."""
    first = per_seed[0]
    stages, sums = sorted(first["stages"], key=STAGES.index), first["sums"]
    metrics = {
        "stages": {s: _mean([m["stages"][s]["all"] for m in per_seed]) for s in stages},
        "families": {
            s: {f: _mean([m["stages"][s]["families"][f] for m in per_seed]) for f in first["stages"][s]["families"]}
            for s in stages
        },
        "sums": {
            s: {part: _mean([m["sums"][s][part] for m in per_seed if part in m["sums"][s]]) for part in sums[s]}
            for s in sums
        },
    }
    if len(per_seed) > 1:
        metrics["spread"] = {
            s: {c: stdev(m["stages"][s]["all"][c] for m in per_seed) for c in COLUMNS if c != "n"} for s in stages
        }
        metrics["seeds"] = per_seed
    return metrics


def _mean(rows: list[dict]) -> dict:
    return {name: fmean(row[name] for row in rows) if name != "n" else rows[0]["n"] for name in rows[0]}


def tables(metrics: dict) -> str:
    """The stage table and the table of sums."""
    return f"{metrics_table(metrics['stages'])}\n\n{sums_table(metrics['sums'])}"


if __name__ == "__main__":
    cli(main, Args)
