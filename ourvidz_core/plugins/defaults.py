"""Core's own answers to the hooks; itself a plugin, asked after the owner."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from typing import Any, TypeVar, cast

import attrs

from ourvidz_core.errors import Fault, HookFailed, PayloadError
from ourvidz_core.plugins.context import JobContext
from ourvidz_core.plugins.hookspecs import hookimpl
from ourvidz_core.wire.artifacts import Generation
from ourvidz_core.wire.commands import Command
from ourvidz_core.wire.job_types import JobType
from ourvidz_core.wire.jobs import Job, References, seed_of
from ourvidz_core.wire.keys import DefaultConfigKeys
from ourvidz_core.wire.payloads import Payload, shown, structure, without_token

Value = TypeVar("Value")


def default_config(job_type: JobType, values: Mapping[str, Any]) -> Any:
    """The type's preset with the fields that ``values`` gives; nulls are absent.

    Keys that the preset does not have are no fault; ``default_job`` records them as ignored.

    :raises PayloadError: a value has the wrong type or the preset's class refuses it.
    """
    cls = type(job_type.preset)
    preset = {field.name: getattr(job_type.preset, field.name) for field in attrs.fields(cls)}
    given = {key: value for key, value in values.items() if key in preset and value is not None}
    structured = structure({**_unstructured(preset), **given}, cls, path="$.config")
    return attrs.evolve(job_type.preset, **{key: getattr(structured, key) for key in given})


def default_job(job_type: JobType, payload: Payload) -> Job:
    """Parse a payload the way a job type with nothing special wants it.

    ``config`` is structured over the preset, a reference is ``config.image`` or
    ``metadata.reference_image_url``, the seed follows :func:`~ourvidz_core.wire.jobs.seed_of`.

    :raises PayloadError: with every fault of the message at once.
    """
    faults: list[Fault] = []
    seed = _read(lambda: seed_of(payload), faults)
    config = _read(lambda: default_config(job_type, payload.config), faults)
    reference_url = _read(lambda: _text_at(payload, "config.image", "metadata.reference_image_url"), faults)
    if faults:
        raise PayloadError.from_faults(faults)
    understood = {*attrs.fields_dict(type(job_type.preset)), *attrs.fields_dict(DefaultConfigKeys)}
    return Job(
        id=payload.id,
        job_type=job_type.name,
        user_id=payload.user_id,
        prompt=payload.prompt,
        negative_prompt=payload.negative_prompt,
        seed=cast(int, seed),
        config=config,
        references=References.choose(single=reference_url),
        model_variant=payload.model_variant,
        created_at=payload.created_at,
        expected_seconds=expected_seconds_of(payload),
        ignored_config={
            key: without_token(value)
            for key, value in payload.config.items()
            if key not in understood and value is not None
        },
    )


def expected_seconds_of(payload: Payload) -> float | None:
    """``config.expected_time`` where it is a number above 0. It is informative, so a wrong one is no fault."""
    value = payload.get("config.expected_time")
    if isinstance(value, int | float) and not isinstance(value, bool) and 0 < value <= sys.float_info.max:
        return float(value)
    return None


class CoreDefaults:
    """Answers for the hooks that an owner leaves out."""

    @hookimpl(trylast=True)
    def parse_job(self, job_type: JobType, payload: Payload) -> Job:
        return default_job(job_type, payload)

    @hookimpl(trylast=True)
    def prepare_job(self, job: Job) -> Job:
        return job

    @hookimpl(trylast=True)
    def generate(self, job: Job, command: Command | None, context: JobContext) -> Generation:
        if command is None:
            raise HookFailed(
                f"the plugin that owns {job.job_type} implements neither build_command nor generate,"
                " so nothing can make this job"
            )
        return Generation(artifacts=context.run(command))


def _read(read: Callable[[], Value], faults: list[Fault]) -> Value | None:
    """What ``read`` answers; where it refuses, its faults join the others."""
    try:
        return read()
    except PayloadError as error:
        faults.extend(error.faults)
        return None


def _text_at(payload: Payload, *paths: str) -> str | None:
    for path in paths:
        value = payload.first(path)
        if value is None:
            continue
        if not isinstance(value, str):
            raise PayloadError.from_faults([Fault(f"$.{path}", "a string", shown(value))])
        return value
    return None


def _unstructured(preset: Mapping[str, Any]) -> Mapping[str, Any]:
    from ourvidz_core.wire.payloads import converter

    return {key: converter.unstructure(value) for key, value in preset.items()}
