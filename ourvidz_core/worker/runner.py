"""One job from its message to its outcome. Knows no queue and sends no callback."""

from __future__ import annotations

import contextlib
import errno
import logging
import re
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import attrs
import stamina
from attrs import field, frozen

from ourvidz_core.delivery.references import ReferenceSource
from ourvidz_core.delivery.storage import Storage
from ourvidz_core.engine.host import Engine, ignore_progress
from ourvidz_core.errors import (
    ArtifactError,
    AssetRejected,
    DiskFull,
    HookFailed,
    InternalError,
    JobCancelled,
    JobError,
)
from ourvidz_core.logs import set_job_type
from ourvidz_core.plugins.registry import OwnedJobType, Registry
from ourvidz_core.wire import events
from ourvidz_core.wire.artifacts import Artifact, Asset, FinishedGeneration
from ourvidz_core.wire.callbacks import Callback
from ourvidz_core.wire.job_types import NAME_PATTERN
from ourvidz_core.wire.jobs import Job, Reference, ReferenceMode
from ourvidz_core.wire.payloads import decode_message, job_id_of, structure_payload
from ourvidz_core.worker.reports import completed_metadata, completed_report, failed_report
from ourvidz_core.worker.workspace import Workspace

logger = logging.getLogger(__name__)

#: Tries of one upload or fetch before the whole job is tried again, which costs a generation.
_CLIENT_ATTEMPTS = 4
_CLIENT_SECONDS = 60.0
#: https://www.w3.org/TR/trace-context/#traceparent-header, with ids that are not all zeros.
_TRACEPARENT = re.compile(r"00-(?!0{32})[0-9a-f]{32}-(?!0{16})[0-9a-f]{16}-[0-9a-f]{2}")


@frozen(kw_only=True)
class Outcome:
    """How one attempt at a job ended."""

    #: None where the message has no id that a callback could name.
    callback: Callback | None
    job_id: str | None = None
    job_type: str | None = None
    #: None where the job completed.
    error: JobError | None = None
    job: Job | None = field(default=None, repr=False)
    assets: tuple[Asset, ...] = ()
    #: Wall time of the attempt.
    seconds: float = 0.0

    def as_event(
        self, *, key: str = "", attempt: int = 1, is_dead_letter: bool = False
    ) -> events.JobCompleted | events.JobFailed:
        """What observers are told once nothing can take this ending back; ``key`` names a job without an id."""
        job = {"job_id": self.job_id or key, "job_type": self.job_type or ""}
        if self.error is None:
            return events.JobCompleted(**job, assets=len(self.assets), seconds=self.seconds)
        return events.JobFailed(
            **job,
            error_type=self.error.error_type,
            message=self.error.message,
            attempt=attempt,
            is_dead_letter=is_dead_letter,
        )


@frozen(kw_only=True)
class Watch:
    """What a caller of :meth:`JobRunner.run` is told while the job goes on, and how it stops it."""

    on_job: Callable[[Job], None] = lambda job: None
    on_progress: Callable[[str, int, int], None] = ignore_progress
    #: The engine can take another job; the files of this one may still have to be written.
    on_generated: Callable[[], None] = lambda: None
    on_stored: Callable[[Asset], None] = lambda asset: None
    cancelled: threading.Event = field(factory=threading.Event)


class JobRunner:
    """Walks jobs: parse, fetch references, generate, store, report. Thread-safe if its engine is."""

    def __init__(
        self,
        *,
        registry: Registry,
        engine: Engine,
        references: ReferenceSource,
        storage: Storage,
        workspace: Workspace,
        bucket_limits_mb: Mapping[str, float] | None = None,
        job_timeouts_seconds: Mapping[str, float] | None = None,
    ) -> None:
        self._registry = registry
        self._engine = engine
        self._references = references
        self._storage = storage
        self._workspace = workspace
        self._bucket_limits_mb = dict(bucket_limits_mb or {})
        self._job_timeouts_seconds = dict(job_timeouts_seconds or {})

    def parse(self, raw: bytes) -> Job:
        """The job that a message describes; nothing is fetched and nothing runs.

        :raises PayloadError: the message is wrong.
        """
        return self._parse(decode_message(raw))[1]

    def run(
        self,
        raw: bytes,
        *,
        attempt: int = 1,
        attempts: Mapping[str, Any] | None = None,
        watch: Watch | None = None,
        queue: str = "",
        asked_at: float | None = None,
    ) -> Outcome:
        """Take one message to its outcome. Never raises a :class:`JobError`: it is in the outcome.

        Observers hear of every step, and not of the end: whether the job is over is for the caller to know.
        ``attempts`` are facts about earlier tries, for the callback's metadata; ``queue`` and ``asked_at``, when it
        was asked for a job by the monotonic clock, are for observers.
        """
        started = time.monotonic()
        walk = _Walk(
            attempt=attempt,
            attempts=attempts or {},
            watch=watch or Watch(),
            queue=queue,
            asked_at=started if asked_at is None else asked_at,
        )
        try:
            try:
                callback, assets = self._walk(raw, walk)
            except OSError as error:
                raise _of_this_machine(error) from error
        except JobError as error:
            return self._failed(walk, error, time.monotonic() - started)
        except Exception as error:
            logger.exception("job %s failed in the worker itself", walk.job_id)
            return self._failed(
                walk, InternalError(f"the worker failed: {type(error).__name__}: {error}"), time.monotonic() - started
            )
        assert walk.job is not None
        return Outcome(
            callback=callback,
            job_id=walk.job.id,
            job_type=walk.job.job_type,
            job=walk.job,
            assets=assets,
            seconds=time.monotonic() - started,
        )

    def _walk(self, raw: bytes, walk: _Walk) -> tuple[Callback, tuple[Asset, ...]]:
        message = decode_message(raw)
        walk.job_id = job_id_of(message)
        job_type = message.get("type")
        # Other text is shown in the error, shortened, and kept out of the metadata and the logs.
        walk.job_type = job_type if isinstance(job_type, str) and NAME_PATTERN.fullmatch(job_type) else None
        owned, job = self._parse(message)
        walk.job = job
        set_job_type(job.job_type)
        owned.review_job(job)
        self._registry.report(
            events.JobStarted(
                job_id=job.id,
                job_type=job.job_type,
                attempt=walk.attempt,
                queue=walk.queue,
                waited_seconds=_age_of(job),
                claim_seconds=time.monotonic() - walk.asked_at,
                has_references=job.reference_mode is not ReferenceMode.NONE,
                traceparent=_traceparent_of(message),
            )
        )
        walk.watch.on_job(job)
        with self._workspace.job_directory() as directory:
            walk.job = job = self._fetch_references(job, directory, walk.watch)
            finished = self._generate(owned, job, directory, walk.watch)
            walk.job = finished.job
            self._registry.report(
                events.GenerationFinished(
                    job_id=job.id,
                    job_type=job.job_type,
                    artifacts=len(finished.generation.artifacts),
                    seconds=finished.seconds,
                    expected_seconds=job.expected_seconds or owned.job_type.expected_seconds,
                )
            )
            buckets = self._choose_buckets(owned, finished)
            metadata = completed_metadata(owned, finished, buckets, walk.attempts)
            assets = self._store(owned, finished, buckets, walk.watch)
        return completed_report(finished.job, metadata, assets), assets

    def _parse(self, message: Mapping[str, Any]) -> tuple[OwnedJobType, Job]:
        payload = structure_payload(message)
        owned = self._registry.get(payload.type)
        return owned, owned.parse_job(payload)

    def _fetch_references(self, job: Job, directory: Path, watch: Watch) -> Job:
        started = time.monotonic()
        fetched: dict[str, Reference] = {}
        for role, reference in job.references:
            for attempt in _patiently():
                _stop_if_cancelled(watch)
                with attempt:
                    fetched[role] = self._references.fetch(reference, directory, f"reference_{role}")
        if not fetched:
            return job
        self._registry.report(
            events.ReferencesFetched(
                job_id=job.id, job_type=job.job_type, roles=tuple(fetched), seconds=time.monotonic() - started
            )
        )
        return attrs.evolve(job, references=job.references.replace(fetched))

    def _generate(self, owned: OwnedJobType, job: Job, directory: Path, watch: Watch) -> FinishedGeneration:
        def on_progress(stage: str, step: int, total: int) -> None:
            watch.on_progress(stage, step, total)
            self._registry.report(
                events.GenerationProgressed(job_id=job.id, job_type=job.job_type, stage=stage, step=step, total=total)
            )

        _stop_if_cancelled(watch)
        finished = self._engine.run(
            job,
            work_dir=directory,
            timeout_seconds=self._job_timeouts_seconds.get(job.job_type, owned.job_type.timeout_seconds),
            on_progress=on_progress,
            on_generated=watch.on_generated,
            cancelled=watch.cancelled,
        )
        _refuse_what_is_not_its(finished, job, directory)
        return finished

    def _choose_buckets(self, owned: OwnedJobType, finished: FinishedGeneration) -> list[str]:
        """A bucket for each artifact, all limits checked: a job that cannot end well uploads nothing."""
        artifacts = finished.generation.artifacts
        buckets = [owned.choose_bucket(finished.job, artifact) for artifact in artifacts]
        for artifact, bucket in zip(artifacts, buckets, strict=True):
            self._refuse_above_limit(owned, artifact, bucket)
        return buckets

    def _store(
        self, owned: OwnedJobType, finished: FinishedGeneration, buckets: Sequence[str], watch: Watch
    ) -> tuple[Asset, ...]:
        job = finished.job
        assets = []
        for index, (artifact, bucket) in enumerate(zip(finished.generation.artifacts, buckets, strict=True)):
            started = time.monotonic()
            path = f"{job.user_id}/{job.id}_{index}.{owned.job_type.file_extension}"
            for attempt in _patiently():
                _stop_if_cancelled(watch)
                with attempt:
                    asset = self._storage.store(artifact.path, bucket=bucket, path=path, media_type=artifact.media_type)
            assets.append(asset)
            watch.on_stored(asset)
            self._registry.report(
                events.AssetStored(
                    job_id=job.id,
                    job_type=job.job_type,
                    bucket=bucket,
                    path=path,
                    size_bytes=asset.size_bytes,
                    media_type=asset.media_type,
                    seconds=time.monotonic() - started,
                )
            )
        return tuple(assets)

    def _refuse_above_limit(self, owned: OwnedJobType, artifact: Artifact, bucket: str) -> None:
        limit_mb = self._bucket_limits_mb.get(bucket, owned.job_type.max_asset_mb)
        size_mb = artifact.path.stat().st_size / 1e6
        if size_mb > limit_mb:
            raise AssetRejected(
                f"the result has {size_mb:.2f} MB and bucket {bucket} takes {limit_mb:g} MB;"
                " raise the bucket's limit and OURVIDZ_BUCKET_LIMITS_MB together, or ask for less",
                details={"asset_mb": round(size_mb, 3), "bucket_limit_mb": limit_mb},
            )

    def _failed(self, walk: _Walk, error: JobError, seconds: float) -> Outcome:
        callback = None
        if walk.job_id is not None:
            callback = failed_report(walk.job_id, error, job_type=walk.job_type, job=walk.job, attempts=walk.attempts)
        return Outcome(
            callback=callback,
            job_id=walk.job_id,
            job_type=walk.job_type,
            error=error,
            job=walk.job,
            seconds=seconds,
        )


def _refuse_what_is_not_its(finished: FinishedGeneration, job: Job, directory: Path) -> None:
    """The engine has looked at its files itself; but plugins run there, and what is stored is chosen here."""
    made = finished.job
    if (made.id, made.user_id, made.job_type) != (job.id, job.user_id, job.job_type):
        raise HookFailed(f"a plugin changed whose job this is: {job.job_type} came back under other ids")
    for artifact in finished.generation.artifacts:
        if not artifact.path.resolve().is_relative_to(directory.resolve()):
            raise ArtifactError(f"{artifact.path.name} does not lie in the job's work directory, and is not stored")


@attrs.define(kw_only=True)
class _Walk:
    """What is known of a job so far, for the report if it fails now."""

    attempt: int
    attempts: Mapping[str, Any]
    watch: Watch
    queue: str
    asked_at: float
    job_id: str | None = None
    job_type: str | None = None
    job: Job | None = None


def _patiently() -> Iterator[contextlib.AbstractContextManager[Any]]:
    """Tries with growing waits, for what a client says may work later."""

    def may_work_later(error: Exception) -> bool:
        return isinstance(error, JobError) and error.is_transient and not isinstance(error, DiskFull)

    return iter(
        stamina.retry_context(on=may_work_later, attempts=_CLIENT_ATTEMPTS, timeout=_CLIENT_SECONDS, wait_max=10.0)
    )


def _age_of(job: Job) -> float | None:
    if job.created_at is None:
        return None
    return max((datetime.now(UTC) - job.created_at).total_seconds(), 0.0)  # a producer's clock may be ahead


def _traceparent_of(message: Mapping[str, Any]) -> str | None:
    """The trace that a producer wants its job to be part of: a field that it may add to any message."""
    traceparent = message.get("traceparent")
    return traceparent if isinstance(traceparent, str) and _TRACEPARENT.fullmatch(traceparent) else None


def _stop_if_cancelled(watch: Watch) -> None:
    if watch.cancelled.is_set():
        raise JobCancelled("the job was cancelled")


def _of_this_machine(error: OSError) -> JobError:
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return DiskFull(f"no room is left on the worker's disk: {error}; free some, or set OURVIDZ_WORK_DIR")
    return InternalError(f"the worker failed: {type(error).__name__}: {error}")
