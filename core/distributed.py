"""Several processes as one run: `torchrun --nproc_per_node N train_rl.py …`, gloo on CPUs, NCCL on GPUs.

Every process rolls out and trains on its share of a step's questions; gradients of the adapter are summed once per
optimizer step, and process 0 alone writes. Without torchrun each function here does nothing.
"""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from functools import cache
from typing import Any, TypeVar

import torch
import torch.distributed as dist

T = TypeVar("T")
PATIENCE = timedelta(minutes=30)  # longest wait for the slowest process


class ProcessLost(RuntimeError):
    """Another process of the run is gone."""


@contextmanager
def processes() -> Iterator[None]:
    """Inside: one process group, if torchrun started this process."""
    if "LOCAL_RANK" not in os.environ:
        yield
        return
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group("nccl" if torch.cuda.is_available() else "gloo", timeout=PATIENCE)
    try:
        yield
    finally:
        dist.destroy_process_group()


def rank() -> int:
    """This process's number; 0 writes."""
    return int(os.environ["RANK"]) if "LOCAL_RANK" in os.environ else 0


def count() -> int:
    """Number of processes that torchrun started."""
    return int(os.environ["WORLD_SIZE"]) if "LOCAL_RANK" in os.environ else 1


@cache
def say_once(text: str) -> None:
    """Print a text the first time that it is given; process 0 of several does."""
    if rank() == 0:
        print(text)


def share(items: list[T]) -> list[T]:
    """This process's consecutive slice of items; the slices differ in length by at most one."""
    return items[len(items) * rank() // count() : len(items) * (rank() + 1) // count()]


def gather(items: list[T]) -> list[T]:
    """The items of all processes, in order of their ranks, on every process."""
    if not dist.is_initialized():
        return items
    parts: list[Any] = [None] * count()
    _together(lambda: dist.all_gather_object(parts, items))
    return [item for part in parts for item in part]


def sum_gradients(parameters: list[torch.nn.Parameter]) -> None:
    """Replace every gradient by its sum over the processes, in one flat message; a missing one counts as 0.

    Where no process has any, none has one afterwards, as in a single process: AdamW then leaves the weights alone.
    """
    if not dist.is_initialized():
        return
    present = torch.tensor([float(any(p.grad is not None for p in parameters))], device=parameters[0].device)
    gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters]
    flat = torch.cat([present, *(g.flatten().float() for g in gradients)])
    _together(lambda: dist.all_reduce(flat))
    if not flat[0]:
        return
    for p, part in zip(parameters, flat[1:].split([p.numel() for p in parameters])):
        p.grad = part.view_as(p).to(p.dtype, copy=True)


def sum_values(values: dict[str, float]) -> dict[str, float]:
    """Sums over the processes, name by name."""
    if not dist.is_initialized():
        return values
    parts = gather([values])
    return {name: sum(part[name] for part in parts) for name in values}


def wait() -> None:
    """Go on when every process has come here."""
    if dist.is_initialized():
        _together(dist.barrier)


def _together(collective: Callable[[], Any]) -> None:
    try:
        collective()
    except RuntimeError as e:
        reason = str(e).strip().splitlines()[0]
        raise ProcessLost(f"process {rank()} lost another process of this run ({reason})") from None
