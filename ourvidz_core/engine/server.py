"""The engine process: loads the plugins, keeps models warm, works on one job at a time.

Started by ``engine.host`` with one end of a pipe. It dies with the worker: when the
pipe closes, nothing of it is left.
"""

from __future__ import annotations

import faulthandler
import logging
import os
import queue
import sys
import tempfile
import threading
import time
from multiprocessing.connection import Connection
from pathlib import Path

from ourvidz_core.engine.compilation import keep_kernels
from ourvidz_core.engine.context import EngineContext
from ourvidz_core.engine.models import ModelCache
from ourvidz_core.engine.perform import perform, warm_up
from ourvidz_core.engine.processes import ENGINE_MARK, kill_marked, kill_session
from ourvidz_core.engine.protocol import (
    JOB_MARK,
    CancelJob,
    Channel,
    EngineReady,
    JobBroken,
    JobFinished,
    Progress,
    RunJob,
    WarmedUp,
    WarmUp,
)
from ourvidz_core.errors import GenerationError, InternalError, JobError
from ourvidz_core.logs import job_context, set_up
from ourvidz_core.plugins.loading import load_registry
from ourvidz_core.plugins.registry import Registry
from ourvidz_core.redaction import redact
from ourvidz_core.settings import Settings, load

logger = logging.getLogger(__name__)

#: A progress bar does not move faster than this, and a step may take a millisecond.
_PROGRESS_SECONDS = 0.1


class EngineServer:
    """The loop of the engine process."""

    def __init__(self, connection: Connection, settings: Settings, registry: Registry) -> None:
        self._channel = Channel(connection, registry)
        self._settings = settings
        self._registry = registry
        self._models = ModelCache(settings.vram_budget_gb)
        self._jobs: queue.SimpleQueue[RunJob | WarmUp] = queue.SimpleQueue()
        self._cancelled = threading.Event()
        self._progress_said: tuple[float, tuple[str, int, int]] = (0.0, ("", 0, 0))

    def serve(self) -> None:
        """Work until the worker goes away."""
        threading.Thread(target=self._listen, name="engine-listen", daemon=True).start()
        loaded = tuple(record.distribution for record in self._registry.records if record.status == "loaded")
        self._channel.send(EngineReady(plugins=loaded))
        while True:
            match self._jobs.get():
                case RunJob() as request:
                    self._channel.send(self._work(request))
                case WarmUp() as request:
                    self._channel.send(self._warm_up(request))

    def _warm_up(self, request: WarmUp) -> WarmedUp | JobBroken:
        with tempfile.TemporaryDirectory() as directory:
            context = self._context(Path(directory), request.timeout_seconds)
            try:
                warm_up(self._registry, request.distribution, request.job_types, context)
            except JobError as error:
                logger.info("%s could not warm up", request.distribution, exc_info=error)
                return JobBroken(error=error)
            except Exception as error:  # a fault of ours must not end the engine
                logger.exception("the warm-up of %s failed in the engine itself", request.distribution)
                return JobBroken(error=InternalError(f"the engine failed: {type(error).__name__}: {error}"))
        return WarmedUp()

    def _context(self, work_dir: Path, timeout_seconds: float) -> EngineContext:
        return EngineContext(
            work_dir=work_dir,
            models=self._models,
            timeout_seconds=timeout_seconds,
            device=self._settings.device,
            on_progress=self._say_progress,
            cancelled=self._cancelled,
            previews=self._settings.previews,
        )

    def _work(self, request: RunJob) -> JobFinished | JobBroken:
        sys.stderr.write(f"\n{JOB_MARK}\n")  # a plugin may have left half a line
        sys.stderr.flush()
        context = self._context(request.work_dir, request.timeout_seconds)
        with job_context(request.job.id, request.job.job_type), redact.without_prompts(*request.job.texts):
            return self._answer(request, context)

    def _answer(self, request: RunJob, context: EngineContext) -> JobFinished | JobBroken:
        try:
            return JobFinished(finished=perform(self._registry, request.job, context))
        except JobError as error:
            logger.info("job %s (%s) failed", request.job.id, request.job.job_type, exc_info=error)
            return JobBroken(error=error)
        except Exception as error:  # a fault of ours must not end the engine
            logger.exception("job %s (%s) failed in the engine itself", request.job.id, request.job.job_type)
            return JobBroken(error=InternalError(f"the engine failed: {type(error).__name__}: {error}"))

    def _listen(self) -> None:
        while True:
            try:
                message = self._channel.receive()
            except (EOFError, OSError):
                _end()
            except JobError as error:
                self._channel.send(JobBroken(error=error))
            except Exception as error:  # a deaf engine would neither stop a job nor see the worker go
                logger.exception("a message of the worker could not be read")
                self._channel.send(JobBroken(error=GenerationError(f"the engine could not read a job: {error}")))
            else:
                match message:
                    case RunJob() | WarmUp():
                        self._cancelled.clear()
                        self._jobs.put(message)
                    case CancelJob():
                        self._cancelled.set()

    def _say_progress(self, stage: str, step: int, total: int) -> None:
        now, step_is = time.monotonic(), (stage, step, total)
        said_at, said = self._progress_said
        if step_is != said and (step >= total or now - said_at >= _PROGRESS_SECONDS):
            self._progress_said = (now, step_is)
            self._channel.send(Progress(stage=stage, step=step, total=total))


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
    EngineServer(connection, settings, registry).serve()


if __name__ == "__main__":
    main(int(sys.argv[1]))
