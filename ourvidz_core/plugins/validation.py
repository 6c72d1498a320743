"""Look at a message the way its producer should: everything that is wrong with it, and all that would be ignored.

The worker is lenient where a producer can no longer be asked. Here nothing is passed over:
what a worker would refuse is found by the worker's own reading, and what it would read
otherwise than it was meant is found beside it.
"""

from __future__ import annotations

import contextlib
import difflib
from collections.abc import Iterable, Mapping
from datetime import datetime
from enum import StrEnum
from typing import Any

import attrs
from attrs import frozen
from cattrs.errors import BaseValidationError

from ourvidz_core.errors import Fault, JobError, PayloadError, UnknownJobType
from ourvidz_core.plugins.registry import OwnedJobType, Registry
from ourvidz_core.wire.jobs import Job
from ourvidz_core.wire.payloads import (
    Payload,
    converter,
    decode_message,
    faults_of,
    json_of,
    shown,
    structure_payload,
    without_token,
)
from ourvidz_core.wire.schemas import known_keys

#: Keys of the producer's own that the specification lists and nobody here reads.
PRODUCERS_KEYS = frozenset({"video_id", "image_id", "character_id"})
#: How alike two keys are that may be one mistyped. ``metadata`` is full of the producer's own keys.
_ALIKE = {"": 0.8, "config": 0.8, "metadata": 0.9}


class ProblemKind(StrEnum):
    """What a worker would do with what is wrong."""

    #: The job fails, and nothing is made.
    REFUSED = "refused"
    #: Nobody reads this key.
    UNKNOWN = "unknown"
    #: The key is read, and the job does something else.
    IGNORED = "ignored"
    #: The job does nearly what was asked.
    ADAPTED = "adapted"


@frozen(kw_only=True)
class Problem:
    """One thing that a producer should change."""

    #: Where, such as ``$.config.seed``.
    path: str
    kind: ProblemKind
    what: str
    cure: str


@frozen(kw_only=True)
class Examination:
    """What was found in one message."""

    problems: tuple[Problem, ...] = ()
    job_type: str | None = None
    #: The job, unless a worker would refuse the message.
    job: Job | None = None


def examine(registry: Registry, raw: bytes) -> Examination:
    """Find every problem of one message. Nothing is fetched and nothing runs."""
    try:
        message = decode_message(raw)
    except PayloadError as error:
        return Examination(problems=(_refused(Fault("$", "", ""), error.message),))
    problems = []
    try:
        payload = structure_payload(message)
    except PayloadError as error:
        problems += [_refused(fault) for fault in error.faults]
        # What is right is looked at all the same, so that nobody must come twice.
        payload = structure_payload(_mended(message, error.faults))
    try:
        owned = registry.get(payload.type)
    except UnknownJobType as error:
        if not any(problem.path == "$.type" for problem in problems):
            problems.append(_unknown_type(registry, payload.type, error))
        return Examination(problems=tuple(problems))
    job: Job | None = None
    try:
        job = owned.parse_job(payload)
    except PayloadError as error:
        problems += [_refused(fault) for fault in error.faults] or [_refused(Fault("$", "", ""), error.message)]
    except JobError as error:
        cure = f"this is a fault of {owned.distribution}; tell its authors"
        problems.append(Problem(path="$", kind=ProblemKind.REFUSED, what=error.message, cure=cure))
    is_refused = bool(problems)
    seen = {problem.path for problem in problems}
    for problem in (*_strictly(owned, payload, job), *_naive_moment(message)):
        if problem.path not in seen:
            seen.add(problem.path)
            problems.append(problem)
    return Examination(problems=tuple(problems), job_type=owned.job_type.name, job=None if is_refused else job)


def _mended(message: Mapping[str, Any], faults: Iterable[Fault]) -> dict[str, Any]:
    """``message`` without its faults: a stand-in where something must stand, nothing elsewhere."""
    wrong = {fault.path.removeprefix("$.").partition(".")[0] for fault in faults}
    required = {field.name for field in attrs.fields(Payload) if field.default is attrs.NOTHING}
    kept = {key: value for key, value in message.items() if key not in wrong}
    return {**kept, **dict.fromkeys(required & wrong, "x")}


def _refused(fault: Fault, message: str = "") -> Problem:
    if fault.got:
        what, cure = f"a worker refuses {fault.got}", f"send {fault.expected}"
    else:
        what, cure = message or fault.expected, "change what the message says"
    return Problem(path=fault.path, kind=ProblemKind.REFUSED, what=what, cure=cure)


def _unknown_type(registry: Registry, name: str, error: UnknownJobType) -> Problem:
    names = [job_type.name for job_type in registry.job_types]
    alike = difflib.get_close_matches(name, names, n=1)
    cure = f"did you mean {alike[0]}?" if alike else "install the plugin that owns it, or send a type that there is"
    return Problem(path="$.type", kind=ProblemKind.REFUSED, what=error.message.removeprefix("$.type: "), cure=cure)


def _strictly(owned: OwnedJobType, payload: Payload, job: Job | None) -> Iterable[Problem]:
    """What a worker would take and not do."""
    known = known_keys(owned.job_type)
    places: dict[str, Mapping[str, Any]] = {
        "": payload.extras,
        "config": payload.config,
        "metadata": payload.metadata,
    }
    for place, values in places.items():
        for key, value in values.items():
            if value is None or key in known[place] or (not place and key in PRODUCERS_KEYS):
                continue
            yield from _unknown_key(place, key, known)
    if job is not None:
        yield from _not_obeyed(owned, payload, job)
    yield from _not_as_declared("config", owned.job_type.config_keys, payload.config)
    yield from _not_as_declared("metadata", owned.job_type.metadata_keys, payload.metadata)


def _unknown_key(place: str, key: str, known: Mapping[str, frozenset[str]]) -> Iterable[Problem]:
    cure = _likely_meant(place, key, known)
    # The rest of metadata is what the producer knows besides.
    if cure is None and place == "metadata":
        return
    yield Problem(
        path=_path(place, key),
        kind=ProblemKind.UNKNOWN,
        what="nobody reads this key",
        cure=cure or "leave it out",
    )


def _likely_meant(place: str, key: str, known: Mapping[str, frozenset[str]]) -> str | None:
    plain = {_plain(name): name for name in known[place]}
    alike = [plain[_plain(key)]] if _plain(key) in plain else []
    alike = alike or difflib.get_close_matches(key, sorted(known[place]), n=1, cutoff=_ALIKE[place])
    if alike:
        return f"did you mean {alike[0]}?"
    # The producer copies what it sends into metadata, so that a key is there, too, says nothing.
    elsewhere = [other for other in ("", "config", "metadata") if key in known[other] and place != "metadata"]
    return f"write it as {_path(elsewhere[0], key)}" if elsewhere else None


def _plain(key: str) -> str:
    return "".join(character for character in key.lower() if character.isalnum())


def _not_obeyed(owned: OwnedJobType, payload: Payload, job: Job) -> Iterable[Problem]:
    for key, value in job.ignored_config.items():
        yield Problem(
            path=_path("config", key),
            kind=ProblemKind.IGNORED,
            what=f"the job does not do {shown(value)}",
            cure="leave it out",
        )
    fields = attrs.fields_dict(type(job.config))
    for key, asked in payload.config.items():
        if key not in fields or asked is None or asked == "" or isinstance(getattr(job.config, key), datetime):
            continue
        runs = json_of(getattr(job.config, key))
        if not _says(asked, runs):
            yield _adapted(f"$.config.{key}", asked, runs)
    seed = payload.get("metadata.seed")
    if seed is not None and seed != job.seed:
        yield Problem(
            path="$.metadata.seed",
            kind=ProblemKind.IGNORED,
            what=f"the job has the seed {job.seed}",
            cure="leave it out, or send one seed",
        )
    expected = payload.get("config.expected_time")
    if expected is not None and job.expected_seconds is None:
        yield Problem(
            path="$.config.expected_time",
            kind=ProblemKind.IGNORED,
            what=f"{shown(expected)} is no time to expect",
            cure="send a number of seconds above 0, or leave it out",
        )
    if payload.bucket is not None and payload.bucket != owned.job_type.bucket:
        yield Problem(
            path="$.bucket",
            kind=ProblemKind.IGNORED,
            what=f"results of {owned.job_type.name} do not go to {shown(payload.bucket)}",
            cure=f"send {owned.job_type.bucket}, or leave it out",
        )


def _adapted(path: str, asked: object, runs: object) -> Problem:
    return Problem(
        path=path,
        kind=ProblemKind.ADAPTED,
        what=f"the job would run with {shown(runs)}, not {shown(without_token(asked))}",
        cure=f"send {shown(runs)}",
    )


def _not_as_declared(place: str, keys: type[Any] | None, values: Mapping[str, Any]) -> Iterable[Problem]:
    """Values that the worker does not look at this time, and that are not what their place says."""
    if keys is None:
        return
    given = {key: value for key, value in values.items() if value is not None and value != ""}
    try:
        converter.structure(given, keys)
    except BaseValidationError as error:
        for fault in faults_of(error, path=f"$.{place}"):
            yield Problem(
                path=fault.path,
                kind=ProblemKind.IGNORED,
                what=f"this job does not look at {fault.got}" if fault.got else fault.expected,
                cure=f"send {fault.expected}, or leave it out" if fault.got else "send what it says, or leave it out",
            )


def _says(asked: Any, runs: Any) -> bool:
    """Whether a job that runs with ``runs`` does all of ``asked``. True is no 1 on the wire."""
    if isinstance(asked, dict) and isinstance(runs, dict):
        return all(key in runs and _says(value, runs[key]) for key, value in asked.items())
    if isinstance(asked, list) and isinstance(runs, list):
        return len(asked) == len(runs) and all(map(_says, asked, runs))
    return bool(asked == runs) and isinstance(asked, bool) == isinstance(runs, bool)


def _naive_moment(message: Mapping[str, Any]) -> Iterable[Problem]:
    """A time without an offset, which is a time of day and no moment."""
    written = message.get("created_at")
    with contextlib.suppress(TypeError, ValueError):
        if datetime.fromisoformat(written).tzinfo is None:  # type: ignore[arg-type]
            yield Problem(
                path="$.created_at",
                kind=ProblemKind.ADAPTED,
                what=f"{shown(written)} names no offset and would be read as UTC",
                cure="send it with Z or +00:00 at its end",
            )


def _path(place: str, key: str) -> str:
    return f"$.{place}.{key}" if place else f"$.{key}"
