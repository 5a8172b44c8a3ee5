"""The command line of every script: one dataclass field is one flag, and a mistake is one line and exit code 2."""

import difflib
import json
import os
import subprocess
import sys
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, TypeVar

import transformers
from transformers import HfArgumentParser

from core import distributed
from core.trajectory import DataError

A = TypeVar("A")

TrainedFlags = Callable[[str], tuple[str, dict]]  # --model_name_or_path -> (file that tells, flags of its training)


def arg(default: Any, help: str) -> Any:
    """A dataclass field with its help text: one line per flag."""
    if isinstance(default, (list, dict)):
        return field(default_factory=lambda: default.copy(), metadata={"help": help})
    return field(default=default, metadata={"help": help})


def flags_of(cls: type, args: Any) -> dict[str, Any]:
    """The flags of the script `cls` that `args` has too, for a script that drives others."""
    return {f.name: getattr(args, f.name) for f in fields(cls) if hasattr(args, f.name)}


def require_positive(args: Any, *flags: str) -> None:
    """ValueError that names the first of these flags that is less than 1."""
    for flag in flags:
        if getattr(args, flag) < 1:
            raise ValueError(f"--{flag} must be at least 1, not {getattr(args, flag)}")


def check_numbers(args: Any) -> None:
    """ValueError that names the first number among the flags that is negative or no number: no flag means that."""
    for f in fields(args):
        value = getattr(args, f.name)
        if isinstance(value, (int, float)) and not value >= 0:
            raise ValueError(f"--{f.name} must be a number from 0 on, not {value}")


@dataclass
class RunArgs:
    """Flags that every script has."""

    output_dir: str = arg("", "folder of this run: config, metrics, checkpoints, result (required)")
    overwrite: bool = arg(False, "start again in a folder that holds a run")
    seed: int = arg(0, "seed of everything random in this run")
    threads: int = arg(2, "CPU threads; results are identical only for equal counts")

    def __post_init__(self):
        if not self.output_dir:
            raise ValueError("--output_dir is required")
        check_numbers(self)
        require_positive(self, "threads")


def parse_args(cls: type[A], argv: list[str] | None = None, trained: TrainedFlags | None = None) -> A:
    """Command line (with `--config file.json` as defaults) -> dataclass; a bad flag is one line and exit code 2.

    trained: gives flags that neither of the two names the values that the model was trained with, and says so.
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    parser = HfArgumentParser(cls, allow_abbrev=False, description=sys.modules[cls.__module__].__doc__)
    parser.epilog = "--dry_run [GB] prints what this command would do and need, here or on a GPU of so many GB."

    def fail(message: str):
        print(f"{Path(sys.argv[0]).name}: error: {message}", file=sys.stderr)
        sys.exit(2)

    parser.error = fail
    names, given = {f.name for f in fields(cls)}, set()
    for i, word in enumerate(argv):
        if word == "--config" or word.startswith("--config="):
            path = word.partition("=")[2] or (argv[i + 1] if i + 1 < len(argv) else "")
            del argv[i : i + (1 if "=" in word else 2)]
            try:
                values = json.loads(Path(path).read_text())
            except (OSError, json.JSONDecodeError) as e:
                fail(f"--config {path!r}: {e}")
            if unknown := set(values) - names:
                fail(f"--config {path}: unknown flag {sorted(unknown)[0]!r}")
            parser.set_defaults(**values)
            given = set(values)
            break
    for word in argv:
        flag = word.split("=")[0]
        name = flag.lstrip("-").replace("-", "_")
        if flag.startswith("--") and name not in names and name.removeprefix("no_") not in names and name != "help":
            near = difflib.get_close_matches(name, names, 1)
            fail(f"unknown flag {flag}" + (f" (did you mean --{near[0]}?)" if near else ""))
        given |= {name, name.removeprefix("no_")}
    if trained and (path := parser.parse_args(argv).model_name_or_path):
        file, known = trained(path)
        new = {name: v for name, v in known.items() if name not in given and v != parser.get_default(name)}
        parser.set_defaults(**new)
        if new:
            print(f"from {file}: " + " ".join(f"--{name} {value}" for name, value in new.items()))
    try:
        return parser.parse_args_into_dataclasses(argv, look_for_args_file=False)[0]
    except (ValueError, DataError) as e:
        fail(str(e))


def cli(main: Callable[[A], Any], cls: type[A], trained: TrainedFlags | None = None) -> None:
    """Entry point of a script: bad input ends in one line and exit code 2, Ctrl-C in one line and 130."""
    if "--dry_run" in sys.argv:  # another program, which reads the flags as this one would (bench/plan.py)
        root = Path(__file__).resolve().parents[1]
        words = [sys.executable, "-m", "bench.plan", *sys.argv]
        sys.exit(subprocess.call(words, env=os.environ | {"PYTHONPATH": str(root)}))
    args = parse_args(cls, trained=trained)
    transformers.utils.logging.disable_progress_bar()  # our own bars show what matters
    warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")
    try:
        main(args)
    except DataError as e:
        print(f"{Path(sys.argv[0]).name}: error: {e}", file=sys.stderr)
        sys.exit(2)
    except distributed.ProcessLost as e:
        print(f"{Path(sys.argv[0]).name}: {e}; the same command goes on from the last checkpoint", file=sys.stderr)
        sys.exit(3)
    except KeyboardInterrupt:
        print("interrupted; the same command goes on from the last checkpoint", file=sys.stderr)
        sys.exit(130)
