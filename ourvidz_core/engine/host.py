"""The worker's side of the engine: start it, give it jobs, watch them, end it, start another."""

from __future__ import annotations

import contextlib
import logging
import math
import queue
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Protocol

from attrs import define, field

from ourvidz_core.engine.child import EngineChild, Request
from ourvidz_core.engine.protocol import (
    FINISH_SECONDS,
    Doing,
    JobBroken,
    JobFinished,
    Progress,
    Reached,
    RunJob,
    Stage,
    WarmedUp,
    WarmUp,
)
from ourvidz_core.errors import EngineCrashed, EngineLost, EngineStalled, JobCancelled, JobTimeout
from ourvidz_core.plugins.registry import Registry
from ourvidz_core.wire.artifacts import FinishedGeneration
from ourvidz_core.wire.jobs import Job
from ourvidz_core.wire.states import EngineState

logger = logging.getLogger(__name__)

#: A plugin that watches its deadline ends by itself; after this much longer it is made to.
GRACE_SECONDS = 3.0
#: A cancelled job that did not stop at its next step by then is stopped with its engine.
CANCEL_SECONDS = 1.0
_POLL_SECONDS = 0.1
#: Engines that may end because of other jobs before a job that waited in each of them is given up.
_MOST_ENGINES = 3

OnProgress = Callable[[str, int, int], None]
OnMoment = Callable[[], None]
OnText = Callable[[str], None]


def ignore_progress(stage: str, step: int, total: int) -> None:
    """For callers that do not watch."""


def ignore_moment() -> None:
    """For callers that do not watch."""


def ignore_text(text: str) -> None:
    """For callers that do not watch."""


class Engine(Protocol):
    """What generates a job beside the device."""

    @property
    def state(self) -> EngineState:
        """What it is doing; may be asked from any thread."""
        ...

    def run(
        self,
        job: Job,
        *,
        work_dir: Path,
        timeout_seconds: float,
        on_progress: OnProgress = ignore_progress,
        on_begun: OnMoment = ignore_moment,
        on_generated: OnMoment = ignore_moment,
        cancelled: threading.Event | None = None,
    ) -> FinishedGeneration:
        """Generate ``job``; its artifacts lie in ``work_dir``.

        ``on_begun`` is called when the job gets the device, ``on_generated`` where the device is free of it before
        its files are written: another job may have it from then on.

        :raises JobError: it failed; ``EngineCrashed`` and ``JobTimeout`` among them.
        """
        ...

    def warm_up(
        self,
        distribution: str,
        job_types: Sequence[str],
        *,
        timeout_seconds: float,
        on_doing: OnText = ignore_text,
        cancelled: threading.Event | None = None,
    ) -> None:
        """Have the plugin of ``distribution`` make ready what ``job_types`` need.

        ``on_doing`` is told what it is about, in words.

        :raises JobError: it could not; ``EngineCrashed``, ``JobTimeout`` and ``JobCancelled`` among them.
        """
        ...

    def close(self) -> None:
        """End it with everything it started."""
        ...


class EngineProcess:
    """An engine in a child process, which is replaced whatever happens to it. Thread-safe.

    Given several jobs at once, it generates one after the other, in the order in which they came, and writes the
    files of one while it generates the next.
    """

    def __init__(
        self,
        registry: Registry,
        environ: Mapping[str, str],
        *,
        start_seconds: float = 300.0,
        stall_seconds: float = math.inf,
    ) -> None:
        self._registry = registry
        self._environ = dict(environ)
        self._start_seconds = start_seconds
        self._stall_seconds = stall_seconds
        self._child: EngineChild | None = None
        self._starting = threading.Lock()
        self._is_starting = False
        self._is_warming = False
        self._has_failed = False

    @property
    def state(self) -> EngineState:
        """See :attr:`Engine.state`."""
        if self._is_starting:
            return EngineState.STARTING
        if self.pid is not None:
            return EngineState.WARMING if self._is_warming else EngineState.READY
        return EngineState.FAILED if self._has_failed else EngineState.STOPPED

    @property
    def pid(self) -> int | None:
        """The engine's process id while it runs."""
        child = self._child  # another thread may end it meanwhile
        return child.pid if child is not None else None

    def start(self, cancelled: threading.Event | None = None) -> None:
        """Start the engine and wait until its plugins are loaded. Does nothing while it runs.

        :raises EngineCrashed: it ended, or did not get ready in time; says how its log ends.
        :raises JobCancelled: ``cancelled`` was set meanwhile.
        """
        self._running(cancelled or threading.Event())

    def run(
        self,
        job: Job,
        *,
        work_dir: Path,
        timeout_seconds: float,
        on_progress: OnProgress = ignore_progress,
        on_begun: OnMoment = ignore_moment,
        on_generated: OnMoment = ignore_moment,
        cancelled: threading.Event | None = None,
    ) -> FinishedGeneration:
        """Generate ``job``; see :meth:`Engine.run`. Starts the engine where none runs."""
        watch = _Watch(
            timeout_seconds=timeout_seconds,
            stall_seconds=self._stall_seconds,
            on_progress=on_progress,
            on_begun=on_begun,
            on_generated=on_generated,
            cancelled=cancelled or threading.Event(),
        )
        answer = self._ask(
            lambda number: RunJob(request=number, job=job, work_dir=work_dir, timeout_seconds=timeout_seconds),
            watch,
            subject=f"it worked on {job.job_type}",
            job=job,
        )
        assert isinstance(answer, JobFinished)
        return answer.finished

    def warm_up(
        self,
        distribution: str,
        job_types: Sequence[str],
        *,
        timeout_seconds: float,
        on_doing: OnText = ignore_text,
        cancelled: threading.Event | None = None,
    ) -> None:
        """See :meth:`Engine.warm_up`. Starts the engine where none runs."""
        self.start(cancelled)
        self._is_warming = True
        try:
            self._ask(
                lambda number: WarmUp(
                    request=number,
                    distribution=distribution,
                    job_types=tuple(job_types),
                    timeout_seconds=timeout_seconds,
                ),
                _Watch(
                    timeout_seconds=timeout_seconds,
                    stall_seconds=self._stall_seconds,
                    on_doing=on_doing,
                    cancelled=cancelled or threading.Event(),
                ),
                subject=f"{distribution} warmed up",
            )
        finally:
            self._is_warming = False

    def close(self) -> None:
        """Kill the engine with everything it started, if it is there."""
        child = self._child
        if child is not None:
            child.kill()

    def _ask(
        self, make: Callable[[int], RunJob | WarmUp], watch: _Watch, *, subject: str, job: Job | None = None
    ) -> JobFinished | WarmedUp:
        for _ in range(_MOST_ENGINES):
            child = self._running(watch.cancelled)
            request = child.ask(make, subject=subject, job=job)
            try:
                answer = watch.follow(child, request)
            finally:
                child.leave(request)
            if answer is not None:
                return answer
            child.cancel(request)  # where it still ends other jobs, it must not begin with this one
        raise EngineLost(f"{_MOST_ENGINES} engines ended before this job had its turn; it is tried again")

    def _running(self, cancelled: threading.Event) -> EngineChild:
        with self._alone(cancelled):
            child = self._child
            if child is not None:
                if child.is_open:
                    return child
                child.end()
            self._is_starting, self._has_failed = True, True
            try:
                self._child = child = EngineChild(self._registry, self._environ)
                logger.info("engine %s starts", child.pid)
                self._wait_until_ready(child, cancelled)
                self._has_failed = False
            except JobCancelled:
                self._has_failed = False
                raise
            finally:
                self._is_starting = False
            return child

    @contextlib.contextmanager
    def _alone(self, cancelled: threading.Event) -> Iterator[None]:
        """One job starts the engine; others wait for it, but not when they are cancelled."""
        while not self._starting.acquire(timeout=_POLL_SECONDS):
            if cancelled.is_set():
                raise JobCancelled("the job was cancelled while its engine started")
        try:
            yield
        finally:
            self._starting.release()

    def _wait_until_ready(self, child: EngineChild, cancelled: threading.Event) -> None:
        deadline = time.monotonic() + self._start_seconds
        while (ready := child.take_ready(_POLL_SECONDS)) is None:
            if cancelled.is_set():
                child.kill()
                raise JobCancelled("the job was cancelled while its engine started")
            if time.monotonic() >= deadline:
                child.kill()
                raise EngineCrashed(f"the engine was not ready after {self._start_seconds:g} s: {child.log_end()}")
        loaded = {record.distribution for record in self._registry.records if record.status == "loaded"}
        if missing := loaded - set(ready.plugins):
            child.kill()
            raise EngineCrashed(f"the engine could not load {', '.join(sorted(missing))}: {child.log_end()}")
        logger.info("engine %s is ready", child.pid)


@define(kw_only=True)
class _Watch:
    """What a caller waits for, and until when."""

    timeout_seconds: float
    stall_seconds: float
    on_progress: OnProgress = ignore_progress
    on_begun: OnMoment = ignore_moment
    on_generated: OnMoment = ignore_moment
    on_doing: OnText = ignore_text
    cancelled: threading.Event
    #: Nobody knows how long the jobs before it take.
    _deadline: float = field(default=math.inf, init=False)
    #: Loading a model takes its time in silence, which only the deadline limits; whoever counts steps goes on.
    _stall_deadline: float = field(default=math.inf, init=False)
    _cancel_deadline: float = field(default=math.inf, init=False)

    def follow(self, child: EngineChild, request: Request) -> JobFinished | WarmedUp | None:
        """The answer to ``request``, or None where ``child`` ended before it had begun with it.

        :raises JobError: it failed, or took longer than it may.
        """
        while True:
            with contextlib.suppress(queue.Empty):
                match request.inbox.get(timeout=_POLL_SECONDS):
                    case None:
                        return None
                    case JobFinished() | WarmedUp() as answer:
                        return answer
                    case JobBroken(error=error):
                        raise error
                    case Progress(stage=stage, step=step, total=total):
                        self.on_progress(stage, step, total)
                        self._stall_deadline = time.monotonic() + self.stall_seconds
                    case Doing(text=text):
                        self.on_doing(text)
                    case Reached(stage=stage):
                        self._note(stage)
            if self.cancelled.is_set() and self._cancel_deadline == math.inf:
                self._cancel_deadline = time.monotonic() + CANCEL_SECONDS
                child.cancel(request)
            self._stop_if_late(child, request)

    def _note(self, stage: Stage) -> None:
        now = time.monotonic()
        self._stall_deadline = math.inf
        if self.cancelled.is_set() and self._cancel_deadline < math.inf:
            self._cancel_deadline = now + CANCEL_SECONDS
        match stage:
            case Stage.GENERATING:
                self._deadline = now + self.timeout_seconds + GRACE_SECONDS
                self.on_begun()
            case Stage.FINISHING:
                self._deadline = max(self._deadline, now + FINISH_SECONDS)
                self.on_generated()
            case Stage.UNREVIEWED:
                self._deadline = math.inf
            case Stage.REVIEWING:
                self._deadline = now + self.timeout_seconds + GRACE_SECONDS

    def _stop_if_late(self, child: EngineChild, request: Request) -> None:
        now = time.monotonic()
        # Where it waits, it leaves the line at once.
        if now >= self._cancel_deadline and request.stage is not Stage.WAITING:
            raise JobCancelled("the job was cancelled while it was running, and was stopped")
        if now >= self._stall_deadline and request.stage is Stage.GENERATING:
            raise EngineStalled(
                f"the job reported no step for {self.stall_seconds:g} s after it had begun; its engine was killed"
            )
        if now >= self._deadline:
            if not request.stage.has_device:
                child.retire()  # a thread that hangs ends with its engine only
            raise JobTimeout(
                f"the job was still running after {self.timeout_seconds:g} s and did not stop; its engine was killed"
            )
