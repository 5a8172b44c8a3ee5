"""Run folders: how one is started, resumed and finished, its seeds and metric files.

A run directory holds `config.json` (all arguments) and `env.json` (machine, versions, data hashes) before any work,
`metrics.jsonl` while it runs, `checkpoint-N/` and, once finished, `result.json`.
"""

import hashlib
import importlib.metadata
import importlib.util
import json
import os
import platform
import random
import re
import shutil
import subprocess
from collections.abc import Callable
from dataclasses import MISSING, asdict, fields
from datetime import date
from pathlib import Path
from typing import Any

import torch

from core import distributed
from core.trajectory import DataError

PACKAGES = ("torch", "triton", "transformers", "peft", "bitsandbytes", "datasets", "math-verify", "bm25s")
STARTED = ("config.json", "env.json")  # what a run folder holds before anything is computed
# may differ when a run goes on, which may also have moved
NOT_CONFIG = {
    "output", "output_dir", "overwrite", "report_to", "base_url", "workers", "evaluate",
}  # fmt: skip


class Run:
    """An opened run directory. `finished` is the result of an earlier identical run, or None."""

    def __init__(self, directory: Path, finished: dict | None, log_to: Callable[[dict, int], None]):
        self.dir, self.finished, self._log_to = directory, finished, log_to

    def log(self, step: int, metrics: dict) -> None:
        """Append one line to metrics.jsonl (and the tracker); process 0 of several does."""
        if distributed.rank() > 0:
            return
        with open(self.dir / "metrics.jsonl", "a", encoding="utf-8") as out:
            out.write(json.dumps({"step": step, **metrics}) + "\n")
        self._log_to(metrics, step)

    def forget_after(self, step: int) -> None:
        """Drop metric and sample lines of steps later than `step`, which a resumed run will write again."""
        if distributed.rank() > 0:
            return
        for name in ("metrics.jsonl", "samples.jsonl"):
            path = self.dir / name
            if path.exists():
                with open(path, encoding="utf-8", errors="replace") as lines:  # a kill may cut a character
                    rows = [line.rstrip("\n") + "\n" for line in lines if _step_of(line) <= step]
                write_text(path, "".join(rows))

    def finish(self, result: dict) -> None:
        """Write result.json, which marks the run as finished."""
        write_text(self.dir / "result.json", json.dumps(result, indent=1) + "\n")


def _step_of(line: str) -> float:
    try:
        return json.loads(line)["step"]
    except json.JSONDecodeError:  # the line that a kill cut off
        return float("inf")


def start_run(args: Any, data_files: tuple[str, ...] = ()) -> Run:
    """Open `args.output_dir`: fresh, resumed (same arguments, unfinished) or finished (same arguments, result.json).

    Sets the thread count and the global seeds. DataError if the folder holds another run or other files, or, before it
    is made, if the tracker is not installed.
    """
    report_to = getattr(args, "report_to", "none")
    check_tracker(report_to)
    torch.set_num_threads(args.threads)
    seed_everything(args.seed)
    directory = Path(args.output_dir)
    config_file = directory / "config.json"
    if distributed.rank() > 0:
        distributed.wait()  # until process 0 has opened the folder
    elif args.overwrite and config_file.exists():
        shutil.rmtree(directory)
    finished = None
    unused = not directory.exists() or all(p.name in STARTED for p in directory.iterdir())  # nothing was computed there
    keep_date(args, config_file if distributed.rank() > 0 or not unused else None)
    config = asdict(args)
    if unused and distributed.rank() == 0:
        directory.mkdir(parents=True, exist_ok=True)
        write_text(directory / "env.json", json.dumps(environment(args.threads, data_files), indent=1) + "\n")
        write_text(config_file, json.dumps(config, indent=1) + "\n")
    elif config_file.exists():
        if other := other_setting(json.loads(config_file.read_text()), args):
            raise DataError(f"--output_dir {directory} holds a run with {other}; choose another folder or --overwrite")
        known = json.loads((directory / "env.json").read_text()).get("data_sha256", {})
        for path, digest in data_digests(data_files).items():
            if known.get(path, digest) != digest:
                raise DataError(f"{path} has changed since the run in --output_dir {directory} was started")
        if (directory / "result.json").exists():
            finished = json.loads((directory / "result.json").read_text())
    else:
        raise DataError(f"--output_dir {directory} is in use: it holds files but no config.json of a run")
    if distributed.rank() == 0:
        distributed.wait()
    return Run(directory, finished, tracker(report_to, directory, config))


def keep_date(args: Any, config_file: Path | None) -> None:
    """Fix `--date`, if it was not given: to the day of the run that the file is of, or today if there is none."""
    if getattr(args, "date", None) == "":
        old = config_file is not None and config_file.exists()
        args.date = json.loads(config_file.read_text()).get("date", "") if old else str(date.today())


def other_setting(stored: dict, args: Any) -> str:
    """The first flag that a run was started with another value of, as "--flag OLD, not NEW"; "" if it may go on.

    A flag that is newer than the run had its default.
    """
    old = {f.name: f.default_factory() if f.default is MISSING else f.default for f in fields(args)} | stored
    new = asdict(args)
    differing = (name for name in sorted(old) if name not in NOT_CONFIG and old[name] != new.get(name))
    return next((f"--{name} {old[name]}, not {new.get(name)}" for name in differing), "")


def environment(threads: int, data_files: tuple[str, ...] = ()) -> dict:
    """What a number depends on besides the arguments."""
    versions = {}
    for package in PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            versions[package] = None
    cuda = torch.cuda.is_available()
    return {
        "commit": commit(),
        "python": platform.python_version(),
        "machine": f"{platform.system()} {platform.machine()}",
        "cpu": cpu_name(),
        "cores": os.cpu_count(),
        "threads": threads,
        "gpu": torch.cuda.get_device_name() if cuda else None,
        "cuda": torch.version.cuda if cuda else None,
        "packages": versions,
        "data_sha256": data_digests(data_files),
    }


def data_digests(files: tuple[str, ...]) -> dict[str, str]:
    """Path -> SHA-256 of its content, for those that are files (not names of datasets on the hub)."""
    return {str(f): hashlib.sha256(Path(f).read_bytes()).hexdigest() for f in files if Path(f).is_file()}


def commit() -> str:
    """Git commit of the code, with '+dirty' if tracked files differ from it; 'unknown' outside a checkout."""
    here = Path(__file__).parent
    try:
        sha = subprocess.run(["git", "rev-parse", "--short=12", "HEAD"], cwd=here, capture_output=True, text=True)
        dirty = subprocess.run(["git", "status", "--porcelain", "-uno"], cwd=here, capture_output=True, text=True)
    except OSError:
        return "unknown"
    if sha.returncode:
        return "unknown"
    return sha.stdout.strip() + ("+dirty" if dirty.stdout.strip() else "")


def cpu_name() -> str:
    """Model name of the processor, as the system tells it."""
    try:
        found = re.search(r"model name\s*:\s*(.+)", Path("/proc/cpuinfo").read_text())
    except OSError:
        found = None
    return found.group(1).strip() if found else platform.processor() or "unknown"


def check_tracker(report_to: str) -> None:
    """DataError if the package that `--report_to` names is not installed."""
    if report_to == "none":
        return
    found = importlib.util.find_spec(report_to)
    if not found or not found.origin:  # a folder of its runs is found as a package without code
        raise DataError(f"--report_to {report_to}: not installed; install it or leave the flag out")


def tracker(report_to: str, directory: Path, config: dict) -> Callable[[dict, int], None]:
    """Optional tracker behind one function (metrics, step); metrics.jsonl is written in any case."""
    if report_to == "none" or distributed.rank() > 0:
        return lambda metrics, step: None
    import wandb

    run = wandb.init(project="tare", name=directory.name, config=config)
    return lambda metrics, step: run.log({**metrics, "step": step})


def seed_of(*parts: Any) -> int:
    """A 63-bit seed that is a pure function of its parts, the same on every machine."""
    return int.from_bytes(hashlib.blake2b(repr(parts).encode(), digest_size=8).digest(), "big") >> 1


def seed_everything(seed: int) -> None:
    """Seed the global generators (weights of fresh adapters); sampling has its own seeds, see rollout.py."""
    random.seed(seed)
    torch.manual_seed(seed)


def write_text(path: Path, text: str) -> None:
    """Write a file through a temporary one, so that a kill leaves either the old or the new file."""
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(text, encoding="utf-8")
    os.replace(temporary, path)


def drop_torn_line(path: Path) -> None:
    """Remove the last line of a file whose writer was killed in the middle of it."""
    text = path.read_text(encoding="utf-8", errors="replace")
    if text and not text.endswith("\n"):
        write_text(path, text[: text.rfind("\n") + 1])


def shuffled(n: int, *seed_parts: Any) -> list[int]:
    """A permutation of range(n) that is a pure function of the seed parts."""
    order = list(range(n))
    random.Random(seed_of(*seed_parts)).shuffle(order)
    return order


def question_indices(n: int, per_step: int, step: int, seed: int) -> list[int]:
    """Indices of the step's questions: cuts of one seeded permutation per epoch, its remainder dropped."""
    epoch, cut = divmod(step, n // per_step)
    return shuffled(n, seed, "order", epoch)[cut * per_step : (cut + 1) * per_step]


def table(header: list[str], rows: list[list]) -> str:
    """A markdown table; floats with three digits, None as –, columns padded so that it also reads well in a terminal."""
    shown = {float: "{:.3f}".format, type(None): lambda _: "–"}
    text = [[shown.get(type(cell), str)(cell) for cell in row] for row in [header, *rows]]
    widths = [max(len(row[i]) for row in text) for i in range(len(header))]
    lines = ["| " + " | ".join(cell.ljust(width) for cell, width in zip(row, widths)) + " |" for row in text]
    return "\n".join([lines[0], "|" + "|".join("-" * (width + 2) for width in widths) + "|", *lines[1:]])
