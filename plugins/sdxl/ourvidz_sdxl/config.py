"""Decide what a message means to SDXL. Pure, and strict about what it may say.

The producer copies the configuration of WAN jobs into SDXL jobs, so a ``size`` of WAN's
is the mark of such a block: it is ignored together with the steps and the guidance that
came with it. What is ignored is listed with the job and reported.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from enum import StrEnum
from typing import Any, TypeVar

from attrs import evolve, frozen

from ourvidz_core.engine.tiers import Tier
from ourvidz_core.errors import Fault, PayloadError
from ourvidz_core.plugins.defaults import expected_seconds_of
from ourvidz_core.wire.job_types import JobType
from ourvidz_core.wire.jobs import Job, References, seed_of
from ourvidz_core.wire.payloads import Payload, shown, without_token

#: SDXL was trained on buckets of about 1024 * 1024 pixels; the smallest has 9.8% fewer
#: (704 * 1344), so 12% lets all of them in and the sizes between them.
SDXL_AREA = 1024 * 1024
SDXL_AREA_TOLERANCE = 0.12
#: Its autoencoder works on squares of 8 * 8 pixels.
SIDE_MULTIPLE = 8
MIN_SIDE, MAX_SIDE = 512, 2048
#: The sizes that the WAN library makes. One of them in an SDXL job is a copied block.
WAN_SIZES = frozenset({(480, 832), (832, 480), (720, 1280), (1280, 720)})
#: The steps and guidance of the two presets; ``sample_*`` values beside these are WAN's.
PRESET_STEPS = frozenset({15, 25})
PRESET_GUIDANCE = frozenset({6.0, 7.5})
MAX_STEPS = 100
MIN_GUIDANCE, MAX_GUIDANCE = 1.0, 20.0
IMAGE_COUNTS = (1, 3, 6)
MIN_STRENGTH, MAX_STRENGTH = 0.1, 1.0

_SIZE = re.compile(r"(\d{1,5})\*(\d{1,5})")
#: Keys of ``config`` that are read elsewhere or only inform.
_READ_ELSEWHERE = frozenset({"seed", "expected_time", "reference_image_url"})
#: What these say is already so, and anything else cannot be done.
_ALREADY_SO: Mapping[str, Any] = {
    "content_type": "image",
    "file_extension": "png",
    "frame_num": 1,
    "enhance_prompt": False,
}


class Solver(StrEnum):
    """The sampling method, in the words of the wire."""

    UNIPC = "unipc"
    DPM = "dpm++"


class ReferenceType(StrEnum):
    """What of a reference image the result shall share."""

    STYLE = "style"
    COMPOSITION = "composition"
    CHARACTER = "character"


class NegativePromptSource(StrEnum):
    """Where the negative prompt comes from."""

    JOB = "job"
    METADATA = "metadata"
    GENERATED = "generated"


@frozen(kw_only=True)
class SdxlConfig:
    """What one SDXL job runs with. ``width`` and ``height`` are those of a production model."""

    width: int = 1024
    height: int = 1024
    num_inference_steps: int
    #: 1 means without guidance, and so without the negative prompt.
    guidance_scale: float
    #: None leaves the scheduler that the checkpoint was made with.
    sample_solver: Solver | None = None
    #: None is the setting's.
    tier: Tier | None = None
    num_images: int = 1
    reference_type: ReferenceType = ReferenceType.STYLE
    #: Higher is closer to the reference.
    reference_strength: float = 0.5
    negative_prompt_source: NegativePromptSource = NegativePromptSource.GENERATED


def sdxl_job(job_type: JobType, payload: Payload) -> Job:
    """Turn a payload into an SDXL job.

    :raises PayloadError: with every fault of the message at once.
    """
    reading = _Reading(payload)
    seed = reading.guarded(lambda: seed_of(payload), default=0)
    if not payload.prompt.strip():
        reading.fault("prompt", "a text that says what to show", payload.prompt)
    config = _config(reading, job_type.preset)
    negative_prompt, source = _negative_prompt(reading)
    reference_url = reading.first(
        "config.reference_image_url", "metadata.reference_image_url", "metadata.reference_url", check=_text
    )
    reading.raise_faults()
    return Job(
        id=payload.id,
        job_type=job_type.name,
        user_id=payload.user_id,
        prompt=payload.prompt,
        negative_prompt=negative_prompt,
        seed=seed,
        config=evolve(config, negative_prompt_source=source),
        references=References.choose(single=reference_url),
        asset_count=config.num_images,
        model_variant=payload.model_variant,
        created_at=payload.created_at,
        expected_seconds=expected_seconds_of(payload),
        ignored_config=_ignored(payload.config, config),
        facts=_bucket_facts(job_type, payload),
    )


def _config(reading: _Reading, preset: SdxlConfig) -> SdxlConfig:
    size = reading.first("config.size", check=_size)
    steps = reading.first("config.sample_steps", check=_integer)
    guidance = reading.first("config.sample_guide_scale", check=_number)
    if size in WAN_SIZES:
        size = steps = guidance = None
    if steps not in PRESET_STEPS:
        steps = None
    if guidance not in PRESET_GUIDANCE:
        guidance = None
    width, height = size or (preset.width, preset.height)
    explicit = {
        "width": reading.first("config.width", check=_side),
        "height": reading.first("config.height", check=_side),
        "num_inference_steps": reading.first("config.num_inference_steps", check=_step_count),
        "guidance_scale": reading.first("config.guidance_scale", check=_guidance),
        "sample_solver": reading.first("config.sample_solver", check=_solver),
        "tier": reading.first("config.tier", check=_tier),
        "num_images": reading.first("config.num_images", "metadata.num_images", check=_image_count),
        "reference_type": reading.first("config.reference_type", "metadata.reference_type", check=_reference_type),
        "reference_strength": reading.first(
            "config.reference_strength", "metadata.reference_strength", check=_strength
        ),
    }
    fitting = {"width": width, "height": height, "num_inference_steps": steps, "guidance_scale": guidance}
    return evolve(preset, **{**_present(fitting), **_present(explicit)})


def _negative_prompt(reading: _Reading) -> tuple[str | None, NegativePromptSource]:
    for path, source in (
        ("negative_prompt", NegativePromptSource.JOB),
        ("metadata.negative_prompt", NegativePromptSource.METADATA),
    ):
        text = reading.first(path, check=_text)
        if text is not None and text.strip():
            return text, source
    return None, NegativePromptSource.GENERATED


def _bucket_facts(job_type: JobType, payload: Payload) -> dict[str, Any]:
    if payload.bucket is None or payload.bucket == job_type.bucket:
        return {}
    return {"requested_bucket": payload.bucket}


def _ignored(asked: Mapping[str, Any], config: SdxlConfig) -> dict[str, Any]:
    """What ``asked`` holds and this job will not do. What happens to be so anyway is not ignored."""
    runs: dict[str, Any] = {
        **_ALREADY_SO,
        "size": f"{config.width}*{config.height}",
        "sample_steps": config.num_inference_steps,
        "sample_guide_scale": config.guidance_scale,
        "width": config.width,
        "height": config.height,
        "num_inference_steps": config.num_inference_steps,
        "guidance_scale": config.guidance_scale,
        "sample_solver": config.sample_solver,
        "tier": config.tier,
        "num_images": config.num_images,
        "reference_type": config.reference_type,
        "reference_strength": config.reference_strength,
    }
    return {
        key: without_token(value)
        for key, value in asked.items()
        if key not in _READ_ELSEWHERE and value is not None and value != "" and value != runs.get(key)
    }


def _present(values: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in values.items() if value is not None}


class _Refused(ValueError):
    """A value is not what its place expects."""

    def __init__(self, expected: str) -> None:
        super().__init__(expected)
        self.expected = expected


Value = TypeVar("Value")


class _Reading:
    """Reads a payload's values and keeps every fault until all are known."""

    def __init__(self, payload: Payload) -> None:
        self._payload = payload
        self._faults: list[Fault] = []

    def first(self, *paths: str, check: Callable[[Any], Value]) -> Value | None:
        """The first of ``paths`` that holds a value, checked; None where none does or it is refused."""
        for path in paths:
            value = self._payload.first(path)
            if value is None:
                continue
            try:
                return check(value)
            except _Refused as refused:
                self.fault(path, refused.expected, value)
                return None
        return None

    def guarded(self, read: Callable[[], Value], *, default: Value) -> Value:
        """What ``read`` returns; its faults join the others."""
        try:
            return read()
        except PayloadError as error:
            self._faults.extend(error.faults)
            return default

    def fault(self, path: str, expected: str, value: object) -> None:
        self._faults.append(Fault(f"$.{path}", expected, shown(value)))

    def raise_faults(self) -> None:
        if self._faults:
            raise PayloadError.from_faults(self._faults)


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise _Refused("a string")
    return value


def _integer(value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, int):
        raise _Refused("an integer")
    return value


def _number(value: Any, expected: str = "a number") -> float:
    # JSON's 1e999 is infinite to Python, and no callback could repeat it.
    if isinstance(value, bool) or not isinstance(value, int | float) or not abs(value) < 1e9:
        raise _Refused(expected)
    return float(value)


def _integer_within(value: Any, low: int, high: int, expected: str) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
        raise _Refused(expected)
    return value


def _number_within(value: Any, low: float, high: float, expected: str) -> float:
    number = _number(value, expected)
    if not low <= number <= high:
        raise _Refused(expected)
    return number


def _size(value: Any) -> tuple[int, int]:
    match = _SIZE.fullmatch(value) if isinstance(value, str) else None
    if match is None:
        raise _Refused('a size as "width*height", such as "1024*1024"')
    width, height = int(match[1]), int(match[2])
    if (width, height) not in WAN_SIZES and not fits_sdxl(width, height):
        raise _Refused(
            f"a size that SDXL can make (sides multiples of {SIDE_MULTIPLE} from {MIN_SIDE} to {MAX_SIDE},"
            f" {SDXL_AREA_TOLERANCE:.0%} more or fewer pixels than 1024*1024 at most), or one of WAN's"
        )
    return width, height


def fits_sdxl(width: int, height: int) -> bool:
    """Whether a size is one that SDXL was trained for, or close to one."""
    sides_fit = all(side % SIDE_MULTIPLE == 0 and MIN_SIDE <= side <= MAX_SIDE for side in (width, height))
    return sides_fit and abs(width * height - SDXL_AREA) <= SDXL_AREA_TOLERANCE * SDXL_AREA


def _side(value: Any) -> int:
    expected = f"a multiple of {SIDE_MULTIPLE} from {MIN_SIDE} to {MAX_SIDE}"
    side = _integer_within(value, MIN_SIDE, MAX_SIDE, expected)
    if side % SIDE_MULTIPLE:
        raise _Refused(expected)
    return side


def _step_count(value: Any) -> int:
    return _integer_within(value, 1, MAX_STEPS, f"an integer from 1 to {MAX_STEPS}")


def _guidance(value: Any) -> float:
    return _number_within(value, MIN_GUIDANCE, MAX_GUIDANCE, f"a number from {MIN_GUIDANCE:g} to {MAX_GUIDANCE:g}")


def _solver(value: Any) -> Solver:
    return _member(Solver, value)


def _tier(value: Any) -> Tier:
    return _member(Tier, value)


def _image_count(value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or value not in IMAGE_COUNTS:
        raise _Refused("1, 3 or 6")
    return value


def _reference_type(value: Any) -> ReferenceType:
    return _member(ReferenceType, value)


def _strength(value: Any) -> float:
    return _number_within(value, MIN_STRENGTH, MAX_STRENGTH, f"a number from {MIN_STRENGTH} to {MAX_STRENGTH}")


Member = TypeVar("Member", bound=StrEnum)


def _member(cls: type[Member], value: Any) -> Member:
    try:
        return cls(value)
    except (ValueError, TypeError):
        raise _Refused("one of " + ", ".join(member.value for member in cls)) from None
