"""Runs the claims of the three papers, cell by cell, and writes the table of what held and what did not.

    python -m experiments.claims --list                                    cells done and missing, expected minutes
    python -m experiments.claims --only et_behaviour_reward --workers 2    the cells of some claims
    python -m experiments.claims --full --max_minutes 120 --workers 2      all of them, for two hours; the next call goes on

1. Every claim of experiments/claim_list.py needs cells: its variants, each with seeds 0 … N−1, on the same held-out questions.
2. What is missing runs in `--workers` processes of one thread each (experiments/claim_cells.py), most valuable claims first.
3. A finished cell is one row of rows.jsonl in --results; report.md there is made from the rows alone.
Killed at any moment, the same command goes on. A cell that fails is reported, the others go on.
"""

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from tqdm import tqdm

from core.args import arg, cli, require_positive
from core.run import table
from core.trajectory import DataError, read_jsonl, write_jsonl
from experiments.claim_cells import Cell, plan_cell, row_file, run_cell
from experiments.claim_list import CLAIMS, EVALUATION_MINUTES, VARIANTS, Claim
from experiments.claim_report import variants_of, write_report

PASSED_ON = ("output_dir", "base", "preset", "train_questions", "eval_questions", "max_steps")  # to a cell's process
NAMED = 3  # claims whose missing cells --list names
STOP_SECONDS = 60  # that a stopped cell gets to close its tools


@dataclass
class Args:
    """Flags; the defaults are those of the published table."""

    only: list[str] = arg([], "claims to run or list")
    full: bool = arg(False, "all claims")
    list: bool = arg(False, "print what is done and what is missing, and run nothing")
    report: bool = arg(False, "write the report from the rows, and run nothing")
    cell: str = arg("", "run this one cell here, VARIANT/SEED, and print its row's metrics")
    workers: int = arg(1, "cells run at once, one thread each")
    max_minutes: float = arg(0.0, "stop the running cells after this time; 0 = run until all is done")
    seeds: int = arg(5, "paired seeds 0 … N−1 of every variant")
    output_dir: str = arg("out/claims", "folder of the stages: models, trajectories, logs")
    results: str = arg("results/claims", "folder of rows.jsonl and report.md; cells with a row there are done")
    base: str = arg("data/tiny", "base model")
    preset: str = arg("tiny", "size of the world that the base was trained on")
    train_questions: int = arg(2000, "questions to train on")
    eval_questions: int = arg(1000, "held-out questions")
    max_steps: int = arg(0, "fewer steps than declared in every training stage (a smoke run); 0 = as declared")

    def __post_init__(self):
        if unknown := [name for name in self.only if name not in CLAIMS]:
            raise ValueError(f"--only: unknown claim {unknown[0]!r}, known are {', '.join(CLAIMS)}")
        variant, _, seed = self.cell.partition("/")
        if self.cell and (variant not in VARIANTS or not seed.isdecimal()):
            raise ValueError(f"--cell {self.cell!r} is not VARIANT/SEED with a variant of experiments/claim_list.py")
        if not (self.only or self.full or self.list or self.report or self.cell):
            raise ValueError("choose what to run: --full, --only CLAIM … or --cell VARIANT/SEED; or --list, --report")
        require_positive(self, "workers", "seeds", "train_questions", "eval_questions")


def main(args: Args) -> dict[str, list[str]]:
    """Run what is missing of the chosen claims, write rows and report; returns claim -> verdicts of its pairs."""
    if args.cell:
        signal.signal(signal.SIGINT, signal.default_int_handler)  # how --max_minutes stops it; ignored behind `&`
        variant, _, seed = args.cell.partition("/")
        row = run_cell(plan_cell(variant, int(seed), args), args)
        print(json.dumps(row["metrics"], indent=1))
        return {}
    chosen = {name: claim for name, claim in CLAIMS.items() if name in args.only or not args.only}
    cells = cells_of(chosen, args)
    rows = collect_rows(cells, args)
    if args.list:
        print(listing(chosen, cells, rows))
        return {}
    problems = [] if args.report else run_missing([cell for key, cell in cells.items() if key not in rows], args)
    rows = collect_rows(cells_of(CLAIMS, args), args)  # the report is of all claims, whatever ran now
    verdicts = write_report(Path(args.results), CLAIMS, rows, args.seeds, args.eval_questions)
    missing = [f"{name}/{seed}" for name, seed in cells if (name, seed) not in rows]
    print(f"{len(cells) - len(missing)} of {len(cells)} cells done; report: {Path(args.results) / 'report.md'}")
    if missing and not args.report:
        print(f"missing: {', '.join(missing)}")
    if problems:
        raise DataError("cells failed: " + "; ".join(problems))
    return {name: verdicts[name] for name in chosen}


def cells_of(claims: dict[str, Claim], args: Args) -> dict[tuple[str, int], Cell]:
    """Every cell that the claims need, in the order in which they are worth running: claim by claim, seed by seed."""
    keys = [
        (variant, seed)
        for claim in claims.values()
        for seed in range(args.seeds)
        for variant in variants_of([claim])
    ]
    return {key: plan_cell(*key, args) for key in dict.fromkeys(keys)}


def collect_rows(cells: dict[tuple[str, int], Cell], args: Args) -> dict[tuple[str, int], dict]:
    """Rows of finished cells, from rows.jsonl and from what cells left since; rows.jsonl is brought up to date.

    Rows of cells that are declared otherwise by now stay in the file and are not used.
    """
    path = Path(args.results) / "rows.jsonl"
    stored = {}
    if path.exists():
        for number, row in read_jsonl(path):
            try:
                stored[row["variant"], row["seed"], row["digest"]] = row
            except KeyError as e:
                raise DataError(f"{path}:{number}: missing field {e}") from None
    known = len(stored)
    for (variant, seed), cell in cells.items():
        file = row_file(cell, args)
        if (variant, seed, cell.digest) not in stored and file.exists():
            stored[variant, seed, cell.digest] = json.loads(file.read_text())
    if len(stored) > known:
        write_jsonl(path, (stored[key] for key in sorted(stored)))
    return {(v, s): stored[v, s, cell.digest] for (v, s), cell in cells.items() if (v, s, cell.digest) in stored}


# ---------------------------------------------------------------------------------------------------- running


def run_missing(cells: list[Cell], args: Args) -> list[str]:
    """Run cells in `--workers` processes until all are done or the time is up; returns what went wrong."""
    deadline = time.monotonic() + 60 * args.max_minutes if args.max_minutes else float("inf")
    todo, running, problems = list(cells), {}, []
    bar = tqdm(total=len(todo), desc="claims", unit="cell")
    try:
        while (todo or running) and time.monotonic() < deadline:
            cell = next_cell(todo, running.values()) if len(running) < args.workers else None
            if cell:
                todo.remove(cell)
                running[start(cell, args)] = cell
                bar.set_postfix_str(", ".join(f"{c.variant}/{c.seed}" for c in running.values()))
                continue
            time.sleep(0.2)
            for process in [p for p in running if p.poll() is not None]:
                cell = running.pop(process)
                bar.update()
                if process.returncode:
                    where = log_file(cell, args)
                    problems.append(f"{cell.variant}/{cell.seed} (exit code {process.returncode}, see {where})")
    finally:
        for process in running:
            process.send_signal(signal.SIGINT)  # as Ctrl-C: tools are closed, the last checkpoint stays
        for process in running:
            try:
                process.wait(STOP_SECONDS)
            except subprocess.TimeoutExpired:
                process.kill()
        bar.close()
    return problems


def next_cell(todo: list[Cell], running) -> Cell | None:
    """The first cell that shares no unfinished stage with a running one, so that no worker waits for another."""
    busy = {job.folder for cell in running for job in cell.jobs if not job.done.exists()}
    for cell in todo:
        if not any(job.folder in busy and not job.done.exists() for job in cell.jobs):
            return cell
    return None


def start(cell: Cell, args: Args) -> subprocess.Popen:
    """A process that runs one cell on one thread; what it prints goes to its log."""
    flags = [word for name in PASSED_ON for word in (f"--{name}", str(getattr(args, name)))]
    command = [sys.executable, __file__, "--cell", f"{cell.variant}/{cell.seed}", *flags]
    log_file(cell, args).parent.mkdir(parents=True, exist_ok=True)
    threads = {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
    with open(log_file(cell, args), "ab") as log:
        return subprocess.Popen(command, stdout=log, stderr=log, env=os.environ | threads)


def log_file(cell: Cell, args: Args) -> Path:
    """Where a cell's process prints."""
    return Path(args.output_dir) / "logs" / f"{cell.variant}-{cell.seed}.log"


def listing(claims: dict[str, Claim], cells: dict, rows: dict) -> str:
    """A table of the claims: cells done, and the minutes that the missing ones are expected to take.

    A cell or stage that several claims share is counted with the first of them. The missing cells of few claims are
    named.
    """
    lines, counted, missing = [], set(), {}
    for name, claim in claims.items():
        variants = variants_of([claim])
        mine = [key for key in cells if key[0] in variants]
        minutes = 0.0
        for key in mine:
            if key in rows or key in counted:
                continue
            counted.add(key)
            costs = [*(stage.minutes for stage in VARIANTS[key[0]].stages), EVALUATION_MINUTES]
            for job, cost in zip(cells[key].jobs, costs, strict=True):
                if job.folder not in counted and not job.done.exists():
                    counted.add(job.folder)
                    minutes += cost
        missing |= {v: ",".join(str(s) for w, s in mine if w == v and (v, s) not in rows) for v in variants}
        lines.append([name, f"{sum(key in rows for key in mine)} of {len(mine)}", minutes])
    total = [f"all {len(claims)}", f"{len(rows)} of {len(cells)}", sum(line[2] for line in lines)]
    lines = [[*line[:2], f"{line[2]:.0f}"] for line in [*lines, total]]
    text = table(["claim", "cells done", "minutes on one core, beside those of the claims above"], lines)
    if len(claims) > NAMED:
        return text + "\nmissing cells by name: --list --only CLAIM"
    return text + "\nmissing: " + (" ".join(f"{v}/{seeds}" for v, seeds in missing.items() if seeds) or "none")


if __name__ == "__main__":
    cli(main, Args)
