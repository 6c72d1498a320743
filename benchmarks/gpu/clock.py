"""Wall time and peak memory of work on a device."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Generic, TypeVar

import torch
from attrs import frozen

GIB = 2**30
Value = TypeVar("Value")


@frozen(kw_only=True)
class Timed(Generic[Value]):
    """The median of some runs of the same work."""

    seconds: float
    #: Most GiB that were allocated at once, without what others hold; None without a GPU.
    peak: float | None
    #: What the last run returned.
    value: Value


def timed(work: Callable[[], Value], device: str, *, repeats: int = 1, elsewhere: int = 0) -> Timed[Value]:
    """Run ``work`` some times. Of the memory, ``elsewhere`` bytes belong to somebody else."""
    is_cuda = device.startswith("cuda")
    wait_for(device)
    if is_cuda:
        torch.cuda.reset_peak_memory_stats()
    taken = []
    for _ in range(repeats):
        started = time.perf_counter()
        value = work()
        wait_for(device)
        taken.append(time.perf_counter() - started)
    peak = (torch.cuda.max_memory_allocated() - elsewhere) / GIB if is_cuda else None
    return Timed(seconds=statistics.median(taken), peak=peak, value=value)


def wait_for(device: str) -> None:
    """Until the device has done what it was given."""
    if device.startswith("cuda"):
        torch.cuda.synchronize()


def allocated(device: str) -> int:
    """Bytes on the GPU that are in use."""
    return torch.cuda.memory_allocated() if device.startswith("cuda") else 0


def relative_error(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    """The distance of two tensors as a share of the second's length."""
    ours, theirs = ours.detach().double().cpu(), theirs.detach().double().cpu()
    return float((ours - theirs).norm() / theirs.norm())
