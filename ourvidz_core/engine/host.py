"""The worker's side of the engine: start it, give it jobs, watch it, end it, start another."""

from __future__ import annotations

import logging
import math
import re
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from multiprocessing.connection import Pipe
from pathlib import Path
from typing import IO, Protocol

from ourvidz_core.engine.processes import ENGINE_MARK, ending_of, kill_marked, kill_session, last_exception, new_mark
from ourvidz_core.engine.protocol import (
    JOB_MARK,
    CancelJob,
    Channel,
    EngineMessage,
    EngineReady,
    JobBroken,
    JobFinished,
    Progress,
    RunJob,
    WarmedUp,
    WarmUp,
)
from ourvidz_core.errors import (
    EngineCrashed,
    EngineStalled,
    EngineUnusable,
    JobCancelled,
    JobError,
    JobTimeout,
    OutOfMemory,
)
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
_TAIL_LINES = 200
#: faulthandler's first line; a stack of many lines follows it.
_FATAL_LINE = re.compile(r"Fatal Python error: ")

OnProgress = Callable[[str, int, int], None]


def ignore_progress(stage: str, step: int, total: int) -> None:
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
        cancelled: threading.Event | None = None,
    ) -> FinishedGeneration:
        """Generate ``job``; its artifacts lie in ``work_dir``.

        :raises JobError: it failed; ``EngineCrashed`` and ``JobTimeout`` among them.
        """
        ...

    def warm_up(
        self,
        distribution: str,
        job_types: Sequence[str],
        *,
        timeout_seconds: float,
        cancelled: threading.Event | None = None,
    ) -> None:
        """Have the plugin of ``distribution`` make ready what ``job_types`` need.

        :raises JobError: it could not; ``EngineCrashed``, ``JobTimeout`` and ``JobCancelled`` among them.
        """
        ...

    def close(self) -> None:
        """End it with everything it started."""
        ...


class EngineProcess:
    """An engine in a child process of its own session. One job at a time; not thread-safe."""

    def __init__(
        self,
        registry: Registry,
        environ: Mapping[str, str],
        *,
        start_seconds: float = 300.0,
        stall_seconds: float = math.inf,
    ) -> None:
        self._registry = registry
        self._mark = new_mark()
        self._environ = {**environ, ENGINE_MARK: self._mark}
        self._start_seconds = start_seconds
        self._stall_seconds = stall_seconds
        self._process: subprocess.Popen[bytes] | None = None
        self._channel: Channel | None = None
        self._log: _EngineLog | None = None
        self._is_starting = False
        self._is_warming = False
        self._has_failed = False

    @property
    def state(self) -> EngineState:
        """See :attr:`Engine.state`."""
        process = self._process  # another thread may end it meanwhile
        if self._is_starting:
            return EngineState.STARTING
        if process is not None and process.poll() is None:
            return EngineState.WARMING if self._is_warming else EngineState.READY
        return EngineState.FAILED if self._has_failed else EngineState.STOPPED

    @property
    def pid(self) -> int | None:
        """The engine's process id while it runs."""
        return self._process.pid if self._process and self._process.poll() is None else None

    def start(self, cancelled: threading.Event | None = None) -> None:
        """Start the engine and wait until its plugins are loaded. Does nothing while it runs.

        :raises EngineCrashed: it ended, or did not get ready in time; says how its log ends.
        :raises JobCancelled: ``cancelled`` was set meanwhile.
        """
        if self.pid is not None and self._is_listening():
            return
        self.close()
        self._is_starting, self._has_failed = True, True
        try:
            self._launch(cancelled)
            self._has_failed = False
        except JobCancelled:
            self._has_failed = False
            raise
        finally:
            self._is_starting = False

    def _launch(self, cancelled: threading.Event | None) -> None:
        ours, theirs = Pipe()
        try:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "ourvidz_core.engine.server", str(theirs.fileno())],
                env=self._environ,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.PIPE,
                pass_fds=[theirs.fileno()],
                start_new_session=True,
            )
        finally:
            theirs.close()
        assert self._process.stderr is not None
        self._log = _EngineLog(self._process.stderr)
        self._channel = Channel(ours, self._registry)
        deadline = time.monotonic() + self._start_seconds
        try:
            while (ready := self._receive()) is None:
                if cancelled is not None and cancelled.is_set():
                    self.close()
                    raise JobCancelled("the job was cancelled while its engine started")
                if time.monotonic() >= deadline:
                    self.close()
                    raise EngineCrashed(f"the engine was not ready after {self._start_seconds:g} s: {self._log.end()}")
        except _EngineGone:
            raise self._crashed("while it started") from None
        assert isinstance(ready, EngineReady)
        loaded = {record.distribution for record in self._registry.records if record.status == "loaded"}
        if missing := loaded - set(ready.plugins):
            self.close()
            raise EngineCrashed(f"the engine could not load {', '.join(sorted(missing))}: {self._log.end()}")
        logger.info("engine %s is ready", self._process.pid)

    def run(
        self,
        job: Job,
        *,
        work_dir: Path,
        timeout_seconds: float,
        on_progress: OnProgress = ignore_progress,
        cancelled: threading.Event | None = None,
    ) -> FinishedGeneration:
        """Generate ``job``; see :meth:`Engine.run`. Starts the engine where none runs."""
        self.start(cancelled)
        assert self._log is not None
        self._log.expect(job)
        request = RunJob(job=job, work_dir=work_dir, timeout_seconds=timeout_seconds)
        answer = self._ask(request, on_progress, cancelled, f"while it worked on {job.job_type}")
        assert isinstance(answer, JobFinished)
        return answer.finished

    def warm_up(
        self,
        distribution: str,
        job_types: Sequence[str],
        *,
        timeout_seconds: float,
        cancelled: threading.Event | None = None,
    ) -> None:
        """See :meth:`Engine.warm_up`. Starts the engine where none runs."""
        self.start(cancelled)
        self._is_warming = True
        try:
            request = WarmUp(distribution=distribution, job_types=tuple(job_types), timeout_seconds=timeout_seconds)
            self._ask(request, ignore_progress, cancelled, f"while {distribution} warmed up")
        finally:
            self._is_warming = False

    def _ask(
        self, request: RunJob | WarmUp, on_progress: OnProgress, cancelled: threading.Event | None, when: str
    ) -> JobFinished | WarmedUp:
        answer: JobFinished | WarmedUp | JobBroken | None = None
        try:
            answer = self._answer(request, on_progress, cancelled or threading.Event())
        except _EngineGone:
            raise self._crashed(when) from None
        finally:
            if answer is None:  # it still works on this job, and what it says of it must not reach the next one
                self.close()
        if isinstance(answer, JobBroken):
            if isinstance(answer.error, EngineUnusable | OutOfMemory):
                self.close()  # what the device still holds goes with the process
            raise answer.error
        return answer

    def _answer(
        self, request: RunJob | WarmUp, on_progress: OnProgress, cancelled: threading.Event
    ) -> JobFinished | WarmedUp | JobBroken:
        deadline = time.monotonic() + request.timeout_seconds + GRACE_SECONDS
        cancel_deadline: float | None = None
        # Loading a model takes its time in silence, which only the deadline limits; whoever counts steps goes on.
        stall_deadline = math.inf
        self._send(request)
        while True:
            match self._receive():
                case JobFinished() | WarmedUp() | JobBroken() as answer:
                    return answer
                case Progress(stage=stage, step=step, total=total):
                    on_progress(stage, step, total)
                    stall_deadline = time.monotonic() + self._stall_seconds
            now = time.monotonic()
            if cancelled.is_set() and cancel_deadline is None:
                cancel_deadline = now + CANCEL_SECONDS
                self._send(CancelJob())
            if cancel_deadline is not None and now >= cancel_deadline:
                raise JobCancelled("the job was cancelled while it was running; its engine was stopped")
            if now >= stall_deadline:
                raise EngineStalled(
                    f"the job reported no step for {self._stall_seconds:g} s after it had begun; its engine was killed"
                )
            if now >= deadline:
                raise JobTimeout(
                    f"the job was still running after {request.timeout_seconds:g} s and did not stop;"
                    " its engine was killed"
                )

    def _is_listening(self) -> bool:
        """Whether the pipe is open. What came since the last job ended is nobody's, and is dropped."""
        assert self._channel is not None
        try:
            while self._channel.poll(0):
                self._channel.receive()
        except (EOFError, OSError, JobError):
            return False
        return True

    def _send(self, message: EngineMessage) -> None:
        assert self._channel is not None
        try:
            self._channel.send(message)
        except OSError:
            raise _EngineGone from None

    def _receive(self) -> EngineMessage | None:
        """The next message, or None where none comes for a moment."""
        assert self._channel is not None
        try:
            if self._channel.poll(_POLL_SECONDS):
                return self._channel.receive()
        except (EOFError, OSError):
            raise _EngineGone from None
        # A child that the engine forked may hold the pipe open after the engine's death.
        if self.pid is None and not self._channel.poll(0):
            raise _EngineGone
        return None

    def close(self) -> None:
        """Kill the engine with everything it started, if it is there."""
        process, self._process = self._process, None
        if process is not None:
            kill_session(process.pid)
            process.wait()
            kill_marked(ENGINE_MARK, self._mark)  # what left the session
        if self._channel is not None:
            self._channel.close()
            self._channel = None
        if self._log is not None:
            self._log.close()

    def _crashed(self, when: str) -> EngineCrashed:
        assert self._process is not None
        assert self._log is not None
        process, log = self._process, self._log
        try:
            # The pipe closes a moment before the process is gone.
            returncode = process.wait(timeout=2.0)
            ending = ending_of(returncode)
        except subprocess.TimeoutExpired:
            ending = "its pipe closed"
        self.close()
        return EngineCrashed(f"the engine died {when} ({ending}): {log.end()}", details={"engine_ending": ending})


class _EngineGone(Exception):
    """The engine's end of the pipe, or the engine itself, is no more."""


class _EngineLog:
    """Passes the engine's stderr on to our log and keeps its end for error messages."""

    def __init__(self, stream: IO[bytes]) -> None:
        self._stream = stream
        self._lines: deque[str] = deque(maxlen=_TAIL_LINES)
        self._job: dict[str, str] = {}
        self._next_job: dict[str, str] = {}
        self._thread = threading.Thread(target=self._drain, name="engine-log", daemon=True)
        self._thread.start()

    def expect(self, job: Job) -> None:
        """What follows the next mark is of ``job``."""
        self._next_job = {"job_id": job.id, "job_type": job.job_type}

    def end(self) -> str:
        """The line that says most about the end: a fatal error, an exception's message, else the last one."""
        self._thread.join(timeout=0.5)
        lines = [line for line in list(self._lines) if line.strip()]
        fatal = next((line for line in reversed(lines) if _FATAL_LINE.match(line)), None)
        return fatal or last_exception(lines) or (lines[-1] if lines else "it logged nothing")

    def close(self) -> None:
        self._thread.join(timeout=1.0)

    def _drain(self) -> None:
        with self._stream:
            while line := self._stream.readline(8192):
                text = line.decode("utf-8", "replace").rstrip()
                if text == JOB_MARK:
                    self._lines.clear()  # what earlier jobs logged does not explain what becomes of this one
                    self._job = self._next_job
                    continue
                self._lines.append(text)
                logger.debug("engine: %s", text, extra=self._job)
