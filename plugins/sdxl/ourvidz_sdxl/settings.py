"""What an operator can set of the SDXL plugin: ``OURVIDZ_SDXL_*`` or the table ``[ourvidz.sdxl]``."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import ClassVar

from attrs import frozen, validators
from typed_settings.cls_attrs import option

from ourvidz_core.engine.tiers import Tier


class UnknownVariant(StrEnum):
    """What becomes of a job whose ``model_variant`` is not in ``models``."""

    DEFAULT = "default"
    FAIL = "fail"


@frozen(kw_only=True)
class SdxlSettings:
    """Where the weights lie. Nothing is ever downloaded."""

    SECTION: ClassVar[str] = "sdxl"

    model: Path | None = option(
        default=None,
        help="A .safetensors checkpoint, a directory in the diffusers layout, or the name of an installed model",
    )
    models: dict[str, Path] = option(
        factory=dict,
        help='More models by the model_variant of a message, as JSON: {"lustify_sdxl": "/models/lustify.safetensors"}',
    )
    unknown_variant: UnknownVariant = option(
        default=UnknownVariant.DEFAULT,
        help="A job whose model_variant is not in models runs with model (default) or fails (fail)",
    )
    config_dir: Path | None = option(
        default=None,
        help="Directory of a checkpoint's configuration: the small files of SDXL's diffusers layout, without weights",
    )
    gpus: int = option(
        default=1,
        validator=validators.ge(1),
        help="How many of the GPUs that a worker sees share the images of one job; see the guide on several GPUs",
    )
    tier: Tier = option(
        default=Tier.EXACT,
        help="exact: every step; fast: half of them, sooner and nearly the same; a job's own config.tier counts",
    )
    ip_adapter_style: Path | None = option(
        default=None, help="IP-Adapter weights for style references (.safetensors); without them img2img is used"
    )
    ip_adapter_face: Path | None = option(
        default=None,
        help="IP-Adapter face weights for character references (.safetensors); without them img2img is used",
    )
    ip_adapter_image_encoder: Path | None = option(
        default=None, help="Directory of the CLIP vision model that the IP-Adapters were trained with"
    )
    controlnet: Path | None = option(
        default=None,
        help="Directory of a canny or union ControlNet for composition references; without it img2img is used",
    )
