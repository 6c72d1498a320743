"""What a worker's jobs are doing, told by their events."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

import attrs
from attrs import define, field, frozen

from ourvidz_core.delivery.board import FinishedJob, RunningJob, StoredAsset
from ourvidz_core.redaction import redact
from ourvidz_core.wire import events
from ourvidz_core.wire.callbacks import JobStatus

_REASON_CHARACTERS = 500


@frozen(kw_only=True)
class Counts:
    """Outcomes since the worker started."""

    completed: int = 0
    failed: int = 0
    retried: int = 0


@define(kw_only=True)
class _Way:
    """How far one job has come."""

    job: RunningJob
    seconds: dict[str, float] = field(factory=dict)
    assets: list[StoredAsset] = field(factory=list)


class Activity:
    """Hears events and knows what runs. Thread-safe."""

    def __init__(self, worker: str) -> None:
        self._worker = worker
        self._on_change: Callable[[], None] = lambda: None
        self._on_finished: Callable[[FinishedJob], None] = lambda record: None
        self._lock = threading.Lock()
        self._ways: dict[str, _Way] = {}
        self._counts = Counts()

    def tell(self, on_change: Callable[[], None], on_finished: Callable[[FinishedJob], None]) -> None:
        """Call these from now on, with nothing locked: when something is new, and when a job is over."""
        self._on_change, self._on_finished = on_change, on_finished

    @property
    def running(self) -> tuple[RunningJob, ...]:
        """The jobs that the worker has, the oldest first."""
        with self._lock:
            return tuple(way.job for way in self._ways.values())

    @property
    def counts(self) -> Counts:
        """What became of those before."""
        with self._lock:
            return self._counts

    def __call__(self, *, event: events.Event) -> None:
        """Hear of one event."""
        with self._lock:
            record = self._take(event)
        if record is not None:
            self._on_finished(record)
        self._on_change()

    def _take(self, event: events.Event) -> FinishedJob | None:
        now = time.time()
        if isinstance(event, events.JobStarted):
            self._ways[event.job_id] = _Way(
                job=RunningJob(
                    id=event.job_id,
                    type=event.job_type,
                    attempt=event.attempt,
                    stage="references" if event.has_references else "waiting",
                    claimed_at=now - event.claim_seconds,
                )
            )
            return None
        way = self._ways.get(event.job_id)
        match event:
            case events.JobCompleted() | events.JobFailed():
                return self._end(event, self._ways.pop(event.job_id, None), now)
            case events.JobRetried():
                self._ways.pop(event.job_id, None)
                self._counts = attrs.evolve(self._counts, retried=self._counts.retried + 1)
            case events.JobReleased():
                self._ways.pop(event.job_id, None)
            case _ if way is not None:
                self._move(way, event, now)
        return None

    @staticmethod
    def _move(way: _Way, event: events.Event, now: float) -> None:
        match event:
            case events.ReferencesFetched(seconds=seconds):
                way.seconds["references"] = seconds
                way.job = attrs.evolve(way.job, stage="waiting")
            case events.GenerationStarted(waited_seconds=seconds):
                way.seconds["waiting"] = seconds
                way.job = attrs.evolve(way.job, stage="generate", started_at=now)
            case events.GenerationProgressed(stage=stage, step=step, total=total):
                way.job = attrs.evolve(way.job, stage=stage, step=step, total=total)
            case events.GenerationFinished(seconds=seconds):
                way.seconds["generate"] = seconds
                way.job = attrs.evolve(way.job, stage="store", step=None, total=None)
            case events.AssetStored(seconds=seconds):
                way.seconds["store"] = way.seconds.get("store", 0.0) + seconds
                way.assets.append(
                    StoredAsset(
                        bucket=event.bucket, path=event.path, media_type=event.media_type, size_bytes=event.size_bytes
                    )
                )

    def _end(self, event: events.JobCompleted | events.JobFailed, way: _Way | None, now: float) -> FinishedJob:
        """The record of a job that is over. One that was ended before it ran has no way behind it."""
        error = event if isinstance(event, events.JobFailed) else None
        name = "failed" if error else "completed"
        self._counts = attrs.evolve(self._counts, **{name: getattr(self._counts, name) + 1})
        seconds = dict(way.seconds) | {"total": now - way.job.claimed_at} if way else {}
        return FinishedJob(
            id=event.job_id,
            type=event.job_type,
            status=JobStatus.FAILED if error else JobStatus.COMPLETED,
            finished_at=now,
            worker=self._worker,
            error_type=error.error_type if error else None,
            reason=redact(error.message)[:_REASON_CHARACTERS] if error else None,
            attempt=way.job.attempt if way else (error.attempt if error else 1),
            seconds={stage: round(value, 3) for stage, value in seconds.items()},
            assets=tuple(way.assets) if way and not error else (),
        )
