"""Checkpoints of a training run: written whole or not at all, and enough to go on bit by bit.

`checkpoint-N/` holds PEFT's adapter, the tokenizer, optimizer.pt, scheduler.pt, rng_state.pth and trainer_state.json
(N, and whatever the script counts). Data order and sampling seeds are functions of (seed, step), so they need no state.
"""

import json
import os
import shutil
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from core.model import load_adapter, save_adapter
from core.trajectory import DataError


def save_checkpoint(
    run_dir: Path,
    step: int,
    model: torch.nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    optimizer: torch.optim.Optimizer,
    scheduler: Any,
    state: dict,
    keep: int = 0,
) -> None:
    """Write checkpoint-`step` after `step` finished steps; keep only the newest `keep` of them (0 = all)."""
    final, temporary = run_dir / f"checkpoint-{step}", run_dir / f"checkpoint-{step}.tmp"
    shutil.rmtree(temporary, ignore_errors=True)
    save_adapter(model, tokenizer, temporary)
    torch.save(optimizer.state_dict(), temporary / "optimizer.pt")
    torch.save(scheduler.state_dict(), temporary / "scheduler.pt")
    torch.save(rng_state(), temporary / "rng_state.pth")
    (temporary / "trainer_state.json").write_text(json.dumps({"global_step": step, **state}, indent=1) + "\n")
    shutil.rmtree(final, ignore_errors=True)
    os.replace(temporary, final)
    for old in checkpoints(run_dir)[:-keep] if keep else []:
        shutil.rmtree(old)


def checkpoints(run_dir: Path) -> list[Path]:
    """Complete checkpoints of a run, oldest first."""
    found = [p for p in run_dir.glob("checkpoint-*") if p.name.removeprefix("checkpoint-").isdigit()]
    return sorted(found, key=lambda p: int(p.name.removeprefix("checkpoint-")))


def resume(
    run_dir: Path,
    asked_for: str,
    model: torch.nn.Module,
    optimizer: torch.optim.Optimizer,
    scheduler: Any,
    steps: int,
    own: str,
) -> tuple[int, dict]:
    """Load the run's newest checkpoint, else the one named by --resume_from_checkpoint; (finished steps, state).

    (0, {}) if there is neither. steps: of the run in all; own: what only this script's state has. DataError if the
    named folder is no checkpoint of this script, has no step left or was trained at another learning rate.
    """
    found = checkpoints(run_dir)
    path = found[-1] if found else Path(asked_for) if asked_for else None
    if path is None:
        return 0, {}
    if not (path / "trainer_state.json").is_file():
        raise DataError(f"--resume_from_checkpoint {path}: no trainer_state.json there")
    state, rates = json.loads((path / "trainer_state.json").read_text()), scheduler.base_lrs
    if own not in state:
        raise DataError(f"--resume_from_checkpoint {path}: a checkpoint of another script, without {own!r}")
    if not found and state["global_step"] >= steps:
        raise DataError(
            f"--resume_from_checkpoint {path} has done {state['global_step']} steps of {steps}: nothing is left; to "
            "start anew from its weights, give it as --model_name_or_path"
        )
    load_adapter(model, path)
    optimizer.load_state_dict(_load(path / "optimizer.pt"))
    scheduler.load_state_dict(_load(path / "scheduler.pt"))
    torch.set_rng_state(_load(path / "rng_state.pth")["cpu"])
    if scheduler.base_lrs != rates:
        raise DataError(
            f"--resume_from_checkpoint {path} goes on with its own --learning_rate {scheduler.base_lrs[0]}, not {rates[0]}"
        )
    return state["global_step"], state


def _load(path: Path) -> dict:  # on the CPU: else every process would put its copy on the GPU that wrote it
    return torch.load(path, map_location="cpu", weights_only=True)


def rng_state() -> dict:
    """torch's CPU generator; nothing else draws from a global generator during training."""
    return {"cpu": torch.get_rng_state()}
