"""What the worker and its engine say to each other: JSON over a private pipe.

An engine has several requests at once: one that has the device, the next, which waits for it, and those whose
files are being written. Each message says of which it is. The engine's standard output stays free for whatever
plugins print.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Mapping, Set
from enum import StrEnum
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import attrs
from attrs import frozen
from cattrs.errors import BaseValidationError

import ourvidz_core.errors
from ourvidz_core.errors import HookFailed, JobError
from ourvidz_core.plugins.registry import Registry
from ourvidz_core.wire.artifacts import FinishedGeneration, Generation
from ourvidz_core.wire.jobs import Job, References
from ourvidz_core.wire.payloads import converter, faults_of

#: A result names its files; it does not carry them.
MAX_MESSAGE_BYTES = 16_000_000
#: What a job has at least for its files, however late the device was done with it.
FINISH_SECONDS = 60.0
#: A line of the engine's stderr: what follows is of the job of the request whose number ends the line. Said there
#: because only there the order is sure.
JOB_MARK = "--- ourvidz: a job begins: "


class Stage(StrEnum):
    """How far an engine has come with a request, in this order."""

    #: The device is another's.
    WAITING = "waiting"
    #: It has the device.
    GENERATING = "generating"
    #: The device is free of it; its files are written and checked.
    FINISHING = "finishing"
    #: Whoever reviews its files may use the device, and waits for it.
    UNREVIEWED = "unreviewed"
    #: It has the device once more.
    REVIEWING = "reviewing"
    #: It was answered.
    DONE = "done"

    @property
    def has_device(self) -> bool:
        """Whether it, and nobody else, uses the device."""
        return self in (Stage.GENERATING, Stage.REVIEWING)


@frozen(kw_only=True)
class RunJob:
    """Worker to engine: generate this job in this directory within this time, once the device is free."""

    request: int
    job: Job
    work_dir: Path
    timeout_seconds: float


@frozen(kw_only=True)
class CancelJob:
    """Worker to engine: stop the job at its next step, or at once where it waits."""

    request: int


@frozen(kw_only=True)
class WarmUp:
    """Worker to engine: have this plugin make ready what these job types need, within this time."""

    request: int
    distribution: str
    job_types: tuple[str, ...]
    timeout_seconds: float


@frozen(kw_only=True)
class WarmedUp:
    """Engine to worker: it is ready."""

    request: int


@frozen(kw_only=True)
class EngineReady:
    """Engine to worker: plugins are loaded, jobs may come."""

    plugins: tuple[str, ...]


@frozen(kw_only=True)
class Reached:
    """Engine to worker: a request is at its next stage."""

    request: int
    stage: Stage


@frozen(kw_only=True)
class Progress:
    """Engine to worker: a step is done."""

    request: int
    stage: str
    step: int
    total: int


@frozen(kw_only=True)
class Doing:
    """Engine to worker: what it is about, in words. No step: silence may follow."""

    request: int
    text: str


@frozen(kw_only=True)
class JobFinished:
    """Engine to worker: the artifacts are in the work directory."""

    request: int
    finished: FinishedGeneration


@frozen(kw_only=True)
class JobBroken:
    """Engine to worker: the generation, or the warm-up, failed."""

    request: int
    error: JobError


EngineMessage = (
    RunJob | CancelJob | WarmUp | WarmedUp | EngineReady | Reached | Progress | Doing | JobFinished | JobBroken
)
_KINDS: dict[str, type[Any]] = {
    kind.__name__: kind
    for kind in (RunJob, CancelJob, WarmUp, WarmedUp, EngineReady, Reached, Progress, Doing, JobFinished, JobBroken)
}


class Channel:
    """One end of the pipe. Each message is one JSON object with its ``kind``."""

    def __init__(self, connection: Connection, registry: Registry) -> None:
        self._connection = connection
        self._registry = registry
        self._sending = threading.Lock()

    def send(self, message: EngineMessage) -> None:
        """Write one message; an ``OSError`` says that the other end is gone."""
        match message:
            case RunJob():
                body = {
                    "request": message.request,
                    "job": encode_job(message.job),
                    "work_dir": str(message.work_dir),
                    "timeout_seconds": message.timeout_seconds,
                }
            case JobFinished(finished=finished):
                body = {
                    "request": message.request,
                    "job": encode_job(finished.job),
                    "generation": {
                        "artifacts": converter.unstructure(finished.generation.artifacts),
                        "facts": converter.unstructure(finished.generation.facts),
                    },
                    "seconds": finished.seconds,
                    "device_facts": dict(finished.device_facts),
                }
            case JobBroken(error=error):
                body = {"request": message.request, **encode_error(error)}
            case _:
                body = converter.unstructure(message)
        text = json.dumps({"kind": type(message).__name__, **body}, default=_plain)
        with self._sending:  # a plugin may report progress from a thread of its own
            self._connection.send_bytes(text.encode())

    def receive(self) -> EngineMessage:
        """Read one message; ``EOFError`` or ``OSError`` says that the other end is gone.

        One that names its request and cannot be read otherwise, because a plugin put a value into it that its
        place does not take, is the failure of that request.

        :raises HookFailed: it cannot be read at all: a plugin wrote it itself.
        """
        raw = self._connection.recv_bytes(MAX_MESSAGE_BYTES)
        request = None
        try:
            body = json.loads(raw)
            request = body["request"] if "request" in body and type(body["request"]) is int else None
            return self._decode(body)
        except BaseValidationError as error:
            faults = "; ".join(str(fault) for fault in faults_of(error))
            failure = HookFailed(f"a plugin changed a job or made a result that cannot be read: {faults}")
            cause: Exception = error
        # Plugins run beside the other end of the pipe, and can write anything into it.
        except (ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
            failure = HookFailed(f"a message came that is none of ours ({type(error).__name__})")
            cause = error
        if request is None:
            raise failure from cause
        return JobBroken(request=request, error=failure)

    def _decode(self, body: dict[str, Any]) -> EngineMessage:
        kind = _KINDS[body.pop("kind")]
        if kind is RunJob:
            return RunJob(
                request=body["request"],
                job=decode_job(body["job"], self._registry),
                work_dir=Path(body["work_dir"]),
                timeout_seconds=body["timeout_seconds"],
            )
        if kind is JobFinished:
            finished = FinishedGeneration(
                job=decode_job(body["job"], self._registry),
                generation=converter.structure({**body["generation"], "finish": None}, Generation),
                seconds=body["seconds"],
                device_facts=body["device_facts"],
            )
            return JobFinished(request=body["request"], finished=finished)
        if kind is JobBroken:
            return JobBroken(request=body["request"], error=decode_error(body))
        message: EngineMessage = converter.structure(body, kind)
        return message

    def poll(self, timeout_seconds: float) -> bool:
        """Whether a message, or the end, can be read within the time."""
        return self._connection.poll(timeout_seconds)

    def close(self) -> None:
        """Close this end."""
        self._connection.close()


def _plain(value: object) -> object:
    return list(value) if isinstance(value, Set) else str(value)


def encode_job(job: Job) -> dict[str, Any]:
    """``job`` as JSON; its ``config`` as the JSON of its own class."""
    encoded: dict[str, Any] = converter.unstructure(job)
    return {**encoded, "config": converter.unstructure(job.config)}


def decode_job(body: Mapping[str, Any], registry: Registry) -> Job:
    """The job that :func:`encode_job` wrote; its type's owner knows the class of ``config``."""
    preset = registry.get(body["job_type"]).job_type.preset
    job = converter.structure({**body, "config": None, "references": {}}, Job)
    return attrs.evolve(
        job,
        config=converter.structure(body["config"], type(preset)),
        references=converter.structure(body["references"], References),
    )


def encode_error(error: JobError) -> dict[str, Any]:
    """``error`` as JSON."""
    return {
        "class": _known_class(type(error)).__name__,
        "message": error.message,
        "error_type": error.error_type,
        "is_transient": error.is_transient,
        "details": dict(error.details),
    }


def decode_error(body: Mapping[str, Any]) -> JobError:
    """The error that :func:`encode_error` wrote: a plugin's own as the class of ours that it is one of."""
    cls = getattr(ourvidz_core.errors, body["class"])
    if not (isinstance(cls, type) and issubclass(cls, JobError)):
        raise TypeError(f"{cls!r} is no error of a job")
    error = cls(body["message"], details=body["details"])
    error.error_type, error.is_transient = str(body["error_type"]), body["is_transient"] is True
    return error


def _known_class(cls: type[JobError]) -> type[JobError]:
    ours = (base for base in cls.__mro__ if issubclass(base, JobError) and base.__module__ == JobError.__module__)
    return next(ours, JobError)
