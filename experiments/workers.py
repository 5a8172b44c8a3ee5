"""Runs cells in worker processes, several at a time, and stops them cleanly when the time is up or we are gone."""

import ctypes
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterable
from pathlib import Path

from tqdm import tqdm

from experiments.cells import Cell, CellArgs

PASSED_ON = ("output_dir", "base", "preset", "train_questions", "eval_questions", "max_steps")  # to a cell's process
STOP_SECONDS = 60  # that a stopped cell gets to close its tools
LIBC = ctypes.CDLL(None)


def run_missing(cells: list[Cell], args: CellArgs, max_minutes: float = 0.0) -> list[str]:
    """Run cells in `--workers` processes until all are done or the time is up (0 = no limit); returns what failed."""
    deadline = time.monotonic() + 60 * max_minutes if max_minutes else float("inf")
    todo, running, problems = list(cells), {}, []
    bar = tqdm(total=len(todo), desc="cells", unit="cell")
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


def next_cell(todo: list[Cell], running: Iterable[Cell]) -> Cell | None:
    """The first cell that shares no unfinished stage with a running one, so that no worker waits for another."""
    busy = {job.folder for cell in running for job in cell.jobs if not job.done.exists()}
    for cell in todo:
        if not any(job.folder in busy and not job.done.exists() for job in cell.jobs):
            return cell
    return None


def start(cell: Cell, args: CellArgs) -> subprocess.Popen:
    """A process that runs one cell on one thread; what it prints goes to its log. It is stopped when we are gone."""
    flags = [word for name in PASSED_ON for word in (f"--{name}", str(getattr(args, name)))]
    command = [sys.executable, "-m", "experiments.claims", "--cell", f"{cell.variant}/{cell.seed}", *flags]
    log_file(cell, args).parent.mkdir(parents=True, exist_ok=True)
    env = os.environ | {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
    with open(log_file(cell, args), "ab") as log:
        return subprocess.Popen(command, stdout=log, stderr=log, env=env, preexec_fn=stop_with_parent)


def stop_with_parent() -> None:
    """Ask the kernel to interrupt this process when the one that started it has died, killed for instance."""
    LIBC.prctl(1, signal.SIGINT)  # PR_SET_PDEATHSIG


def log_file(cell: Cell, args: CellArgs) -> Path:
    """Where a cell's process prints."""
    return Path(args.output_dir) / "logs" / f"{cell.variant}-{cell.seed}.log"
