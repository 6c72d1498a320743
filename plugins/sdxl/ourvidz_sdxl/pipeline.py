"""One warm SDXL model: loaded from local files, and asked for batches of images.

Image i of a batch has a generator of its own, so it is the image that its seed makes alone.
"""

from __future__ import annotations

import gc
import logging
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from attrs import frozen
from diffusers import StableDiffusionXLPipeline
from diffusers.utils import logging as diffusers_logging
from PIL.Image import Image
from transformers.utils import logging as transformers_logging

from ourvidz_core.errors import GenerationError, ModelUnavailable, OutOfMemory
from ourvidz_sdxl.config import ReferenceType, Solver
from ourvidz_sdxl.layout import CONFIG_DIR_VARIABLE, CONFIG_IN_WORDS, missing_config
from ourvidz_sdxl.schedulers import scheduler_for
from ourvidz_sdxl.text_encoding import Conditioning, PromptEncoder
from ourvidz_sdxl.variants import SdxlVariant

logger = logging.getLogger(__name__)

#: Latents on the longer side of a sketch: 128 pixels, a 64th of the decoder's work for an image of 1024x1024.
_SKETCH_LATENTS = 16


@frozen(kw_only=True)
class ReferencePicture:
    """A reference image, already of the size of the result, and what it is for."""

    image: Image
    type: ReferenceType
    strength: float


@frozen(kw_only=True)
class ImageRequest:
    """What to draw. One image for each of ``seeds``."""

    prompt: str
    negative_prompt: str
    seeds: tuple[int, ...]
    width: int
    height: int
    num_inference_steps: int
    guidance_scale: float
    solver: Solver | None = None
    reference: ReferencePicture | None = None


@frozen(kw_only=True)
class DrawnImages:
    """The images in the order of their seeds, and how they were made."""

    images: tuple[Image, ...]
    scheduler: str
    #: Sampling steps that really ran for each image.
    steps: int
    batch_sizes: tuple[int, ...]
    prompt_chunks: int
    #: None without a reference.
    reference_method: str | None = None


@frozen(kw_only=True)
class Sampling:
    """One way through the UNet: a diffusers pipeline and what it is called with."""

    pipeline: Any
    steps: int
    #: The pipeline's arguments for a batch, given the generators of its images.
    arguments: Callable[[Sequence[torch.Generator]], dict[str, Any]]
    method: str | None = None
    #: Undoes what the way did to the model.
    close: Callable[[], None] = lambda: None


class SdxlPipeline:
    """A loaded model with its text encoders, on one device."""

    def __init__(self, base: Any, *, device: str, dtype: torch.dtype, variant: SdxlVariant) -> None:
        base.set_progress_bar_config(disable=True)
        # SDXL's autoencoder overflows in half precision; it is small enough to stay in single.
        if base.vae.config.force_upcast and base.vae.dtype != torch.float32:
            base.vae.to(torch.float32)
        base.to(device)
        if device.startswith("cuda"):
            base.unet.to(memory_format=torch.channels_last)
            base.vae.to(memory_format=torch.channels_last)
        self.base = base
        self.device = device
        self.dtype = dtype
        self.variant = variant
        self.prompts = PromptEncoder(base, device)
        self._own_scheduler = base.scheduler
        self._extras: dict[str, Any] = {}

    def draw(
        self,
        request: ImageRequest,
        *,
        sampling: Callable[[SdxlPipeline, ImageRequest, Any], Sampling],
        on_step: Callable[[int, int, torch.Tensor], None],
    ) -> DrawnImages:
        """Draw the images in batches as large as the memory takes.

        ``on_step`` is told the step, the number of all and the latents of the batch after it.

        :raises OutOfMemory: not even one image fits.
        """
        conditioning = self.prompts.encode(request.prompt, request.negative_prompt)
        scheduler = scheduler_for(request.solver, self._own_scheduler)
        way = sampling(self, request, scheduler)
        try:
            images, batch_sizes = self._draw_all(request, conditioning, way, on_step)
        finally:
            way.close()
        return DrawnImages(
            images=tuple(images),
            scheduler=type(scheduler).__name__,
            steps=way.steps,
            batch_sizes=tuple(batch_sizes),
            prompt_chunks=conditioning.chunks,
            reference_method=way.method,
        )

    def companion(self, key: str, load: Callable[[], Any]) -> Any:
        """Weights that go with this model and stay as long as it does, loaded on first use."""
        if key not in self._extras:
            self._extras[key] = load()
        return self._extras[key]

    def encode_image(self, image: Image) -> torch.Tensor:
        """The latents of ``image``, as the UNet sees them; the same every time."""
        vae = self.base.vae
        pixels = self.base.image_processor.preprocess(image).to(self.device, vae.dtype)
        with torch.no_grad():
            latents: torch.Tensor = vae.encode(pixels).latent_dist.mode()
        return ((latents - self._latent_mean(latents)) / self._latent_scale(latents)).to(self.dtype)

    def decode_latents(self, latents: torch.Tensor) -> Image:
        """The picture of one image's latents."""
        latents = latents.to(self.base.vae.dtype)
        latents = latents * self._latent_scale(latents) + self._latent_mean(latents)
        with torch.no_grad():
            pixels = self.base.vae.decode(latents, return_dict=False)[0]
        picture: Image = self.base.image_processor.postprocess(pixels, output_type="pil")[0]
        return picture

    def sketch(self, latents: torch.Tensor) -> Image:
        """A small guess at the first picture of latents that are still noisy. The device is waited for.

        Latents are nearly linear in the colours of the picture (T. A. Vass, "Explaining the SDXL latent space", 2023),
        so their averages decode to a small picture of nearly the same colours.
        """
        first = latents[:1].detach().float()
        # Noise makes them larger than a picture's are, by a factor that differs between schedulers.
        first = first / first.std().clamp(min=1.0)
        height, width = first.shape[-2:]
        scale = min(1.0, _SKETCH_LATENTS / max(height, width))
        size = (max(1, round(height * scale)), max(1, round(width * scale)))
        return self.decode_latents(torch.nn.functional.interpolate(first, size=size, mode="area"))

    def noise(self, width: int, height: int, generators: Sequence[torch.Generator]) -> torch.Tensor:
        """The noise of a batch, drawn image by image."""
        factor = self.base.vae_scale_factor
        shape = (1, self.base.unet.config.in_channels, height // factor, width // factor)
        drawn = [torch.randn(shape, generator=generator, dtype=torch.float32) for generator in generators]
        return torch.cat(drawn).to(self.device, self.dtype)

    def _draw_all(
        self,
        request: ImageRequest,
        conditioning: Conditioning,
        way: Sampling,
        on_step: Callable[[int, int, torch.Tensor], None],
    ) -> tuple[list[Image], list[int]]:
        images: list[Image] = []
        batch_sizes: list[int] = []
        size = len(request.seeds)
        while len(images) < len(request.seeds):
            seeds = request.seeds[len(images) : len(images) + size]
            remaining_batches = -(-(len(request.seeds) - len(images)) // size)
            steps_done = len(batch_sizes) * way.steps
            steps_total = steps_done + remaining_batches * way.steps
            report = partial(_report, on_step, steps_done, steps_total)
            latents = self._sampled(request, conditioning, way, seeds, report)
            if latents is None:
                if size == 1:
                    raise OutOfMemory(
                        f"one image of {request.width}x{request.height} does not fit into the memory of {self.device};"
                        " ask for a smaller one, or free memory on the device"
                    )
                size //= 2
                logger.warning("out of memory with %d images at once; going on with %d", size * 2, size)
                continue
            batch_sizes.append(len(seeds))
            images += [self.decode_latents(latents[i : i + 1]) for i in range(len(seeds))]
        return images, batch_sizes

    def _sampled(
        self,
        request: ImageRequest,
        conditioning: Conditioning,
        way: Sampling,
        seeds: Sequence[int],
        on_step: Callable[[int, torch.Tensor], None],
    ) -> torch.Tensor | None:
        """The latents of a batch, or None where it does not fit into memory."""

        def after_step(pipeline: Any, index: int, _timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
            # A scheduler of second order calls the UNet twice for one step.
            on_step(min(way.steps, index * way.steps // max(1, pipeline.num_timesteps) + 1), tensors["latents"])
            return {}

        generators = [torch.Generator("cpu").manual_seed(seed) for seed in seeds]
        try:
            latents: torch.Tensor = way.pipeline(
                prompt_embeds=_for_each(conditioning.prompt, seeds),
                pooled_prompt_embeds=_for_each(conditioning.pooled, seeds),
                negative_prompt_embeds=_for_each(conditioning.negative, seeds),
                negative_pooled_prompt_embeds=_for_each(conditioning.negative_pooled, seeds),
                guidance_scale=request.guidance_scale,
                generator=generators,
                output_type="latent",
                callback_on_step_end=after_step,
                **way.arguments(generators),
            ).images
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
        else:
            if not bool(torch.isfinite(latents).all()):
                raise GenerationError("the model's output is not a number; its weights or their precision are unusable")
            return latents
        # Only here has the exception let go of the tensors in its frames.
        gc.collect()
        if self.device.startswith("cuda"):
            torch.cuda.empty_cache()
        return None

    def _latent_scale(self, latents: torch.Tensor) -> torch.Tensor:
        config = self.base.vae.config
        spread = config.latents_std or [1.0] * config.latent_channels
        return torch.tensor(spread).view(1, -1, 1, 1).to(latents) / config.scaling_factor

    def _latent_mean(self, latents: torch.Tensor) -> torch.Tensor:
        config = self.base.vae.config
        mean = config.latents_mean or [0.0] * config.latent_channels
        return torch.tensor(mean).view(1, -1, 1, 1).to(latents)


def load_pipeline(model: Path, *, device: str, variant: SdxlVariant, config_dir: Path | None = None) -> SdxlPipeline:
    """Load a checkpoint file, or a directory in the diffusers layout. Never downloads.

    :raises ModelUnavailable: a file is missing or cannot be read, and which.
    """
    if not model.exists():
        raise ModelUnavailable(f"there is no SDXL model at {model}; OURVIDZ_SDXL_MODEL or OURVIDZ_SDXL_MODELS names it")
    diffusers_logging.disable_progress_bar()
    transformers_logging.disable_progress_bar()
    dtype = precision(device)
    is_directory = model.is_dir()
    complete_config_dir = None if is_directory else checked_config_dir(model, config_dir)
    try:
        base = _from_directory(model, dtype) if is_directory else _from_checkpoint(model, dtype, complete_config_dir)
        return SdxlPipeline(base, device=device, dtype=dtype, variant=variant)
    # Five libraries read the files, and each has errors of its own for a broken one.
    except Exception as error:
        if is_out_of_memory(error):
            raise OutOfMemory(f"{model.name} does not fit into the memory of {device}: {error}") from error
        raise ModelUnavailable(f"the SDXL model {model} cannot be loaded: {error}") from error


def checked_config_dir(model: Path, config_dir: Path | None) -> Path:
    """The configuration directory of a checkpoint, complete."""
    if config_dir is None:
        raise ModelUnavailable(
            f"{model.name} is a single-file checkpoint and carries no configuration: set {CONFIG_DIR_VARIABLE} to a"
            f" directory that holds the small files of SDXL's diffusers layout, without weights: {CONFIG_IN_WORDS}"
        )
    missing = missing_config(config_dir)
    if missing:
        raise ModelUnavailable(f"{CONFIG_DIR_VARIABLE} names {config_dir}, which lacks {', '.join(missing)}")
    return config_dir


def precision(device: str) -> torch.dtype:
    """The precision of the UNet and the text encoders on ``device``."""
    if not device.startswith("cuda"):
        return torch.float32
    return torch.bfloat16 if torch.cuda.is_bf16_supported() else torch.float16


def is_out_of_memory(error: BaseException) -> bool:
    """Whether ``error`` is the device's, or the machine's, lack of memory."""
    return isinstance(error, torch.OutOfMemoryError) or (
        isinstance(error, RuntimeError) and "out of memory" in str(error).lower()
    )


def _from_directory(model: Path, dtype: torch.dtype) -> Any:
    return StableDiffusionXLPipeline.from_pretrained(
        str(model), dtype=dtype, local_files_only=True, add_watermarker=False
    )


def _from_checkpoint(model: Path, dtype: torch.dtype, config_dir: Path | None) -> Any:
    return StableDiffusionXLPipeline.from_single_file(
        str(model), config=str(config_dir), dtype=dtype, local_files_only=True, add_watermarker=False
    )


def _report(
    on_step: Callable[[int, int, torch.Tensor], None], done: int, total: int, step: int, latents: torch.Tensor
) -> None:
    on_step(done + step, total, latents)


def _for_each(embeddings: torch.Tensor, seeds: Sequence[int]) -> torch.Tensor:
    return embeddings.expand(len(seeds), *embeddings.shape[1:])
