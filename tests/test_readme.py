"""The world's commands by hand (data/world/__init__.py), as they stand, at small sizes.

    python -m pytest -m slow tests/test_readme.py
"""

import os
import re
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

import data.world

ROOT = Path(__file__).parents[1]
SMALL = {  # script -> flags behind those of the README; the last one given counts
    "data.world": "",
    "flywheel.py": "--limit 8",
    "train_sft.py": "--max_steps 2",
    "methods.curriculum": "--limit 24 --num_questions 8 --questions_per_step 4 --max_steps 1 --rounds 1",
    "methods.warmup": "--limit 24",
    "train_rl.py": "--max_steps 1 --questions_per_step 4",
    "rollout.py": "--limit 24",
    "experiments.entropy_pilot": "",
}


def small_commands():
    block = textwrap.dedent(data.world.__doc__.split("on a CPU:")[1])
    lines = block.replace("\\\n", " ").strip().splitlines()
    for line in lines:
        if script := re.match(r"python (?:-m )?(\S+)", line):
            sizes = "--questions 24" if "--questions" in line else ""
            line = f"{line} {SMALL[script[1]]} {sizes}"
        yield line


def test_every_script_of_the_world_is_there():
    scripts = re.findall(r"^python (?:-m )?(\S+)", "\n".join(small_commands()), re.MULTILINE)
    assert set(scripts) == set(SMALL) and len(scripts) > 12


@pytest.mark.slow
def test_the_world_commands_run(tmp_path):
    for entry in ROOT.iterdir():
        if entry.name not in ("out", ".git"):
            (tmp_path / entry.name).symlink_to(entry)
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    script = "set -ex\n" + "\n".join(small_commands())
    done = subprocess.run(
        ["bash", "-c", script], cwd=tmp_path, env=os.environ | {"PATH": path}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert (tmp_path / "out/sparse/result.json").is_file() and (tmp_path / "out/test.jsonl.metrics.json").is_file()
