"""Turn a payload into a WAN job by the contract's rows for WAN. Pure: no file, no network, no clock."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import attrs
from attrs import frozen

from ourvidz_core.engine.tiers import Tier
from ourvidz_core.errors import Fault, PayloadError
from ourvidz_core.plugins.defaults import expected_seconds_of
from ourvidz_core.wire.job_types import ContentType, JobType
from ourvidz_core.wire.jobs import Job, ReferenceMode, References, seed_of
from ourvidz_core.wire.payloads import Payload, converter, shown, without_token
from ourvidz_wan.config import Solver, WanConfig, frames_of, is_set
from ourvidz_wan.tasks import TASKS

#: The task of every job of the deployed system; references need no other weights.
TASK = "t2v-1.3B"

#: Where each reference is looked for; the first place that holds something counts.
REFERENCE_PATHS: Mapping[str, tuple[str, ...]] = {
    "single": ("config.image", "metadata.reference_image_url"),
    "start": ("config.first_frame", "metadata.start_reference_url"),
    "end": ("config.last_frame", "metadata.end_reference_url"),
}
STRENGTH_PATHS = ("config.reference_strength", "metadata.reference_strength")

#: Keys of ``config`` that say nothing this plugin would have to obey, or that were obeyed elsewhere.
UNDERSTOOD = frozenset(
    {"seed", "expected_time", "content_type", "file_extension"}
    | {path.removeprefix("config.") for paths in REFERENCE_PATHS.values() for path in paths}
    | {field.name for field in attrs.fields(WanConfig)}
)
#: Keys whose only acceptable value is what a WAN job does anyway.
FIXED: Mapping[str, Any] = {"num_images": 1, "task": TASK, "enhance_prompt": False}


@frozen
class Limit:
    """The type and the range of one value of a payload's ``config``."""

    kind: type
    accepts: Callable[[Any], bool]
    expected: str

    def fault_of(self, path: str, value: Any) -> Fault | None:
        """What is wrong with ``value``, if anything is."""
        try:
            typed: Any = converter.structure(value, self.kind)
        except ValueError:
            return Fault(f"$.{path}", self.expected, shown(value))
        return None if self.accepts(typed) else Fault(f"$.{path}", self.expected, shown(value))


LIMITS: Mapping[str, Limit] = {
    "size": Limit(str, lambda size: size in TASKS[TASK].sizes, "one of " + ", ".join(TASKS[TASK].sizes)),
    "sample_steps": Limit(int, lambda steps: 1 <= steps <= 100, "an integer from 1 to 100"),
    "sample_guide_scale": Limit(float, lambda scale: 0 <= scale <= 20, "a number from 0 to 20"),
    "sample_solver": Limit(str, lambda solver: solver in set(Solver), "unipc or dpm++"),
    "sample_shift": Limit(float, lambda shift: 0 < shift <= 20, "a number above 0, at most 20"),
    "tier": Limit(str, lambda tier: tier in set(Tier), "exact or fast"),
}
FRAME_LIMIT = Limit(int, lambda frames: 5 <= frames <= 121, "an integer from 5 to 121")
STRENGTH_LIMIT = Limit(float, lambda strength: 0.1 <= strength <= 1, "a number from 0.1 to 1.0")


def parse_wan_job(job_type: JobType, payload: Payload, *, fixed: Mapping[str, Any] = FIXED) -> Job:
    """A job of any type whose preset is a :class:`WanConfig`.

    ``fixed`` are keys of ``config`` that are ignored, and listed so, unless they hold these values.

    :raises PayloadError: with every fault of the payload at once.
    """
    faults: list[Fault] = []
    references = _references(payload, faults)
    is_video = job_type.content_type is ContentType.VIDEO
    limits = {**LIMITS, **({"frame_num": FRAME_LIMIT} if is_video else {})}
    values = {key: (f"config.{key}", payload.get(f"config.{key}")) for key in limits}
    if references.mode is not ReferenceMode.NONE:
        limits["reference_strength"] = STRENGTH_LIMIT
        values["reference_strength"] = _first_set(payload, STRENGTH_PATHS)
    given: dict[str, Any] = {}
    for key, (path, value) in values.items():
        if not is_set(value):
            continue
        fault = limits[key].fault_of(path, value)
        if fault:
            faults.append(fault)
        else:
            given[key] = converter.structure(value, limits[key].kind)
    seed = 0
    try:
        seed = seed_of(payload)
    except PayloadError as error:
        faults.extend(error.faults)
    if faults:
        raise PayloadError.from_faults(faults)

    config: WanConfig = attrs.evolve(job_type.preset, **given)
    requested = config.frame_num
    return Job(
        id=payload.id,
        job_type=job_type.name,
        user_id=payload.user_id,
        prompt=payload.prompt,
        negative_prompt=payload.negative_prompt,
        seed=seed,
        config=attrs.evolve(config, frame_num=frames_of(requested)),
        references=references,
        model_variant=payload.model_variant,
        created_at=payload.created_at,
        expected_seconds=expected_seconds_of(payload),
        asset_count=1,
        ignored_config=_ignored(payload, references.mode, fixed, is_video=is_video),
        facts={"wan_task": TASK, "requested_frame_num": requested},
    )


def uses_strength(mode: ReferenceMode, *, is_video: bool) -> bool:
    """Whether a reference strength means anything: a start or an end frame of a video is met exactly."""
    return mode is ReferenceMode.SINGLE or (mode is not ReferenceMode.NONE and not is_video)


def _references(payload: Payload, faults: list[Fault]) -> References:
    urls: dict[str, str] = {}
    for role, paths in REFERENCE_PATHS.items():
        path, value = _first_set(payload, paths)
        if isinstance(value, str):
            urls[role] = value
        elif is_set(value):
            faults.append(Fault(f"$.{path}", "a URL", shown(value)))
    return References.choose(**urls)


def _first_set(payload: Payload, paths: tuple[str, ...]) -> tuple[str, Any]:
    for path in paths:
        if is_set(payload.get(path)):
            return path, payload.get(path)
    return paths[0], None


def _ignored(payload: Payload, mode: ReferenceMode, fixed: Mapping[str, Any], *, is_video: bool) -> dict[str, Any]:
    has_strength = uses_strength(mode, is_video=is_video)
    ignored = {}
    for key, value in payload.config.items():
        if not is_set(value):
            continue
        if key in fixed:
            # 1 == True to Python; on the wire true is no number.
            is_obeyed = value == fixed[key] and isinstance(value, bool) == isinstance(fixed[key], bool)
        elif key == "frame_num":
            is_obeyed = is_video or value == 1
        elif key == "reference_strength":
            is_obeyed = has_strength
        elif key == "reference_image_url":
            # SDXL's place for it. The producer sends it to WAN too, beside the one that counts.
            is_obeyed = value == payload.get("metadata.reference_image_url")
        else:
            is_obeyed = key in UNDERSTOOD
        if not is_obeyed:
            ignored[key] = without_token(value)
    if mode is not ReferenceMode.NONE and not has_strength:
        # Wherever it stood. Without any reference the producer's default is nothing that a user asked for.
        _, strength = _first_set(payload, STRENGTH_PATHS)
        ignored |= {"reference_strength": strength} if is_set(strength) else {}
    return ignored
