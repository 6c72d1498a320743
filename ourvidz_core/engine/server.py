"""The engine process: loads the plugins, keeps models warm, gives the device to one job at a time.

The next job waits here, so that the device goes from one to the other at once. Files are written and checked in
threads beside it; what uses the device does not leave the main one.

Started by ``engine.host`` with one end of a pipe. It dies with the worker: when the
pipe closes, nothing of it is left.
"""

from __future__ import annotations

import contextlib
import faulthandler
import gc
import logging
import os
import sys
import tempfile
import threading
import time
from collections import deque
from collections.abc import Iterator
from multiprocessing.connection import Connection
from pathlib import Path

from attrs import frozen

from ourvidz_core.engine.compilation import keep_kernels
from ourvidz_core.engine.context import EngineContext
from ourvidz_core.engine.models import ModelCache
from ourvidz_core.engine.perform import Generated, finish, generate, review, warm_up
from ourvidz_core.engine.processes import ENGINE_MARK, kill_marked, kill_session
from ourvidz_core.engine.protocol import (
    FINISH_SECONDS,
    JOB_MARK,
    CancelJob,
    Channel,
    Doing,
    EngineMessage,
    EngineReady,
    JobBroken,
    JobFinished,
    Progress,
    Reached,
    RunJob,
    Stage,
    WarmedUp,
    WarmUp,
)
from ourvidz_core.errors import EngineUnusable, InternalError, JobCancelled, JobError, OutOfMemory
from ourvidz_core.logs import job_context, set_up
from ourvidz_core.plugins.loading import load_registry
from ourvidz_core.plugins.registry import Registry
from ourvidz_core.redaction import redact
from ourvidz_core.settings import Settings, load
from ourvidz_core.wire.artifacts import FinishedGeneration

logger = logging.getLogger(__name__)

#: A progress bar does not move faster than this, and a step may take a millisecond.
_PROGRESS_SECONDS = 0.1
#: Nothing came for so long after the first job: nobody is waited for.
_REST_SECONDS = 1.0
#: What is shown of a line of the log while the engine warms up.
_DOING_CHARACTERS = 200
#: The thread with the device lets go of the interpreter in calls into torch, and gets it back after this long from one
#: that writes files. 3,000 small calls beside a thread of pure Python take 19 ms with the default of 5 ms, and 10 with
#: this; alone they take 6.
_SWITCH_SECONDS = 0.0001


class EngineServer:
    """The loop of the engine process. Whatever has the device runs in the thread that serves, and nowhere else."""

    def __init__(self, connection: Connection, settings: Settings, registry: Registry) -> None:
        self._channel = Channel(connection, registry)
        self._settings = settings
        self._registry = registry
        self._models = ModelCache.of(settings)
        self._line: deque[RunJob | WarmUp | _Finished] = deque()
        self._cancelled: dict[int, threading.Event] = {}
        self._changed = threading.Condition()
        #: The device is broken, or full: the worker will replace this engine once others are done with their files.
        self._is_spent = False

    def serve(self) -> None:
        """Work until the worker goes away."""
        threading.Thread(target=self._listen, name="engine-listen", daemon=True).start()
        loaded = tuple(record.distribution for record in self._registry.records if record.status == "loaded")
        self._channel.send(EngineReady(plugins=loaded))
        while True:
            match self._take():
                case RunJob() as request:
                    self._generate(request)
                    self._begin_to_collect()
                case WarmUp() as request:
                    self._warm_up(request)
                case _Finished() as finished:
                    self._review(finished)

    def _take(self) -> RunJob | WarmUp | _Finished:
        with self._changed:
            self._changed.wait_for(lambda: self._line and not self._is_spent)
            return self._line.popleft()

    def _begin_to_collect(self) -> None:
        """After the first job, collect garbage as Python does, and never look again at what has stayed until now.

        Until then an engine imports and loads a million objects that stay. To look through all of them again and again
        is a quarter of the time in which they are made, and half a second in whatever job it happens in.
        """
        if gc.isenabled():
            return
        with self._changed:
            # The first job's files are being written meanwhile.
            self._changed.wait_for(lambda: self._line, timeout=_REST_SECONDS)
        gc.collect()  # what is frozen is never freed
        gc.freeze()
        gc.enable()

    # -- with the device

    def _generate(self, request: RunJob) -> None:
        sys.stderr.write(f"\n{JOB_MARK}{request.request}\n")  # a plugin may have left half a line
        sys.stderr.flush()
        self._channel.send(Reached(request=request.request, stage=Stage.GENERATING))
        context = self._context(request, request.work_dir)
        with self._answering_for(request):
            context.stop_if_cancelled()
            generated = generate(self._registry, request.job, context)
            self._channel.send(Reached(request=request.request, stage=Stage.FINISHING))
            threading.Thread(
                target=self._finish, args=[request, generated, context], name="engine-finish", daemon=True
            ).start()

    def _review(self, finished: _Finished) -> None:
        request = finished.request
        self._channel.send(Reached(request=request.request, stage=Stage.REVIEWING))
        with self._answering_for(request):
            finished.context.stop_if_cancelled()
            finished.context.grant(request.timeout_seconds)  # it has waited for others
            review(self._registry, finished.finished, finished.context)
            self._answer(JobFinished(request=request.request, finished=finished.finished))

    def _warm_up(self, request: WarmUp) -> None:
        self._channel.send(Reached(request=request.request, stage=Stage.GENERATING))
        with (
            self._answering_for(request),
            tempfile.TemporaryDirectory() as directory,
            _told_to(self._channel, request.request),
        ):
            context = self._context(request, Path(directory))
            warm_up(self._registry, request.distribution, request.job_types, context)
            self._answer(WarmedUp(request=request.request))

    # -- beside the next job

    def _finish(self, request: RunJob, generated: Generated, context: EngineContext) -> None:
        with self._answering_for(request):
            context.grant(FINISH_SECONDS)
            finished = finish(self._registry, generated, context)
            if not self._registry.get(request.job.job_type).is_reviewed:
                self._answer(JobFinished(request=request.request, finished=finished))
                return
            self._channel.send(Reached(request=request.request, stage=Stage.UNREVIEWED))
            with self._changed:
                # It has been waited for longer than what is in line.
                self._line.appendleft(_Finished(request=request, finished=finished, context=context))
                self._changed.notify_all()

    # -- either way

    def _context(self, request: RunJob | WarmUp, work_dir: Path) -> EngineContext:
        return EngineContext(
            work_dir=work_dir,
            models=self._models,
            timeout_seconds=request.timeout_seconds,
            device=self._settings.device,
            on_progress=_ProgressTeller(self._channel, request.request),
            cancelled=self._cancelled[request.request],
            previews=self._settings.previews,
        )

    @contextlib.contextmanager
    def _answering_for(self, request: RunJob | WarmUp) -> Iterator[None]:
        """What goes wrong within the block is the request's answer."""
        subject, job_type, texts = _subject_of(request)
        with job_context(subject, job_type), redact.without_prompts(*texts):
            try:
                yield
            except JobError as error:
                logger.info("%s (%s) failed", subject, job_type, exc_info=error)
                self._break(request, error)
            except Exception as error:  # a fault of ours must not end the engine
                logger.exception("%s (%s) failed in the engine itself", subject, job_type)
                self._break(request, InternalError(f"the engine failed: {type(error).__name__}: {error}"))

    def _break(self, request: RunJob | WarmUp, error: JobError) -> None:
        if isinstance(error, EngineUnusable | OutOfMemory):
            with self._changed:
                self._is_spent = True
        self._answer(JobBroken(request=request.request, error=error))

    def _answer(self, message: JobFinished | WarmedUp | JobBroken) -> None:
        with self._changed:
            self._cancelled.pop(message.request, None)
        self._channel.send(message)

    # -- what the worker says

    def _listen(self) -> None:
        while True:
            try:
                self._hear(self._channel.receive())
            except (EOFError, OSError):  # it may also have gone before it was answered
                _end()
            except Exception:  # a deaf engine would neither stop a job nor see the worker go
                logger.exception("a message of the worker could not be read")

    def _hear(self, message: EngineMessage) -> None:
        match message:
            case RunJob() | WarmUp():
                with self._changed:
                    self._cancelled[message.request] = threading.Event()
                    self._line.append(message)
                    self._changed.notify_all()
            case CancelJob(request=number):
                self._cancel(number)
            case JobBroken():  # a job that cannot be read
                self._channel.send(message)

    def _cancel(self, number: int) -> None:
        with self._changed:
            if number in self._cancelled:
                self._cancelled[number].set()
            waiting = [entry for entry in self._line if not isinstance(entry, _Finished) and entry.request == number]
            for request in waiting:
                self._line.remove(request)
        for request in waiting:
            self._break(request, JobCancelled("the job was cancelled before its turn at the engine"))


@frozen(kw_only=True)
class _Finished:
    """A job whose files wait for their review."""

    request: RunJob
    finished: FinishedGeneration
    context: EngineContext


class _ProgressTeller:
    """Tells the worker of the steps of one request."""

    def __init__(self, channel: Channel, request: int) -> None:
        self._channel = channel
        self._request = request
        self._said_at = 0.0
        self._said = ("", 0, 0)

    def __call__(self, stage: str, step: int, total: int) -> None:
        now, step_is = time.monotonic(), (stage, step, total)
        if step_is != self._said and (step >= total or now - self._said_at >= _PROGRESS_SECONDS):
            self._said_at, self._said = now, step_is
            self._channel.send(Progress(request=self._request, stage=stage, step=step, total=total))


class _LogTeller(logging.Handler):
    """Tells the worker what this thread logs."""

    def __init__(self, channel: Channel, request: int) -> None:
        super().__init__(logging.INFO)
        self._channel = channel
        self._request = request
        self._thread = threading.get_ident()

    def emit(self, record: logging.LogRecord) -> None:
        if record.thread != self._thread:
            return
        with contextlib.suppress(Exception):  # a library's wrong arguments, or a worker that is gone
            text = redact(record.getMessage())[:_DOING_CHARACTERS]
            self._channel.send(Doing(request=self._request, text=text))


@contextlib.contextmanager
def _told_to(channel: Channel, request: int) -> Iterator[None]:
    """The worker hears what this thread logs within the block."""
    teller = _LogTeller(channel, request)
    logging.getLogger().addHandler(teller)
    try:
        yield
    finally:
        logging.getLogger().removeHandler(teller)


def _subject_of(request: RunJob | WarmUp) -> tuple[str, str, tuple[str | None, ...]]:
    match request:
        case RunJob(job=job):
            return job.id, job.job_type, tuple(job.texts)
        case WarmUp(distribution=distribution):
            return distribution, "warm-up", ()


def _end_with_worker(connection: Connection, is_loaded: threading.Event) -> None:
    """While plugins load, nothing is read; all that can come is the end."""
    while not is_loaded.is_set():
        if connection.poll(0.2) and not is_loaded.is_set():
            _end()


def _end() -> None:
    """The worker is gone: leave at once, and leave nothing behind that was started here."""
    kill_session(os.getsid(0), spare=os.getpid())
    if mark := os.environ.get(ENGINE_MARK):
        kill_marked(ENGINE_MARK, mark, spare=os.getpid())
    os._exit(0)


def main(descriptor: int) -> None:
    """Run an engine on the pipe that the worker passed as ``descriptor``."""
    # Whatever plugins and libraries print goes to stderr, which the worker reads as a log.
    os.dup2(2, 1)
    gc.disable()  # see EngineServer._begin_to_collect
    settings = load()
    set_up(settings, is_engine=True)
    keep_kernels(settings)
    faulthandler.enable()  # a crash in native code says where
    os.set_inheritable(descriptor, False)  # a program that a plugin starts must not hold the pipe open
    connection = Connection(descriptor)
    is_loaded = threading.Event()
    threading.Thread(target=_end_with_worker, args=(connection, is_loaded), name="engine-watch", daemon=True).start()
    registry = load_registry(settings)
    is_loaded.set()
    sys.setswitchinterval(_SWITCH_SECONDS)
    try:
        EngineServer(connection, settings, registry).serve()
    except OSError:  # nobody reads what it says
        _end()


if __name__ == "__main__":
    main(int(sys.argv[1]))
