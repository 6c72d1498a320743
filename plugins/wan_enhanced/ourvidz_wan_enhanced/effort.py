"""One piece of slow work with a deadline that holds, whatever the work does.

The work looks at its deadline itself, at every token; that ends it in good order. Work
that is stuck inside one token or one request cannot look, so it runs in a thread that
nobody waits for longer than the deadline. What is left of it ends at its next look.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import Generic, TypeVar

Result = TypeVar("Result")

_POLL_SECONDS = 0.05


class DeadlinePassed(Exception):
    """The work was not done in time."""


class WorkFailed(Exception):
    """The work raised; its own exception is the cause."""


class Effort:
    """What the work and the one who waits for it know of each other."""

    def __init__(self, seconds: float) -> None:
        self._deadline = time.monotonic() + seconds
        self._stopped = threading.Event()
        #: How far the work has come.
        self.tokens = 0

    @property
    def seconds_left(self) -> float:
        """Seconds until the deadline; never below 0."""
        return max(self._deadline - time.monotonic(), 0.0)

    @property
    def is_over(self) -> bool:
        """Whether the work shall stop: its time has passed, or nobody waits for it any longer."""
        return self._stopped.is_set() or self.seconds_left == 0.0

    def stop(self) -> None:
        """Nobody waits any longer."""
        self._stopped.set()

    def again(self) -> Effort:
        """A new piece of work with the same deadline."""
        return Effort(self.seconds_left)


class _Work(threading.Thread, Generic[Result]):
    def __init__(self, work: Callable[[], Result]) -> None:
        # A daemon, so that a process can end while the work hangs.
        super().__init__(name="enhancer", daemon=True)
        self._work = work
        self.is_done = threading.Event()
        self.results: list[Result] = []
        self.error: BaseException | None = None

    def run(self) -> None:
        try:
            self.results.append(self._work())
        except BaseException as error:  # also SystemExit: this thread's end is told to the other
            self.error = error
        finally:
            self.is_done.set()


def finish_in_time(effort: Effort, work: Callable[[], Result], on_wait: Callable[[], None] = lambda: None) -> Result:
    """The result of ``work``, or an error no later than the deadline of ``effort``.

    ``on_wait`` is called all the time; what it raises ends the waiting and stops the work.

    :raises DeadlinePassed: the work was not done in time.
    :raises WorkFailed: it raised.
    """
    thread = _Work(work)
    thread.start()
    try:
        while not thread.is_done.wait(min(_POLL_SECONDS, effort.seconds_left)):
            if effort.is_over:
                raise DeadlinePassed
            on_wait()
    finally:
        effort.stop()
    if isinstance(thread.error, DeadlinePassed):
        raise thread.error
    if thread.error is not None:
        raise WorkFailed(f"{type(thread.error).__name__}: {thread.error}") from thread.error
    return thread.results[0]


def is_work_left() -> bool:
    """Whether work that nobody waits for is still going on."""
    return any(isinstance(thread, _Work) for thread in threading.enumerate())
