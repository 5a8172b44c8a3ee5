"""recipes/*.sh: every command's flags are read by the script they are for, and every plan fits the smallest card.

python -m pytest tests/test_recipes.py            (-m slow: the scripts as a user starts them)
"""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from bench import memory, plan

ROOT = Path(__file__).parent.parent
RECIPES = sorted(path.name for path in (ROOT / "recipes").glob("*_7b.sh"))


def commands_of(recipe, tmp_path, *flags, **environment):
    """Words of every command that the recipe starts, recorded by a stand-in for Python; and the finished process."""
    record, stand_in = tmp_path / "commands", tmp_path / "python"
    stand_in.write_text(f'#!/bin/bash\nprintf "%s\\x1f" "$@" >> {record}\nprintf "\\n" >> {record}\n')
    stand_in.chmod(0o755)
    environment = {
        k: v for k, v in os.environ.items() if k not in ("MODEL", "DATA", "INDEX", "TEST", "OUT", "CARD")
    } | environment
    done = subprocess.run(
        [ROOT / "recipes" / recipe, *flags], env=environment | {"PYTHON": str(stand_in)}, capture_output=True, text=True
    )
    lines = record.read_text().splitlines() if record.exists() else []
    return [line.split("\x1f")[:-1] for line in lines], done


@pytest.mark.parametrize("recipe", RECIPES)
def test_dry_run_reads_every_flag_and_fits_24_gb(recipe, tmp_path, monkeypatch, capsys):
    commands, done = commands_of(recipe, tmp_path, "--dry_run")
    assert done.returncode == 0 and len(commands) >= 2, done.stderr
    decoder = memory.decoder_of(memory.read_config("Qwen/Qwen2.5-7B-Instruct"))
    monkeypatch.setattr(plan, "decoder_of", lambda config: decoder)  # counted once
    monkeypatch.chdir(ROOT)
    for command in commands:
        assert command[-2:] == ["--dry_run", "24"], command
        words = [command[1].replace(".", "/") + ".py", *command[2:]] if command[0] == "-m" else command
        monkeypatch.setattr(sys, "argv", words)
        plan.main(words)
    out = capsys.readouterr().out
    assert len(re.findall("24 GB [|] (fits|tight)", out)) == len(commands) - ("methods.refine" in str(commands))
    assert "Qwen/Qwen2.5-7B-Instruct, bfloat16, Linears in 4-bit NF4" in out and "not checked" in out


@pytest.mark.parametrize("recipe", RECIPES)
def test_the_run_hands_each_stage_to_the_next(recipe, tmp_path):
    dry, _ = commands_of(recipe, tmp_path, "--dry_run", OUT="o")
    (tmp_path / "commands").unlink()
    real, done = commands_of(recipe, tmp_path, OUT="o", MODEL="some/model", DATA="d.jsonl")
    assert done.returncode == 0 and [c[:2] for c in real if c[0] == "-m"] == [c[:2] for c in dry if c[0] == "-m"]
    assert len(real) == len(dry) and not any("--dry_run" in c for c in real)
    written = {"some/model", "d.jsonl"}
    for command in real:  # a model or data file that a stage reads is given, or lies where an earlier stage wrote
        for flag in ("--model_name_or_path", "--data", "--trajectories"):
            if flag in command and (flag == "--model_name_or_path" or "--evaluate" not in command):
                source = command[command.index(flag) + 1]
                assert source in written or any(source.startswith(folder + "/") for folder in written), (flag, source)
        written.add(command[command.index("--output" if "--output" in command else "--output_dir") + 1])


def test_a_wrong_word_ends_with_exit_code_2(tmp_path):
    commands, done = commands_of(RECIPES[0], tmp_path, "--dryrun")
    assert done.returncode == 2 and not commands and "usage" in done.stderr


@pytest.mark.slow
@pytest.mark.parametrize("recipe", RECIPES)
def test_recipes_as_a_user_starts_them(recipe):
    done = subprocess.run(
        [ROOT / "recipes" / recipe, "--dry_run"],
        env=os.environ | {"PYTHON": sys.executable},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
