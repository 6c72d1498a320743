"""Whether a worker lives, and whether it can do jobs: what ``/healthz`` and ``/readyz`` answer."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

from attrs import frozen

from ourvidz_core.errors import AssetRejected, DiskFull, StorageError, StorageUnavailable
from ourvidz_core.wire import events
from ourvidz_core.wire.states import EngineState, WorkerState

#: A loop that has not turned for this long hangs; the longest honest turn is a request to Redis that times out.
HUNG_SECONDS = 120.0
#: Redis is asked every few seconds, by an idle worker too.
SILENT_SECONDS = 60.0
#: After this long without another try, a refusal says nothing about storage any more.
FORGOTTEN_SECONDS = 600.0

_STORAGE_ERRORS = {
    cls.__name__ for cls in (StorageError, StorageUnavailable, DiskFull) if not issubclass(cls, AssetRejected)
}


@frozen(kw_only=True)
class Verdict:
    """The answer to one question, and what it rests on."""

    is_good: bool
    #: By what was looked at: ``ok``, or what is wrong.
    checks: dict[str, str]


class Vitals:
    """When the parts of a worker last did what they are for. Thread-safe."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._lock = threading.Lock()
        self._turns: dict[str, float] = {}
        self._answered_at: float | None = None
        self._storage_trouble: tuple[float, str] | None = None

    def turn(self, loop: str) -> None:
        """A loop of the worker begins another turn."""
        with self._lock:
            self._turns[loop] = self._clock()

    def end(self, loop: str) -> None:
        """A loop ended as it should."""
        with self._lock:
            self._turns.pop(loop, None)

    def queue_answered(self) -> None:
        """Redis answered just now."""
        with self._lock:
            self._answered_at = self._clock()

    def __call__(self, *, event: events.Event) -> None:
        """Hear of one event: what stores, and what fails to."""
        match event:
            case events.AssetStored():
                self._storage_trouble = None
            case events.JobRetried() | events.JobFailed() if event.error_type in _STORAGE_ERRORS:
                self._storage_trouble = (self._clock(), event.error_type)

    def health(self) -> Verdict:
        """Whether the process is worth keeping. An outage elsewhere is no reason to end it."""
        now = self._clock()
        with self._lock:
            checks = {
                loop: "ok" if now - at < HUNG_SECONDS else f"hangs for {now - at:.0f} s"
                for loop, at in self._turns.items()
            }
        return Verdict(is_good=all(check == "ok" for check in checks.values()), checks=checks)

    def readiness(self, state: WorkerState, engine: EngineState) -> Verdict:
        """Whether it can take a job now and do it."""
        now = self._clock()
        with self._lock:
            answered_at, trouble = self._answered_at, self._storage_trouble
        silent = None if answered_at is None else now - answered_at
        checks = {
            "worker": "ok" if state in (WorkerState.IDLE, WorkerState.WORKING) else state.value,
            "redis": (
                "ok"
                if silent is not None and silent < SILENT_SECONDS
                else ("has not answered yet" if silent is None else f"has not answered for {silent:.0f} s")
            ),
            "engine": "does not start" if engine is EngineState.FAILED else "ok",
            "storage": f"refused the last asset: {trouble[1]}"
            if trouble is not None and now - trouble[0] < FORGOTTEN_SECONDS
            else "ok",
        }
        return Verdict(is_good=all(check == "ok" for check in checks.values()), checks=checks)
