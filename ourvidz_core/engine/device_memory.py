"""How much memory the device and the machine have for us, and the most that was in use at once.

torch is asked only where something else has imported it: an engine without a model needs none.
"""

from __future__ import annotations

import contextlib
import gc
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
from attrs import define

from ourvidz_core.errors import OutOfMemory

GIB = 2**30
#: Of what the device has for us: its allocator leaves gaps, and libraries take memory that it does not count.
USED_SHARE = 0.9
#: Of the machine's free memory, for weights that are off the device.
HOST_SHARE = 0.5
#: And for weights that have to leave whatever the budget is: with less left, the kernel ends processes.
HOST_MOST = 0.9
_CGROUP = Path("/sys/fs/cgroup")


@define(eq=False)
class Peak:
    """The most that was allocated at once while it was watched (bytes)."""

    bytes: int = 0


class _Peaks:
    """torch knows one peak per process; here several watch it, one inside the other."""

    def __init__(self) -> None:
        self.of_job = Peak()
        self._watched: list[Peak] = [self.of_job]

    def absorb(self) -> None:
        """Take over what torch has seen since, and let it begin anew."""
        if (cuda := _cuda()) is not None:
            seen = int(cuda.max_memory_allocated())
            for peak in self._watched:
                peak.bytes = max(peak.bytes, seen)
            cuda.reset_peak_memory_stats()

    @contextlib.contextmanager
    def watch(self) -> Iterator[Peak]:
        self.absorb()
        peak = Peak()
        self._watched.append(peak)
        try:
            yield peak
        finally:
            self.absorb()
            self._watched.remove(peak)


_peaks = _Peaks()


def forget_peak() -> None:
    """A job begins."""
    _peaks.absorb()
    _peaks.of_job.bytes = 0


def peak_bytes() -> int:
    """The most device memory that was allocated at once since :func:`forget_peak`."""
    _peaks.absorb()
    return _peaks.of_job.bytes


class DeviceMemory:
    """The memory of the current CUDA device; without one there is nothing to count."""

    def __init__(self, budget_gb: float | None = None) -> None:
        self._budget_gb = budget_gb

    @property
    def device(self) -> str:
        """What the device is called."""
        cuda = _cuda()
        return "cpu" if cuda is None else str(cuda.get_device_name())

    def budget_bytes(self) -> int | None:
        """What all models and their work may take; None where nothing limits them.

        Without a budget of the settings: nine tenths of what is free with what this process holds. What other
        processes hold is theirs.
        """
        asked = None if self._budget_gb is None else int(self._budget_gb * GIB)
        cuda = _cuda()
        if cuda is None:
            return asked
        free, total = cuda.mem_get_info()
        ours = min(free + cuda.memory_reserved(), total * cuda.get_per_process_memory_fraction())
        had = int(ours * USED_SHARE)
        return had if asked is None else min(asked, int(ours))

    def used_bytes(self) -> int:
        """What this process has allocated on the device."""
        cuda = _cuda()
        return 0 if cuda is None else int(cuda.memory_allocated())

    def release(self) -> None:
        """Find what nobody holds any longer, and give it back."""
        release_memory()

    def trim(self) -> None:
        """Give back what the allocator keeps for later."""
        if (cuda := _cuda()) is not None:
            cuda.empty_cache()

    def watch(self) -> contextlib.AbstractContextManager[Peak]:
        """The peak of what happens inside."""
        return _peaks.watch()


def host_bytes_free(cgroup: Path = _CGROUP) -> int:
    """The main memory that this process may still take: the machine's, or its container's."""
    free = int(psutil.virtual_memory().available)
    with contextlib.suppress(OSError, ValueError, KeyError):  # "max", or no container
        limit = int((cgroup / "memory.max").read_text("ascii"))
        figures = dict(line.split() for line in (cgroup / "memory.stat").read_text("ascii").splitlines())
        # Pages of files count as used, and leave when memory is wanted: after a load those of the model's own.
        cached = int(figures["active_file"]) + int(figures["inactive_file"])
        free = min(free, limit - int((cgroup / "memory.current").read_text("ascii")) + cached)
    return max(free, 0)


def release_memory() -> None:
    """Find what nobody holds any longer, and give back what the allocator keeps for later."""
    gc.collect()
    if (cuda := _cuda()) is not None:
        cuda.empty_cache()


def is_out_of_memory(error: BaseException) -> bool:
    """Whether this process's device had too little memory. Told by names, so that core needs no torch."""
    if isinstance(error, OutOfMemory):
        return error.is_here
    return type(error).__name__ == "OutOfMemoryError" or (
        isinstance(error, RuntimeError) and "out of memory" in str(error).lower()
    )


def _cuda() -> Any:
    torch = sys.modules.get("torch")
    return torch.cuda if torch is not None and torch.cuda.is_available() else None
