"""Run a checked command line on loaded models: fit the references, sample, decode."""

from __future__ import annotations

import hashlib
import logging
import math
from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterator, Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import Any, TypeVar

import attrs
import numpy as np
import torch
from attrs import field, frozen
from PIL import Image, ImageOps

from ourvidz_core.engine.pacing import StepPacer
from ourvidz_core.engine.tiers import Tier
from ourvidz_core.errors import GenerationError, ReferenceInvalid
from ourvidz_core.plugins.residency import Work
from ourvidz_wan.acceleration import attending_in_fp8
from ourvidz_wan.arguments import GenerateArguments
from ourvidz_wan.attention import Kernel, may_attend_in_fp8
from ourvidz_wan.checkpoints import WanModels, make_scheduler
from ourvidz_wan.conditioning import (
    ConditionedScheduler,
    FrameConditioner,
    image_start_sigma,
    noised,
    pinned,
    resembling,
)
from ourvidz_wan.config import FRAMES_PER_LATENT, PATCH_PIXELS, as_size, frames_of, scaled_size
from ourvidz_wan.decoding import Arriving, Frames, latent_statistics
from ourvidz_wan.denoising import denoise
from ourvidz_wan.prediction import LAUNCH_BOUND_TOKENS, LocalPredictor
from ourvidz_wan.tasks import Pipeline
from ourvidz_wan.tiers import steps_taken
from ourvidz_wan.video import read_video

logger = logging.getLogger(__name__)

#: Called with the step that is done and the number of steps; may raise to stop.
OnProgress = Callable[[int, int], None]
#: Encoding an 81-frame still takes a noticeable part of a second, and users try one picture often.
CACHED_STILLS = 8
#: WAN was trained with texts of this length; shorter ones are filled up.
TEXT_TOKENS = 512
#: Each takes 4 MB in bfloat16. One is the negative prompt, which is nearly always the same.
CACHED_TEXTS = 32
_GREY = (128, 128, 128)

Key = TypeVar("Key", bound=Hashable)


@frozen(kw_only=True, eq=False)
class Latents:
    """What one run denoised, and what is true of how it was made."""

    #: Normalised, ``[1, channels, frames, height, width]``.
    latents: torch.Tensor = field(repr=False)
    #: Width and height of the frames.
    size: tuple[int, int]
    fps: int
    facts: Mapping[str, Any]


@frozen(kw_only=True, eq=False)
class Sample(Latents):
    """The frames of one run with the latents that they were decoded from."""

    #: ``[frames, height, width, 3]``
    frames: Frames = field(repr=False)


@frozen(kw_only=True)
class _Plan:
    """How the references of a text-to-video run are met."""

    method: str | None = None
    conditioner: FrameConditioner | None = None
    start_sigma: float | None = None
    #: Clean latents to start from, where the start is not pure noise.
    clean: torch.Tensor | None = None
    strength: float | None = None


def sample(arguments: GenerateArguments, models: WanModels, on_progress: OnProgress) -> Sample:
    """Make what ``arguments`` ask for. The same arguments and weights make the same frames.

    :raises ReferenceInvalid: a reference video does not fit.
    :raises GenerationError: the model's output is no number.
    """
    made = make_latents(arguments, models, on_progress)
    frames = decode(models, made.latents)
    return Sample(frames=frames, latents=made.latents, size=made.size, fps=made.fps, facts=made.facts)


def make_latents(arguments: GenerateArguments, models: WanModels, on_progress: OnProgress) -> Latents:
    """What :func:`sample` decodes; on a GPU the last steps may still be under way.

    :raises ReferenceInvalid: a reference video does not fit.
    """
    with torch.no_grad():
        return _make_latents(arguments, models, on_progress)


def fit_image(path: Path, size: tuple[int, int]) -> Image.Image:
    """A reference picture at exactly ``size``: the largest centred part of that shape, never letterboxed."""
    with Image.open(path) as image:
        upright = ImageOps.exif_transpose(image).convert("RGB")
    return ImageOps.fit(upright, size, Image.Resampling.LANCZOS)


def encode_still(models: WanModels, image: Image.Image, frames: int) -> torch.Tensor:
    """The normalised latents of ``frames`` frames that all show ``image``.

    The VAE is causal: the first latent frame is that of the picture alone, each later one
    stands for four frames seen after all earlier ones.
    """
    pixels = np.asarray(image)
    # The bytes alone say nothing of the sides: a picture of one colour has the same ones upright and lying.
    key = (hashlib.sha256(pixels.tobytes()).hexdigest(), (frames, *pixels.shape[:2]))

    def encode() -> torch.Tensor:
        vae: Any = models.pipeline.vae
        still = torch.from_numpy(pixels.copy()).to(models.device, torch.float32) / 127.5 - 1.0
        clip = still.permute(2, 0, 1)[None, :, None].expand(-1, -1, frames, -1, -1)
        encoded = models.residence.run(
            lambda: vae.encode(clip.to(vae.dtype)).latent_dist.mode().float(),
            "vae",
            work=Work(name="encode", shape=clip.shape[2:]),
        )
        mean, std = latent_statistics(vae, models.device)
        normalised: torch.Tensor = (encoded - mean) / std
        return normalised

    return _remembered(models.stills, key, encode, CACHED_STILLS)


def encode_text(models: WanModels, text: str) -> torch.Tensor:
    """What the transformer reads of ``text``, ``[1, tokens, channels]``."""

    def encode() -> torch.Tensor:
        embeddings: torch.Tensor = models.pipeline.encode_prompt(
            text, do_classifier_free_guidance=False, max_sequence_length=TEXT_TOKENS, device=models.device
        )[0]
        return embeddings

    work = Work(name="encode_text")
    return _remembered(
        models.texts, text, lambda: models.residence.run(encode, "text_encoder", work=work), CACHED_TEXTS
    )


def decode(models: WanModels, latents: torch.Tensor) -> Frames:
    """The frames of normalised ``latents``, ``[frames, height, width, 3]``; see :func:`decoded`."""
    return np.concatenate(list(decoded(models, latents)))


@torch.no_grad()  # type: ignore[untyped-decorator]
def decoded(models: WanModels, latents: torch.Tensor) -> Iterator[Frames]:
    """The same frames in parts, as they come; the device works on the next parts meanwhile.

    :raises GenerationError: the latents are no numbers.
    """
    # Asked at once, it would let the device run dry.
    is_finite = Arriving(torch.isfinite(latents).all())
    try:
        work = Work(name="decode", shape=latents.shape[2:])
        for frames in models.residence.stream(lambda: models.decoder.chunks(latents), "vae", work=work):
            if not is_finite.wait():
                raise GenerationError(
                    f"{models.name} produced values that are no numbers; try another seed or guidance scale"
                )
            yield frames
    finally:
        # Where models are offloaded, the VAE leaves the device; elsewhere this does nothing.
        models.pipeline.maybe_free_model_hooks()


def _make_latents(arguments: GenerateArguments, models: WanModels, on_progress: OnProgress) -> Latents:
    width, height = scaled_size(arguments.size, models.variant.size_scale)
    # One frame cannot lead from one picture to another.
    is_end_ignored = arguments.frame_num == 1 and bool(arguments.first_frame and arguments.last_frame)
    if is_end_ignored:
        arguments = attrs.evolve(arguments, last_frame=None)
    asked_guidance = arguments.sample_guide_scale
    arguments = attrs.evolve(arguments, sample_guide_scale=models.variant.guided(asked_guidance))
    runs = {Pipeline.TEXT: _run_text, Pipeline.IMAGE: _run_image, Pipeline.VACE: _run_vace}
    in_fp8 = arguments.fp8_attention and _may_attend_in_fp8(arguments, models, (width, height))
    with attending_in_fp8(models.pipeline.transformer) if in_fp8 else nullcontext():
        latents, method, strength = runs[arguments.task.pipeline](arguments, models, (width, height), on_progress)
    facts = {
        "wan_task": arguments.task.name,
        "model": models.name,
        "size": as_size(width, height),
        "requested_size": arguments.size,
        "frame_num": arguments.frame_num,
        "solver": arguments.sample_solver.value,
        "steps": arguments.sample_steps,
        "tier": arguments.tier.value,
        "guidance_scale": arguments.sample_guide_scale,
        "shift": arguments.sample_shift,
        "reference_applied": method is not None,
    }
    if arguments.sample_guide_scale != asked_guidance:
        facts["requested_guidance_scale"] = asked_guidance
    if arguments.tier is not Tier.EXACT:
        facts["steps_computed"] = _steps_computed(arguments)
    if arguments.frame_num > 1:
        facts["fps"] = models.variant.fps
    if method is not None:
        facts["reference_method"] = method
    if strength is not None:
        facts["reference_strength"] = strength
    if arguments.sample_guide_scale > 1:  # without guidance no negative prompt counts
        facts["negative_prompt_source"] = "model" if arguments.negative_prompt is None else "job"
    if is_end_ignored:
        facts["references_ignored"] = ["end"]
    if models.acceleration is not None:
        facts |= models.acceleration.facts
    facts |= models.predictor.facts
    if in_fp8:
        facts["attention"] = Kernel.FLASH_3_FP8.value
    facts |= models.decoder.facts
    return Latents(latents=latents, size=(width, height), fps=models.variant.fps, facts=facts)


def _may_attend_in_fp8(arguments: GenerateArguments, models: WanModels, size: tuple[int, int]) -> bool:
    """Whether this run gains from fp8 and its device has it. Other GPUs that predict as well do not hear of it."""
    width, height = size
    frames = (arguments.frame_num - 1) // FRAMES_PER_LATENT + 1
    if math.prod((frames, width // PATCH_PIXELS, height // PATCH_PIXELS)) <= LAUNCH_BOUND_TOKENS:
        return False
    is_possible = (
        models.acceleration is not None
        and isinstance(models.predictor, LocalPredictor)
        and may_attend_in_fp8(models.device, models.acceleration.kernel)
    )
    if not is_possible:
        logger.warning(
            "fp8 attention was asked for and is not used: it needs one GPU of Hopper's kind, FlashAttention 3"
        )
    return is_possible


def _run_text(
    arguments: GenerateArguments, models: WanModels, size: tuple[int, int], on_progress: OnProgress
) -> tuple[torch.Tensor, str | None, float | None]:
    plan = _plan(arguments, models, size)
    noise = _noise(arguments, models, size)
    if plan.clean is not None and plan.start_sigma is not None:
        noise = noised(plan.clean, noise, plan.start_sigma)
    dtype: torch.dtype = models.pipeline.transformer.dtype
    branches = [{"encoder_hidden_states": text.to(dtype)} for text in _texts(arguments, models).values()]
    steps = _steps_computed(arguments)

    def denoised() -> torch.Tensor:
        scheduler = make_scheduler(arguments.sample_solver, arguments.sample_shift, arguments.tier)
        if plan.method is not None:
            scheduler = ConditionedScheduler(scheduler, conditioner=plan.conditioner, start_sigma=plan.start_sigma)
        return denoise(
            noise,
            scheduler=scheduler,
            steps=arguments.sample_steps,
            predictor=models.predictor,
            branches=branches,
            guidance_scale=arguments.sample_guide_scale,
            dtype=dtype,
            on_step=lambda step: on_progress(step, steps),
        )

    work = _denoising(arguments, size, rows=len(branches))
    latents = models.residence.run(denoised, "transformer", work=work)
    # Where models are offloaded, the transformer leaves the device; elsewhere this does nothing.
    models.pipeline.maybe_free_model_hooks()
    return latents, plan.method, plan.strength


def _plan(arguments: GenerateArguments, models: WanModels, size: tuple[int, int]) -> _Plan:
    def still(path: Path, frames: int) -> torch.Tensor:
        return encode_still(models, fit_image(path, size), frames)

    frames, strength = arguments.frame_num, arguments.reference_strength
    start, end = arguments.first_frame, arguments.last_frame
    # Whatever the reference stands for, one frame is made from it.
    single = arguments.image or ((start or end) if frames == 1 else None)
    if single is not None and frames == 1:
        return _Plan(
            method="image_to_image",
            clean=still(single, 1),
            start_sigma=image_start_sigma(strength),
            strength=strength,
        )
    if single is not None:
        return _Plan(
            method="resembling_first_frame", conditioner=resembling(still(single, 1), strength), strength=strength
        )
    if start is not None or end is not None:
        return _Plan(
            method="pinned_frames",
            conditioner=pinned(
                start=None if start is None else still(start, 1),
                end=None if end is None else still(end, frames)[:, :, -1:],
            ),
        )
    return _Plan()


def _run_image(
    arguments: GenerateArguments, models: WanModels, size: tuple[int, int], on_progress: OnProgress
) -> tuple[torch.Tensor, str | None, float | None]:
    first = arguments.image or arguments.first_frame
    if first is None:
        raise ReferenceInvalid(f"{arguments.task.name} needs a first frame")
    pictures = {"image": fit_image(first, size)}
    if arguments.last_frame is not None:
        pictures["last_image"] = fit_image(arguments.last_frame, size)
    return _call(arguments, models, size, on_progress, **pictures), "image_to_video_weights", None


def _run_vace(
    arguments: GenerateArguments, models: WanModels, size: tuple[int, int], on_progress: OnProgress
) -> tuple[torch.Tensor, str | None, float | None]:
    frames = arguments.frame_num
    video = [Image.new("RGB", size, _GREY)] * frames
    # White is generated, black is kept.
    mask = [Image.new("RGB", size, "white")] * frames
    if arguments.src_video is not None:
        video = _fit_video(arguments.src_video, frames, size)
    if arguments.src_mask is not None:
        mask = _fit_video(arguments.src_mask, frames, size)
    first = arguments.image or arguments.first_frame
    for place, path in ((0, first), (frames - 1, arguments.last_frame)):
        if path is not None:
            video[place] = fit_image(path, size)
            mask[place] = Image.new("RGB", size, "black")
    references = [fit_image(path, size) for path in arguments.src_ref_images]
    strength = arguments.reference_strength if arguments.image is not None else None
    latents = _call(
        arguments,
        models,
        size,
        on_progress,
        video=video,
        mask=mask,
        reference_images=references or None,
        conditioning_scale=1.0 if strength is None else strength,
    )
    is_conditioned = bool(first or arguments.last_frame or arguments.src_video or references)
    # The reference pictures' own latents stand before the video's.
    return latents[:, :, len(references) :], "vace" if is_conditioned else None, strength


def _call(
    arguments: GenerateArguments,
    models: WanModels,
    size: tuple[int, int],
    on_progress: OnProgress,
    **options: Any,
) -> torch.Tensor:
    """Run the diffusers pipeline up to the latents."""
    pacer = StepPacer(str(models.device))
    steps = _steps_computed(arguments)
    width, height = size
    texts = _texts(arguments, models)

    def step_ended(_pipeline: Any, step: int, _timestep: Any, _tensors: dict[str, Any]) -> dict[str, Any]:
        pacer.step()
        on_progress(step + 1, steps)
        return {}

    def denoised() -> torch.Tensor:
        models.pipeline.scheduler = make_scheduler(arguments.sample_solver, arguments.sample_shift, arguments.tier)
        latents: torch.Tensor = models.pipeline(
            **texts,
            generator=_generator(arguments),
            width=width,
            height=height,
            num_frames=arguments.frame_num,
            num_inference_steps=arguments.sample_steps,
            guidance_scale=arguments.sample_guide_scale,
            output_type="latent",
            return_dict=False,
            callback_on_step_end=step_ended,
            **options,
        )[0]
        return latents

    parts = [name for name in models.parts if name != "text_encoder"]
    return models.residence.run(denoised, *parts, work=_denoising(arguments, size, rows=len(texts)))


def _denoising(arguments: GenerateArguments, size: tuple[int, int], *, rows: int) -> Work:
    width, height = size
    return Work(name="denoise", shape=(arguments.frame_num, height, width), rows=rows)


def _steps_computed(arguments: GenerateArguments) -> int:
    return len(steps_taken(arguments.tier, arguments.sample_steps))


def _texts(arguments: GenerateArguments, models: WanModels) -> dict[str, torch.Tensor]:
    """What the transformer reads of the prompt, and after it of the negative prompt, by the pipelines' names."""
    texts = {"prompt_embeds": encode_text(models, arguments.prompt)}
    if arguments.sample_guide_scale > 1:  # without guidance nothing reads it
        negative_prompt = arguments.negative_prompt
        if negative_prompt is None:
            negative_prompt = models.variant.negative_prompt
        texts["negative_prompt_embeds"] = encode_text(models, negative_prompt)
    return texts


def _remembered(
    kept: OrderedDict[Key, torch.Tensor], key: Key, make: Callable[[], torch.Tensor], limit: int
) -> torch.Tensor:
    if key not in kept:
        kept[key] = make()
        while len(kept) > limit:
            kept.popitem(last=False)
    kept.move_to_end(key)
    return kept[key]


def _generator(arguments: GenerateArguments) -> torch.Generator:
    # On the CPU whatever the device, so that a seed means the same noise everywhere.
    return torch.Generator("cpu").manual_seed(arguments.base_seed)


def _noise(arguments: GenerateArguments, models: WanModels, size: tuple[int, int]) -> torch.Tensor:
    """What a text-to-video run starts from, in float32."""
    pipeline: Any = models.pipeline
    width, height = (side // pipeline.vae_scale_factor_spatial for side in size)
    frames = (arguments.frame_num - 1) // pipeline.vae_scale_factor_temporal + 1
    shape = (1, pipeline.transformer.config.in_channels, frames, height, width)
    return torch.randn(shape, generator=_generator(arguments)).to(models.device)


def _fit_video(path: Path, frames: int, size: tuple[int, int]) -> list[Image.Image]:
    try:
        shown = read_video(path)
    except (OSError, ValueError) as error:
        raise ReferenceInvalid(f"{path.name} is not a readable video: {error}") from error
    if len(shown) < frames:
        raise ReferenceInvalid(
            f"{path.name} has {len(shown)} frames and {frames} are needed; use --frame_num {frames_of(len(shown))}"
        )
    return [ImageOps.fit(Image.fromarray(frame), size, Image.Resampling.LANCZOS) for frame in shown[:frames]]
