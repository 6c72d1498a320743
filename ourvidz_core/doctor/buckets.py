"""What the doctor asks of storage: whether each bucket is there, takes what jobs make, and gives it back."""

from __future__ import annotations

import tempfile
import uuid
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from ourvidz_core.delivery.storage import BucketFacts, DirectoryStorage, InspectableStorage, Storage
from ourvidz_core.errors import DiskFull, StorageError
from ourvidz_core.wire.findings import Check, Finding
from ourvidz_core.wire.job_types import JobType

#: The first segment of a path is an owner; this one is nobody.
PROBE_OWNER = "ourvidz-doctor"
_PROBE = b"Written by ourvidz doctor, which removes it at once. It may be deleted.\n"
_MEGABYTE = 1e6


def storage_checks(
    storage: Storage,
    job_types: Sequence[JobType],
    *,
    limits_mb: Mapping[str, float],
    is_probed: bool,
) -> list[Check]:
    """A check for each bucket of ``job_types``.

    ``limits_mb`` are the limits that the settings say of buckets. With ``is_probed`` an object is
    written to each bucket and removed again; without it the bucket is only looked at.
    """

    def check_of(bucket: str, types: Sequence[JobType]) -> Check:
        return Check(
            name=f"storage {bucket}",
            run=lambda: _look_at_bucket(storage, bucket, types, limits_mb, is_probed=is_probed),
            is_at_start=not is_probed,
            timeout_seconds=30.0 if is_probed else 10.0,
        )

    buckets: dict[str, list[JobType]] = {}
    for job_type in job_types:
        buckets.setdefault(job_type.bucket, []).append(job_type)
    return [check_of(bucket, types) for bucket, types in sorted(buckets.items())]


def _look_at_bucket(
    storage: Storage,
    bucket: str,
    job_types: Sequence[JobType],
    limits_mb: Mapping[str, float],
    *,
    is_probed: bool,
) -> Iterator[Finding]:
    facts: BucketFacts | None = BucketFacts()
    if isinstance(storage, InspectableStorage):  # one that a plugin provides may only store
        try:
            facts = storage.look_at(bucket)
        except StorageError as error:
            if error.is_transient or isinstance(storage, DirectoryStorage):
                yield _trouble(storage, error, job_types)
                return
            facts = None
    if facts is None:
        # A key that may write to a bucket need not be one that may look at it, so only a write tells.
        yield from _probe(storage, bucket, job_types)
        return
    for job_type in job_types:
        largest_mb = limits_mb.get(bucket, job_type.max_asset_mb)
        if facts.size_limit_bytes is not None and facts.size_limit_bytes < int(largest_mb * _MEGABYTE):
            limit_mb = facts.size_limit_bytes / _MEGABYTE
            yield Finding.yellow(
                f"the bucket takes files of {limit_mb:g} MB and {job_type.name} may make {largest_mb:g} MB",
                cure="raise the bucket's file size limit, or say it in OURVIDZ_BUCKET_LIMITS_MB:"
                f' {{"{bucket}": {limit_mb:g}}}',
            )
        if facts.media_types is not None and not _takes(facts.media_types, job_type.media_type):
            yield Finding.red(
                f"the bucket takes {', '.join(facts.media_types)} and {job_type.name} makes {job_type.media_type}",
                cure=f"add {job_type.media_type} to the bucket's allowed MIME types",
                job_types=_names(job_types),
            )
            return
    if not is_probed:
        yield Finding.green(f"{bucket} is there")
        return
    yield from _probe(storage, bucket, job_types)


def _probe(storage: Storage, bucket: str, job_types: Sequence[JobType]) -> Iterator[Finding]:
    is_removable = isinstance(storage, InspectableStorage)
    path = f"{PROBE_OWNER}/probe{f'-{uuid.uuid4().hex}' if is_removable else ''}"
    with tempfile.TemporaryDirectory(prefix="ourvidz-doctor-") as directory:
        file = Path(directory) / "probe"
        file.write_bytes(_PROBE)
        try:
            storage.store(file, bucket=bucket, path=path, media_type=job_types[0].media_type)
        except StorageError as error:
            yield _trouble(storage, error, job_types)
            return
    if not isinstance(storage, InspectableStorage):
        yield Finding.green(f"a probe was written and read; this storage removes nothing, so {bucket}/{path} stays")
        return
    try:
        storage.remove(bucket, path)
    except StorageError as error:
        yield Finding.yellow(
            f"a probe was stored and cannot be removed: {error}", cure=f"delete {bucket}/{path} by hand"
        )
        return
    yield Finding.green(f"a probe was written to {bucket}, read and removed")


def _trouble(storage: Storage, error: StorageError, job_types: Sequence[JobType]) -> Finding:
    if isinstance(error, DiskFull):
        return Finding.red(error.message, cure="free some space there, or let assets go elsewhere: OURVIDZ_STORAGE_DIR")
    if isinstance(storage, DirectoryStorage):
        return Finding.red(
            error.message,
            cure=f"let this user write to {storage.root} (chown, chmod, mount), or name another OURVIDZ_STORAGE_DIR",
            forbids_start=True,
        )
    if error.is_transient:  # a job is tried again, and by then storage may be back
        return Finding.red(error.message, cure="see that SUPABASE_URL is right, and reached from this machine")
    return Finding.red(
        error.message,
        cure="create the bucket, or put the project's address into SUPABASE_URL and its service key into"
        " SUPABASE_SERVICE_KEY",
        job_types=_names(job_types),
    )


def _takes(allowed: Sequence[str], media_type: str) -> bool:
    kind = media_type.partition("/")[0]
    return any(item in (media_type, f"{kind}/*", "*/*") for item in allowed)


def _names(job_types: Sequence[JobType]) -> list[str]:
    return [job_type.name for job_type in job_types]
