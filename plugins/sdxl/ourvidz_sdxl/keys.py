"""What an SDXL message may hold, for schemas and ``ourvidz validate``. :mod:`ourvidz_sdxl.config` reads it."""

from __future__ import annotations

from typing import Any

from attrs import field, frozen
from attrs.validators import ge, in_, le, optional

from ourvidz_core.engine.tiers import Tier
from ourvidz_core.wire.keys import ConfigKeys, MetadataKeys
from ourvidz_sdxl.config import (
    IMAGE_COUNTS,
    MAX_GUIDANCE,
    MAX_SIDE,
    MAX_STEPS,
    MAX_STRENGTH,
    MIN_GUIDANCE,
    MIN_SIDE,
    MIN_STRENGTH,
    SIDE_MULTIPLE,
    ReferenceType,
    Solver,
)

_SIDE = optional([ge(MIN_SIDE), le(MAX_SIDE)])
_STRENGTH = optional([ge(MIN_STRENGTH), le(MAX_STRENGTH)])
_MULTIPLE = {"multipleOf": SIDE_MULTIPLE}
_STRENGTH_TEXT = "Higher is closer to the reference"
_TYPE_TEXT = "What of the reference the result shares"
_COUNT_TEXT = "How many images; all of them, or the job fails"


@frozen(kw_only=True)
class SdxlConfigKeys(ConfigKeys):
    """What is read of ``config``."""

    width: int | None = field(
        default=None, validator=_SIDE, metadata={"description": "Pixels", "json_schema": _MULTIPLE}
    )
    height: int | None = field(
        default=None, validator=_SIDE, metadata={"description": "Pixels", "json_schema": _MULTIPLE}
    )
    num_inference_steps: int | None = field(
        default=None, validator=optional([ge(1), le(MAX_STEPS)]), metadata={"description": "Sampling steps"}
    )
    guidance_scale: float | None = field(
        default=None,
        validator=optional([ge(MIN_GUIDANCE), le(MAX_GUIDANCE)]),
        metadata={"description": "Guidance; 1 is none, and then the negative prompt has no effect"},
    )
    sample_solver: Solver | None = field(
        default=None, metadata={"description": "Sampling method; the checkpoint's own unless said"}
    )
    tier: Tier | None = field(
        default=None, metadata={"description": "exact, or fast with fewer steps; without one OURVIDZ_SDXL_TIER counts"}
    )
    num_images: int | None = field(
        default=None, validator=optional(in_(IMAGE_COUNTS)), metadata={"description": _COUNT_TEXT}
    )
    reference_image_url: str | None = field(default=None, metadata={"description": "URL of the reference image"})
    reference_type: ReferenceType | None = field(default=None, metadata={"description": _TYPE_TEXT})
    reference_strength: float | None = field(
        default=None, validator=_STRENGTH, metadata={"description": _STRENGTH_TEXT}
    )
    size: str | None = field(
        default=None,
        metadata={
            "description": "Width and height, as 1024*1024; one of SDXL's sizes. One of WAN's is ignored, and the steps"
            " and the guidance beside it",
            "json_schema": {"pattern": r"^[0-9]{1,5}\*[0-9]{1,5}$"},
        },
    )
    sample_steps: int | None = field(
        default=None, metadata={"description": "15 or 25, like num_inference_steps; others are ignored"}
    )
    sample_guide_scale: float | None = field(
        default=None,
        metadata={
            "description": "6.0 or 7.5, like guidance_scale; others are ignored",
            "json_schema": {"exclusiveMinimum": -1e9, "exclusiveMaximum": 1e9},
        },
    )
    frame_num: Any = field(default=None, metadata={"description": "1; anything else is ignored"})
    enhance_prompt: Any = field(default=None, metadata={"description": "false; anything else is ignored"})


@frozen(kw_only=True)
class SdxlMetadataKeys(MetadataKeys):
    """What is read of ``metadata`` where ``config``, or the message itself, has nothing."""

    num_images: int | None = field(
        default=None, validator=optional(in_(IMAGE_COUNTS)), metadata={"description": _COUNT_TEXT}
    )
    negative_prompt: str | None = field(default=None, metadata={"description": "What shall not be seen"})
    reference_image_url: str | None = field(default=None, metadata={"description": "URL of the reference image"})
    reference_url: str | None = field(
        default=None, metadata={"description": "URL of the reference image, where reference_image_url has none"}
    )
    reference_type: ReferenceType | None = field(default=None, metadata={"description": _TYPE_TEXT})
    reference_strength: float | None = field(
        default=None, validator=_STRENGTH, metadata={"description": _STRENGTH_TEXT}
    )
