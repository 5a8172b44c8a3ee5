"""Tests what the three papers claim: runs the cells that are missing, writes the table of what held and what did not.

    python -m experiments.claims --list                              cells done and missing, expected minutes
    python -m experiments.claims --only et_behaviour_reward          the cells of some claims
    python -m experiments.claims --full --max_minutes 120            all of them, for two hours; the next call goes on

1. Every claim of experiments/claim_list.py needs cells: its variants, each with seeds 0 … N−1, all asked the same.
2. What is missing runs in `--workers` processes of one thread each (experiments/cells.py), most valuable claims first.
3. A finished cell is one row of rows.jsonl in --results; report.md there is made from the rows alone.
Killed at any moment, the same command goes on. A cell that fails is reported, the others go on.
"""

import json
import signal
from dataclasses import dataclass
from pathlib import Path

from core.args import arg, cli, require_positive
from core.run import table
from core.trajectory import DataError, read_jsonl, write_jsonl
from experiments.cells import Cell, CellArgs, plan_cell, row_file, run_cell
from experiments.claim_list import CLAIMS, Claim
from experiments.claim_report import in_short, variants_of, write_report
from experiments.variants import FRONTIERS, VARIANTS
from experiments.workers import run_missing

FRONTIER = "frontier"  # what --only calls the cells of experiments/frontier.py


@dataclass
class Args(CellArgs):
    """Flags; the defaults are those of the published table."""

    only: list[str] = arg([], "claims to run or list; frontier: the price frontier")
    full: bool = arg(False, "all claims")
    list: bool = arg(False, "print what is done and what is missing, and run nothing")
    report: bool = arg(False, "write the report from the rows, and run nothing")
    cell: str = arg("", "run this one cell here, VARIANT/SEED of a claim or the reproduction; print its metrics")
    max_minutes: float = arg(0.0, "stop the running cells after this time; 0 = run until all is done")
    seeds: int = arg(5, "paired seeds 0 … N−1 of every variant")
    output_dir: str = arg("out/claims", "folder of the stages: models, trajectories, logs")
    results: str = arg("results/claims", "folder of rows.jsonl and report.md; cells with a row there are done")

    def __post_init__(self):
        super().__post_init__()
        if unknown := [name for name in self.only if name not in (*CLAIMS, FRONTIER)]:
            raise ValueError(f"--only: unknown claim {unknown[0]!r}, known are {', '.join(CLAIMS)}, {FRONTIER}")
        variant, _, seed = self.cell.partition("/")
        if self.cell and (variant not in VARIANTS or not seed.isdecimal()):
            raise ValueError(f"--cell {self.cell!r} is not VARIANT/SEED with a variant of experiments/variants.py")
        if not (self.only or self.full or self.list or self.report or self.cell):
            raise ValueError("choose what to run: --full, --only CLAIM … or --cell VARIANT/SEED; or --list, --report")
        require_positive(self, "seeds")


def main(args: Args) -> dict[str, list[str]]:
    """Run what is missing of the chosen claims, write rows and report; returns claim -> verdicts of its pairs."""
    if args.cell:
        signal.signal(signal.SIGINT, signal.default_int_handler)  # how --max_minutes stops it; ignored behind `&`
        variant, _, seed = args.cell.partition("/")
        row = run_cell(plan_cell(variant, int(seed), args), args)
        print(json.dumps(row["metrics"], indent=1))
        return {}
    chosen = {name: claim for name, claim in CLAIMS.items() if name in args.only or not args.only}
    cells = cells_of(chosen, args, FRONTIER in args.only or not args.only)
    rows = collect_rows(cells, args)
    if args.list:
        print(listing(chosen, cells, rows))
        return {}
    todo = [] if args.report else [cell for key, cell in cells.items() if key not in rows]
    problems = run_missing(todo, args, args.max_minutes) if todo else []
    rows = collect_rows(cells_of(CLAIMS, args, True), args)  # the report is of all claims, whatever ran now
    verdicts = write_report(Path(args.results), CLAIMS, rows, args.seeds)
    missing = [key for key in cells if key not in rows]
    print(f"{len(cells) - len(missing)} of {len(cells)} cells done; report: {Path(args.results) / 'report.md'}")
    if missing and not args.report:
        print(f"missing: {in_short(missing)}")
    if problems:
        raise DataError("cells failed: " + "; ".join(problems))
    return {name: verdicts[name] for name in chosen}


def cells_of(claims: dict[str, Claim], args: Args, frontier: bool = False) -> dict[tuple[str, int], Cell]:
    """Every cell that the claims (and the price frontier) need, in the order in which they are worth running.

    That is seed by seed: first those of the frontier, which asks the first question of all, then claim by claim.
    """
    against = [prices + methods for prices, methods in FRONTIERS.values()] if frontier else []
    needed = [*against, *(variants_of([claim]) for claim in claims.values())]
    keys = [(v, seed) for variants in needed for seed in range(args.seeds) for v in variants]
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


def listing(claims: dict[str, Claim], cells: dict[tuple[str, int], Cell], rows: dict) -> str:
    """A table of the claims: cells done, and the minutes that the missing ones are expected to take; the missing cells.

    A stage that several claims share is counted with the first of them.
    """
    lines, counted = [], {}
    for name, claim in claims.items():
        mine = {key: cell for key, cell in cells.items() if key[0] in variants_of([claim])}
        jobs = [job for key, cell in mine.items() if key not in rows for job in cell.jobs]
        jobs = {job.folder: job.minutes for job in jobs if not job.done.exists()}
        minutes = sum(m for folder, m in jobs.items() if folder not in counted)
        counted |= jobs
        lines.append([name, f"{len(mine.keys() & rows.keys())} of {len(mine)}", f"{minutes:.0f}"])
    lines.append([f"all {len(claims)}", f"{len(rows)} of {len(cells)}", f"{sum(counted.values()):.0f}"])
    text = table(["claim", "cells done", "minutes on one core, beside those of the claims above"], lines)
    missing = in_short(key for key in cells if key not in rows)
    return f"{text}\nmissing: {missing if len(claims) < len(CLAIMS) else 'by name with --list --only CLAIM …'}"


if __name__ == "__main__":
    cli(main, Args)
