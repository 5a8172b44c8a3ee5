"""Writes what a benchmark found: PREFIX.json with all numbers, PREFIX.md with a table and where it was measured."""

import importlib.metadata
import json
import shlex
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

from core.run import environment, table, write_text

OTHERS = ("trl", "liger-kernel", "cut-cross-entropy")  # libraries that benchmarks compare with


def start(module: str, args: Any) -> dict:
    """A report without rows yet: the command, its flags, hardware, versions and commit."""
    head = {"command": f"python -m {module} {shlex.join(sys.argv[1:])}", **environment(args.threads)}
    found = {d.metadata["Name"]: d.version for name in OTHERS for d in importlib.metadata.distributions(name=name)}
    head["packages"] = {name: version for name, version in (head["packages"] | found).items() if version}
    return head | {"args": asdict(args), "rows": []}


def write(report: dict, columns: list[str], cells: list[list], notes: str) -> str:
    """Write both files and return the markdown. Called after every line, so that a stopped run keeps what it has."""
    packages = ", ".join(f"{name} {version}" for name, version in report["packages"].items())
    where = f"{report['cpu']}, {report['threads']} threads of {report['cores']} cores, GPU: {report['gpu'] or 'none'}"
    where += f"; {packages}; commit {report['commit']}"
    text = f"{table(columns, cells)}\n\n{where}.\n{notes}\n\n    {report['command']}\n"
    prefix = report["args"]["output"]
    Path(prefix).parent.mkdir(parents=True, exist_ok=True)
    write_text(Path(prefix + ".json"), json.dumps(report, indent=1) + "\n")
    write_text(Path(prefix + ".md"), text)
    return text
