"""A 60-step RL run of the shipped base, killed ten times at random moments, ends as if nothing had happened.

python -m pytest -m slow tests/test_kills.py             (about five minutes on two cores)
"""

import json
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from core.model import load_file
from data.world import __main__ as world

ROOT = Path(__file__).parent.parent
STEPS, KILLS = 60, 10


def command(folder, output):
    """Every kind of state takes part: optimizer, schedule, KL reference, several updates per step, tools."""
    return [
        *(sys.executable, "train_rl.py", "--model_name_or_path", "data/tiny", "--data", str(folder / "q.jsonl")),
        *("--index", str(folder / "index"), "--output_dir", str(output), "--max_steps", str(STEPS)),
        *("--reward", "et_agent", "--questions_per_step", "4", "--num_generations", "4", "--updates_per_batch", "2"),
        *("--beta", "0.01", "--save_steps", "4"),
        *("--search_top_k", "1", "--max_completion_length", "256", "--engine", "fast", "--python_timeout", "60"),
        *("--max_tool_seconds", "600"),
    ]


def metrics(run):
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{name: value for name, value in row.items() if not name.startswith("time/")} for row in rows]


@pytest.mark.slow
def test_ten_kills_of_a_sixty_step_run(tmp_path):
    world.main(["--questions", "200", "--seed", "3", "--output", str(tmp_path / "q.jsonl")])
    world.main(["--index", str(tmp_path / "index")])
    started = time.monotonic()
    subprocess.run(command(tmp_path, tmp_path / "whole"), cwd=ROOT, check=True)
    whole_seconds = time.monotonic() - started
    rng, kills, cut = random.Random(0), 0, tmp_path / "cut"
    while kills < KILLS:
        process = subprocess.Popen(command(tmp_path, cut), cwd=ROOT)
        try:  # anywhere: while it starts, samples, trains or writes; on average a little less than a tenth of the run
            process.wait(timeout=rng.uniform(0.3, 0.2 * whole_seconds))
            break
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGKILL)
            process.wait()
            kills += 1
    while not (cut / "result.json").exists():
        subprocess.run(command(tmp_path, cut), cwd=ROOT, check=True)
    print(f"{kills} kills of a run of {whole_seconds:.0f} s")
    assert kills == KILLS
    assert metrics(cut) == metrics(tmp_path / "whole") and len(metrics(cut)) == STEPS
    a, b = (load_file(run / "adapter_model.safetensors") for run in (cut, tmp_path / "whole"))
    assert a.keys() == b.keys() and all(a[name].equal(b[name]) for name in a)
    assert (cut / "result.json").read_text() == (tmp_path / "whole" / "result.json").read_text()
