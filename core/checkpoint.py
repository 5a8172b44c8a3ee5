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
    run_dir: Path, model: torch.nn.Module, optimizer: torch.optim.Optimizer, scheduler: Any
) -> tuple[int, dict]:
    """Load the run's newest checkpoint; (finished steps, the script's own state), or (0, {}) if there is none."""
    found = checkpoints(run_dir)
    if not found:
        return 0, {}
    path = found[-1]
    state = json.loads((path / "trainer_state.json").read_text())
    load_adapter(model, path)
    optimizer.load_state_dict(_load(path / "optimizer.pt"))
    scheduler.load_state_dict(_load(path / "scheduler.pt"))
    torch.set_rng_state(_load(path / "rng_state.pth")["cpu"])
    return state["global_step"], state


def _load(path: Path) -> dict:  # on the CPU: else every process would put its copy on the GPU that wrote it
    return torch.load(path, map_location="cpu", weights_only=True)


def rng_state() -> dict:
    """torch's CPU generator; nothing else draws from a global generator during training."""
    return {"cpu": torch.get_rng_state()}
