"""What a worker is made of, and the jobs it has: what its threads share."""

from __future__ import annotations

import threading
import time
from collections.abc import Mapping
from concurrent.futures import Future
from typing import Any

import attrs
from attrs import field, frozen

from ourvidz_core.delivery.callbacks import CallbackClient
from ourvidz_core.delivery.queue import Claim, Queue
from ourvidz_core.delivery.spool import NoSpool, Spool
from ourvidz_core.observe.usage import NoUsage, UsageSink
from ourvidz_core.observe.vitals import Vitals
from ourvidz_core.plugins.registry import Registry
from ourvidz_core.settings import Settings
from ourvidz_core.worker.reports import attempt_facts
from ourvidz_core.worker.runner import JobRunner, Watch
from ourvidz_core.worker.slot import EngineSlot
from ourvidz_core.worker.workspace import Workspace


@frozen(kw_only=True)
class WorkerParts:
    """What a worker is made of; each can be a double."""

    queue: Queue
    callbacks: CallbackClient
    runner: JobRunner
    slot: EngineSlot
    registry: Registry
    workspace: Workspace
    settings: Settings = field(repr=False)
    spool: Spool = field(factory=NoSpool)
    usage: UsageSink = field(factory=NoUsage)
    vitals: Vitals = field(factory=Vitals)
    #: Job types that cannot be done here, and why: their jobs are left to other workers.
    impossible: Mapping[str, str] = field(factory=dict)


@attrs.define(kw_only=True, eq=False)
class ActiveJob:
    """A job that this worker has."""

    claim: Claim
    watch: Watch = field(factory=Watch)
    #: Empty until its message was read.
    job_type: str = ""
    is_generated: bool = False
    #: Somebody else has it now.
    is_lost: bool = False
    is_cancelled: bool = False
    #: When the queue was asked for a job, by the monotonic clock.
    asked_at: float = field(factory=time.monotonic)
    #: Until then nobody else can have taken it.
    held_until: float
    #: When it last got on.
    last_sign: float = field(factory=time.monotonic)
    #: Its ``processing`` callback, on its way or over.
    processing: Future[None] | None = None

    @property
    def attempt_facts(self) -> dict[str, Any]:
        """What its callbacks say of this attempt and earlier ones."""
        return attempt_facts(self.claim.attempt, self.claim.reasons, self.claim.token)

    def note_sign(self) -> None:
        """It got on just now."""
        self.last_sign = time.monotonic()


class ActiveJobs:
    """The jobs that a worker has at once. Thread-safe."""

    def __init__(self) -> None:
        # Each queue counts its own tokens.
        self._jobs: dict[tuple[str, int], ActiveJob] = {}
        self._changed = threading.Condition()

    def __len__(self) -> int:
        return len(self._jobs)

    def __contains__(self, job: object) -> bool:
        return isinstance(job, ActiveJob) and self._jobs.get(_place_of(job)) is job

    def all(self) -> list[ActiveJob]:
        """Those of this moment."""
        with self._changed:
            return list(self._jobs.values())

    def add(self, job: ActiveJob) -> None:
        """Take one in."""
        with self._changed:
            self._jobs[_place_of(job)] = job
            self._changed.notify_all()

    def remove(self, job: ActiveJob) -> None:
        """Let one go."""
        with self._changed:
            self._jobs.pop(_place_of(job), None)
            self._changed.notify_all()

    def mark_generated(self, job: ActiveJob) -> None:
        """The device is done with it, and free for the next."""
        with self._changed:
            job.note_sign()
            job.is_generated = True
            self._changed.notify_all()

    def cancel(self) -> None:
        """Ask all of them to stop."""
        for job in self.all():
            job.watch.cancelled.set()

    def wake(self) -> None:
        """Let those who wait for a change look again."""
        with self._changed:
            self._changed.notify_all()

    def wait(self, timeout: float) -> None:
        """Return at the next change, at the latest after ``timeout`` seconds."""
        with self._changed:
            self._changed.wait(timeout)

    def wait_until_none(self) -> None:
        """Return when the last has ended."""
        with self._changed:
            self._changed.wait_for(lambda: not self._jobs)


class Stopping:
    """How far the end of a worker has come; each stage includes the ones before."""

    def __init__(self) -> None:
        #: No more jobs are taken.
        self.begun = threading.Event()
        #: Jobs at hand are no longer waited for.
        self.handing_back = threading.Event()
        #: No job is left.
        self.complete = threading.Event()


def _place_of(job: ActiveJob) -> tuple[str, int]:
    return job.claim.queue, job.claim.token
