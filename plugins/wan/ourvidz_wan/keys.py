"""What a WAN message may hold, for schemas and ``ourvidz validate``. :mod:`ourvidz_wan.jobs` reads it."""

from __future__ import annotations

from typing import Any

from attrs import field, frozen
from attrs.validators import ge, gt, in_, le, optional

from ourvidz_core.engine.tiers import Tier
from ourvidz_core.wire.keys import ConfigKeys, MetadataKeys
from ourvidz_wan.config import Solver
from ourvidz_wan.tasks import TASKS

_STRENGTH = optional([ge(0.1), le(1.0)])
_STRENGTH_TEXT = "How much of a single reference the result keeps; higher is closer to it"


@frozen(kw_only=True)
class WanConfigKeys(ConfigKeys):
    """What is read of ``config``."""

    size: str | None = field(
        default=None, validator=optional(in_(TASKS["t2v-1.3B"].sizes)), metadata={"description": "Width and height"}
    )
    sample_steps: int | None = field(
        default=None, validator=optional([ge(1), le(100)]), metadata={"description": "Sampling steps"}
    )
    sample_guide_scale: float | None = field(
        default=None, validator=optional([ge(0), le(20)]), metadata={"description": "Guidance"}
    )
    sample_solver: Solver | None = field(default=None, metadata={"description": "Sampling method"})
    sample_shift: float | None = field(
        default=None, validator=optional([gt(0), le(20)]), metadata={"description": "Shift of the noise schedule"}
    )
    tier: Tier | None = field(
        default=None, metadata={"description": "exact, or fast with fewer steps; without one OURVIDZ_WAN_TIER counts"}
    )
    image: str | None = field(
        default=None, metadata={"description": "URL of a single reference; not used beside a first or last frame"}
    )
    first_frame: str | None = field(default=None, metadata={"description": "URL of the frame to begin with"})
    last_frame: str | None = field(default=None, metadata={"description": "URL of the frame to end with"})
    reference_strength: float | None = field(
        default=None, validator=_STRENGTH, metadata={"description": _STRENGTH_TEXT}
    )
    frame_num: Any = field(default=None, metadata={"description": "1; anything else is ignored"})
    num_images: Any = field(default=None, metadata={"description": "1; anything else is ignored"})
    task: Any = field(default=None, metadata={"description": "t2v-1.3B; anything else is ignored"})
    enhance_prompt: Any = field(default=None, metadata={"description": "false; anything else is ignored"})
    reference_image_url: Any = field(
        default=None, metadata={"description": "SDXL's place for a reference; ignored unless metadata has the same"}
    )


@frozen(kw_only=True)
class WanVideoConfigKeys(WanConfigKeys):
    """What is read of the ``config`` of a video."""

    frame_num: int | None = field(
        default=None,
        validator=optional([ge(5), le(121)]),
        metadata={"description": "Frames, 16 a second; of any number the next lower 4n + 1 is made"},
    )


@frozen(kw_only=True)
class WanMetadataKeys(MetadataKeys):
    """What is read of ``metadata`` where ``config`` has nothing."""

    reference_image_url: str | None = field(default=None, metadata={"description": "URL of a single reference"})
    start_reference_url: str | None = field(default=None, metadata={"description": "URL of the frame to begin with"})
    end_reference_url: str | None = field(default=None, metadata={"description": "URL of the frame to end with"})
    reference_strength: float | None = field(
        default=None, validator=_STRENGTH, metadata={"description": _STRENGTH_TEXT}
    )
