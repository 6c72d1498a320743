"""One engine process as the worker sees it, from its start to its end, with the requests that it has meanwhile."""

from __future__ import annotations

import logging
import queue
import re
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping
from itertools import dropwhile, takewhile
from multiprocessing.connection import Pipe
from typing import IO

import attrs
from attrs import field

from ourvidz_core.engine.processes import ENGINE_MARK, ending_of, kill_marked, kill_session, last_exception, new_mark
from ourvidz_core.engine.protocol import (
    JOB_MARK,
    CancelJob,
    Channel,
    EngineMessage,
    EngineReady,
    JobBroken,
    JobFinished,
    Reached,
    RunJob,
    Stage,
    WarmedUp,
    WarmUp,
)
from ourvidz_core.errors import EngineCrashed, EngineLost, EngineUnusable, HookFailed, JobError, OutOfMemory
from ourvidz_core.plugins.registry import Registry
from ourvidz_core.wire.jobs import Job

logger = logging.getLogger(__name__)

#: Jobs whose files are being written get this long before an engine is killed because of another job.
SPARE_SECONDS = 5.0
_POLL_SECONDS = 0.1
#: After native code has failed, the stacks of all threads are among them.
_TAIL_LINES = 1000
#: faulthandler's first line; a stack of many lines follows it.
_FATAL_LINE = re.compile(r"Fatal Python error: ")
_FINISHING_LINE = re.compile(r'engine/server\.py", line \d+ in _finish')
#: The first line of what the engine's own logging writes.
_RECORD_LINE = re.compile(r"(DEBUG|INFO|WARNING|ERROR|CRITICAL) \S+: ")
_TRACEBACK_LINE = re.compile(r"\s|$|Traceback |The above exception|During handling")


@attrs.define(kw_only=True, eq=False)
class Request:
    """What an engine was asked, and what it says of it."""

    number: int
    #: What the engine died of, if it dies while this has the device: ``worked on acme``.
    subject: str
    job: Job | None = None
    stage: Stage = Stage.WAITING
    #: None: the engine is no more and had not begun with it.
    inbox: queue.SimpleQueue[EngineMessage | None] = field(factory=queue.SimpleQueue)


class EngineChild:
    """A child process in a session of its own. Thread-safe."""

    def __init__(self, registry: Registry, environ: Mapping[str, str]) -> None:
        self._mark = new_mark()
        ours, theirs = Pipe()
        try:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "ourvidz_core.engine.server", str(theirs.fileno())],
                env={**environ, ENGINE_MARK: self._mark},
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
        self._channel = Channel(ours, registry)
        self._changed = threading.Condition()
        self._requests: dict[int, Request] = {}
        self._next_number = 0
        self._ready: queue.SimpleQueue[EngineReady | None] = queue.SimpleQueue()
        self._is_retired = self._is_killed = self._has_ended = False
        self._ending = ""
        self._reader = threading.Thread(target=self._read, name="engine-read", daemon=True)
        self._reader.start()

    @property
    def pid(self) -> int | None:
        """The process's id while it runs."""
        return self._process.pid if self._process.poll() is None else None

    @property
    def is_open(self) -> bool:
        """Whether it takes requests."""
        return not self._is_retired and not self._has_ended and self.pid is not None

    # -- its start

    def take_ready(self, timeout: float) -> EngineReady | None:
        """What it says once its plugins are loaded; None where that takes longer.

        :raises EngineCrashed: it ended instead.
        """
        try:
            ready = self._ready.get(timeout=timeout)
        except queue.Empty:
            return None
        if ready is None:
            raise EngineCrashed(
                f"the engine died while it started ({self._ending}): {self.log_end()}",
                details={"engine_ending": self._ending},
            )
        return ready

    def log_end(self) -> str:
        """The line of its log that says most about its end."""
        return self._log.end(None)

    # -- requests

    def ask(self, make: Callable[[int], RunJob | WarmUp], *, subject: str, job: Job | None = None) -> Request:
        """Send what ``make`` makes of a number. It is answered in the request's inbox, whatever happens."""
        with self._changed:
            request = Request(number=self._next_number, subject=subject, job=job)
            self._next_number += 1
            if not self.is_open:
                request.inbox.put(None)
                return request
            self._requests[request.number] = request
        self._log.expect(request)
        self._send(make(request.number))
        return request

    def cancel(self, request: Request) -> None:
        """Ask it to stop with a request at its next step."""
        self._send(CancelJob(request=request.number))

    def leave(self, request: Request) -> None:
        """Nobody listens for the request's answer any more. Where it still has the device, the engine is ended."""
        with self._changed:
            self._requests.pop(request.number, None)
            is_left_behind = request.stage is not Stage.DONE and not self._has_ended
            self._changed.notify_all()
        self._log.forget(request)
        if is_left_behind:
            if request.stage.has_device:
                self.retire()
            else:
                self.cancel(request)
        if self._is_retired and not self._has_device_user():
            self._spare()
            self.kill()

    def retire(self) -> None:
        """Take no more requests; those that wait are told to go elsewhere, those that have begun may end."""
        with self._changed:
            self._is_retired = True
            for request in self._requests.values():
                if request.stage is Stage.WAITING:
                    request.stage = Stage.DONE
                    request.inbox.put(None)

    def end(self) -> None:
        """Where it is retired, wait until its last requests are over. Then kill it, with everything it started."""
        with self._changed:
            while self.pid is not None and self._has_device_user():
                self._changed.wait(_POLL_SECONDS)
        self._spare()
        self.kill()

    def kill(self) -> None:
        """Kill it with everything it started, if it is there."""
        if self.pid is not None:
            self._is_killed = True
            kill_session(self._process.pid)
        self._reader.join()

    def _spare(self) -> None:
        """Give those who write files their time."""
        until = time.monotonic() + SPARE_SECONDS
        with self._changed:
            while self.pid is not None and self._unfinished() and time.monotonic() < until:
                self._changed.wait(_POLL_SECONDS)

    def _has_device_user(self) -> bool:
        with self._changed:
            return not self._has_ended and any(request.stage.has_device for request in self._requests.values())

    def _unfinished(self) -> list[Request]:
        return [request for request in self._requests.values() if request.stage is not Stage.DONE]

    def _send(self, message: EngineMessage) -> None:
        try:
            self._channel.send(message)
        except (OSError, ValueError):  # it is gone, as whoever reads will see
            logger.debug("the engine is gone and was not told of %s", type(message).__name__)

    # -- what it says

    def _read(self) -> None:
        misread: HookFailed | None = None
        try:
            while True:
                if self._channel.poll(_POLL_SECONDS):
                    self._deliver(self._channel.receive())
                # A child that the engine forked may hold the pipe open after the engine's death.
                elif self.pid is None and not self._channel.poll(0):
                    break
        except (EOFError, OSError):
            pass
        except HookFailed as error:
            misread = error
        except Exception:  # jobs wait for what is read here
            logger.exception("what an engine said could not be taken")
        self._close(misread)

    def _deliver(self, message: EngineMessage) -> None:
        if isinstance(message, EngineReady):
            self._ready.put(message)
            return
        number = getattr(message, "request", None)
        with self._changed:
            request = self._requests.get(number) if isinstance(number, int) else None
            if request is None or request.stage is Stage.DONE:
                return  # of a job that was given up
            match message:
                case Reached(stage=stage):
                    request.stage = stage
                case JobFinished() | WarmedUp():
                    request.stage = Stage.DONE
                case JobBroken(error=error):
                    request.stage = Stage.DONE
                    if isinstance(error, EngineUnusable | OutOfMemory):
                        self.retire()  # what the device still holds goes with the process
            request.inbox.put(message)
            self._changed.notify_all()

    def _close(self, misread: HookFailed | None) -> None:
        if misread is not None:
            kill_session(self._process.pid)  # nothing that it says can be understood
        try:
            # The pipe closes a moment before the process is gone.
            self._ending = ending_of(self._process.wait(timeout=2.0))
        except subprocess.TimeoutExpired:
            self._ending = "its pipe closed"
        kill_session(self._process.pid)
        self._process.wait()
        kill_marked(ENGINE_MARK, self._mark)  # what left the session
        self._log.close()
        with self._changed:
            self._has_ended = True
            unfinished = self._unfinished()
            is_nobodys_fault = self._is_killed and misread is None
            blamed = [] if is_nobodys_fault else _blamed(unfinished, is_beside=self._log.ended_beside_device())
            for request in unfinished:
                request.inbox.put(self._obituary(request, blamed, misread))
                request.stage = Stage.DONE
            self._changed.notify_all()
        self._ready.put(None)
        self._channel.close()

    def _obituary(self, request: Request, blamed: list[Request], misread: HookFailed | None) -> JobBroken | None:
        if request.stage is Stage.WAITING:
            return None
        error: JobError
        if request not in blamed:
            error = EngineLost(
                f"the engine ended because of another job while {request.subject} ({self._ending}); it is tried again"
            )
        elif misread is not None:
            error = misread
        else:
            error = EngineCrashed(
                f"the engine died while {request.subject} ({self._ending}): {self._log.end(request.job)}",
                details={"engine_ending": self._ending},
            )
        return JobBroken(request=request.number, error=error)


def _blamed(requests: list[Request], *, is_beside: bool) -> list[Request]:
    """Those that may have ended their engine: whoever had the device, unless it is known to be one that wrote files."""
    begun = [request for request in requests if request.stage is not Stage.WAITING]
    return [request for request in begun if request.stage.has_device is not is_beside] or begun


class _EngineLog:
    """Passes the engine's stderr on to our log, each line with its job, and keeps its end for error messages."""

    def __init__(self, stream: IO[bytes]) -> None:
        self._stream = stream
        self._lines: deque[tuple[str, str]] = deque(maxlen=_TAIL_LINES)
        self._jobs: dict[int, dict[str, str]] = {}
        #: Whose the device is, and whose the last line is.
        self._on_device: dict[str, str] = {}
        self._speaker: dict[str, str] = {}
        self._thread = threading.Thread(target=self._drain, name="engine-log", daemon=True)
        self._thread.start()

    def expect(self, request: Request) -> None:
        """There may be lines of ``request``."""
        if request.job is not None:
            self._jobs[request.number] = {"job_id": request.job.id, "job_type": request.job.job_type}

    def forget(self, request: Request) -> None:
        """There are no more lines of ``request``."""
        self._jobs.pop(request.number, None)

    def end(self, job: Job | None) -> str:
        """The line that says most about the end: a fatal error, an exception's message, else the last one.

        What was said of other jobs than ``job`` does not explain it.
        """
        self._thread.join(timeout=0.5)
        whose = ("",) if job is None else ("", job.id)
        said = [(of, line) for of, line in list(self._lines) if line.strip()]
        lines = [line for of, line in said if job is None or of in whose]
        fatal = next((line for _, line in reversed(said) if _FATAL_LINE.match(line)), None)
        return fatal or last_exception(lines) or (lines[-1] if lines else "it logged nothing")

    def ended_beside_device(self) -> bool:
        """Whether the thread in which native code failed was one that writes files."""
        self._thread.join(timeout=0.5)
        lines = dropwhile(lambda line: not line.startswith("Current thread "), [line for _, line in list(self._lines)])
        return any(_FINISHING_LINE.search(line) for line in takewhile(str.strip, lines))

    def close(self) -> None:
        self._thread.join(timeout=1.0)

    def _drain(self) -> None:
        with self._stream:
            while line := self._stream.readline(8192):
                text = line.decode("utf-8", "replace").rstrip()
                if text.startswith(JOB_MARK):
                    self._lines.clear()  # what earlier jobs logged does not explain what becomes of this one
                    number = text.removeprefix(JOB_MARK)
                    self._on_device = self._speaker = self._jobs.get(int(number), {}) if number.isdecimal() else {}
                    continue
                self._speaker = self._speaker_of(text)
                self._lines.append((self._speaker.get("job_id", ""), text))
                logger.debug("engine: %s", text, extra=self._speaker)

    def _speaker_of(self, text: str) -> dict[str, str]:
        """Whoever the engine's logging names, with the traceback below its line; else whoever has the device."""
        if _RECORD_LINE.match(text):
            return next((job for job in list(self._jobs.values()) if job["job_id"] in text), self._on_device)
        if _TRACEBACK_LINE.match(text) or last_exception([text]) is not None:
            return self._speaker
        return self._on_device
