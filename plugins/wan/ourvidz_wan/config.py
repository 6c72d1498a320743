"""What can be set of a WAN job, of this plugin and of a WAN model. Imports nothing heavy."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Any, ClassVar

from attrs import converters, field, frozen, validators
from typed_settings.cls_attrs import option

from ourvidz_core.engine.tiers import Tier

#: Frames a latent stands for; a video has one frame more than a multiple of it.
FRAMES_PER_LATENT = 4
#: Sides are whole numbers of patches: 8 pixels a latent, 2 latents a patch.
PATCH_PIXELS = 16
#: Frames a second of every WAN 2.1 model.
FPS = 16
#: What producers send where their users did not choose.
DEFAULT_REFERENCE_STRENGTH = 0.85
#: What a video shall not be, for models whose variant.toml does not say it better.
DEFAULT_NEGATIVE_PROMPT = (
    "frozen motion, slideshow, overexposed, washed-out grey picture, blurred detail, compression blocks, captions,"
    " watermark, deformed body, extra limbs, fused fingers, malformed face"
)


class Solver(StrEnum):
    """How the steps from noise to a video are taken, in the words of the wire."""

    UNIPC = "unipc"
    DPM = "dpm++"


class EncoderChoice(StrEnum):
    """What encodes a video."""

    #: x264, on the processor.
    X264 = "libx264"
    #: The card, where it can and does as well; see :mod:`ourvidz_wan.nvenc`.
    AUTO = "auto"


class RunAs(StrEnum):
    """Where a job's command line is executed."""

    ENGINE = "engine"
    SUBPROCESS = "subprocess"


@frozen(kw_only=True)
class WanConfig:
    """The configuration of one WAN job."""

    #: Width and height in pixels, as ``480*832``.
    size: str = "480*832"
    sample_steps: int = 25
    sample_guide_scale: float = 6.5
    sample_solver: Solver = field(default=Solver.UNIPC, converter=Solver)
    sample_shift: float = 5.0
    frame_num: int = 81
    reference_strength: float = DEFAULT_REFERENCE_STRENGTH
    #: None is the setting's.
    tier: Tier | None = field(default=None, converter=converters.optional(Tier))


@frozen(kw_only=True)
class WanVariant:
    """What ``variant.toml`` beside the weights says of a WAN model; the defaults are WAN 2.1's own."""

    #: What the model is called in the facts of a job; its directory's name unless said.
    name: str | None = None
    #: A smaller model makes smaller pictures: sides are multiplied by this and rounded down to whole patches.
    size_scale: float = field(default=1.0, validator=[validators.gt(0), validators.le(1)])
    fps: int = field(default=FPS, validator=validators.gt(0))
    negative_prompt: str = DEFAULT_NEGATIVE_PROMPT
    #: How many times what a guidance scale adds to a prediction without guidance this model needs for the same effect.
    guidance_factor: float = field(default=1.0, validator=validators.gt(0))

    def guided(self, asked: float) -> float:
        """The guidance scale for one that was chosen for WAN's own weights; none stays none."""
        return round(1 + self.guidance_factor * (asked - 1), 3) if asked > 1 else asked


@frozen(kw_only=True)
class WanSettings:
    """Where the weights lie, and how they are run. Nothing is ever downloaded."""

    SECTION: ClassVar[str] = "wan"

    ckpt_dir: Path | None = option(
        default=None,
        help="Directory of the t2v-1.3B weights, in the diffusers or WAN's own layout, or an installed model's name",
    )
    vace_ckpt_dir: Path | None = option(
        default=None, help="Directory of VACE weights; where it is set, videos with references use them"
    )
    vace_task: str = option(
        default="vace-1.3B",
        validator=validators.in_(("vace-1.3B", "vace-14B")),
        help="The task that vace_ckpt_dir holds: vace-1.3B or vace-14B",
    )
    run_as: RunAs = option(
        default=RunAs.ENGINE,
        help="engine: the command line runs in the warm engine; subprocess: as a process of its own",
    )
    script: Path | None = option(
        default=None,
        help="A script with the command line of wan_generate to run instead of ours, always as a subprocess",
    )
    interpreter: str | None = option(
        default=None, help="The Python that subprocesses run with; default: the engine's own"
    )
    pythonpath: str | None = option(default=None, help="Put before the PYTHONPATH of subprocesses")
    hf_home: Path | None = option(
        default=None,
        help="HF_HOME of subprocesses; their TRANSFORMERS_CACHE and HUGGINGFACE_HUB_CACHE follow it",
    )
    cuda_visible_devices: str | None = option(
        default=None, help="CUDA_VISIBLE_DEVICES of subprocesses; default: the engine's own"
    )
    offload_model: bool = option(
        default=False,
        help="Keep models in main memory and move each to the device while it works: slower, for small devices",
    )
    gpus: int = option(
        default=1,
        validator=validators.ge(1),
        help="How many of the GPUs that a worker sees one text-to-video job uses; see the guide on several GPUs",
    )
    tier: Tier = option(
        default=Tier.EXACT,
        help="exact: every step; fast: under half of them, sooner and nearly the same; a job's own config.tier counts",
    )
    fp8_attention: bool = option(
        default=False,
        help="In the fast tier, videos attend in fp8 where the GPU can: sooner again, and less like the exact tier",
    )
    video_encoder: EncoderChoice = option(
        default=EncoderChoice.X264,
        help="libx264: on the processor; auto: by the card's NVENC where it works and does as well, else libx264",
    )
    use_job_negative_prompt: bool = option(
        default=False, help="Give a job's own negative prompt to the model in place of the model's default"
    )


def frames_of(requested: int) -> int:
    """The frames that WAN makes of ``requested``: the next lower 4n + 1.

    >>> frames_of(83)
    81
    """
    return (requested - 1) // FRAMES_PER_LATENT * FRAMES_PER_LATENT + 1


def dimensions_of(size: str) -> tuple[int, int]:
    """Width and height of a size as the command line writes it.

    >>> dimensions_of("480*832")
    (480, 832)
    """
    width, height = size.split("*")
    return int(width), int(height)


def scaled_size(size: str, scale: float) -> tuple[int, int]:
    """Width and height that a model of this scale makes of ``size``, in whole patches."""
    width, height = (
        max(PATCH_PIXELS, int(side * scale) // PATCH_PIXELS * PATCH_PIXELS) for side in dimensions_of(size)
    )
    return width, height


def as_size(width: int, height: int) -> str:
    """The inverse of :func:`dimensions_of`."""
    return f"{width}*{height}"


def is_set(value: Any) -> bool:
    """Whether a payload's value is there: nulls and empty strings are absent."""
    return value is not None and value != ""
