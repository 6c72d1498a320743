"""One warm SDXL model: loaded from local files, and asked for batches of images.

Image i of a batch has a generator of its own, so it is the image that its seed makes alone.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import torch
from attrs import frozen
from diffusers import AutoencoderKL, StableDiffusionXLPipeline, UNet2DConditionModel
from diffusers.utils import logging as diffusers_logging
from PIL.Image import Image, fromarray
from transformers.utils import logging as transformers_logging

from ourvidz_core.engine.compilation import may_compile
from ourvidz_core.engine.device_memory import is_out_of_memory, release_memory
from ourvidz_core.engine.models import AlwaysResident
from ourvidz_core.engine.pacing import StepPacer
from ourvidz_core.engine.tiers import Tier
from ourvidz_core.engine.weight_files import read_module, read_weights
from ourvidz_core.errors import ModelUnavailable, OutOfMemory
from ourvidz_core.plugins.residency import Residence, Work
from ourvidz_sdxl.config import ReferenceType, Solver
from ourvidz_sdxl.decoder import FastDecoder
from ourvidz_sdxl.layout import CONFIG_DIR_VARIABLE, CONFIG_IN_WORDS, missing_config
from ourvidz_sdxl.pictures import DevicePicture, Picture
from ourvidz_sdxl.schedulers import scheduler_for
from ourvidz_sdxl.speed import fast_unet, fuse_projections
from ourvidz_sdxl.text_encoding import Conditioning, PromptEncoder
from ourvidz_sdxl.variants import SdxlVariant

logger = logging.getLogger(__name__)

#: Latents on the longer side of a sketch: 128 pixels, a 64th of the decoder's work for an image of 1024x1024.
_SKETCH_LATENTS = 16
#: What is read straight to a GPU; the text encoders are small.
_LARGE_PARTS: Mapping[str, Any] = {"unet": UNet2DConditionModel, "vae": AutoencoderKL}


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
    tier: Tier = Tier.EXACT
    reference: ReferencePicture | None = None


@frozen(kw_only=True)
class DrawnImages:
    """The images in the order of their seeds, on their way from the device, and how they were made."""

    pictures: tuple[Picture, ...]
    scheduler: str
    #: Sampling steps of each image, and in how many of them the UNet was asked.
    steps: int
    steps_computed: int
    batch_sizes: tuple[int, ...]
    prompt_chunks: int
    #: Whether the UNet ran compiled.
    is_compiled: bool = False
    #: None without a reference.
    reference_method: str | None = None


@frozen(kw_only=True)
class Sampling:
    """One way through the UNet: a diffusers pipeline and what it is called with."""

    pipeline: Any
    #: Steps of the schedule, and those of them that are taken.
    steps: int
    computed: int
    #: The pipeline's arguments for a batch, given the generators of its images.
    arguments: Callable[[Sequence[torch.Generator]], dict[str, Any]]
    method: str | None = None
    #: Whether the UNet is another one meanwhile, or gets more than text.
    changes_unet: bool = False
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
            if may_compile(device):
                # Without a compiler each normalization goes to the other layout, and that costs more than this gives.
                base.unet.to(memory_format=torch.channels_last)
                base.vae.to(memory_format=torch.channels_last)
            fuse_projections(base.unet)
            _lighten_decoder(base.vae, dtype)
        self.base = base
        self.device = device
        self.dtype = dtype
        self.variant = variant
        #: Its place on the device, among other models.
        self.residence: Residence = AlwaysResident()
        self.prompts = PromptEncoder(base, device)
        # On the device from the start: a copy to it would wait for all that it still has to do.
        self._latent_statistics = _latent_statistics(base.vae.config, device)
        self._own_scheduler = base.scheduler
        self._extras: dict[str, Any] = {}
        self._unet = fast_unet(base.unet, device)
        self._decode = FastDecoder(base.vae, device)

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
        with self.residence.use():
            conditioning = self.prompts.encode(request.prompt, request.negative_prompt)
            scheduler = scheduler_for(request.solver, self._own_scheduler)
            way = sampling(self, request, scheduler)
            try:
                with self._unet.as_it_came() if way.changes_unet else nullcontext():
                    pictures, batch_sizes = self._draw_all(request, conditioning, way, on_step)
            finally:
                way.close()
        return DrawnImages(
            pictures=tuple(pictures),
            scheduler=type(way.pipeline.scheduler).__name__,
            steps=way.steps,
            steps_computed=way.computed,
            batch_sizes=tuple(batch_sizes),
            prompt_chunks=conditioning.chunks,
            is_compiled=self._unet.ran_compiled,
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
        """The picture of one image's latents. The device is waited for."""
        pixels = self._decode(self._as_decoded(latents))
        return fromarray(pixels[0].cpu().numpy())

    @property
    def may_be_compiled(self) -> bool:
        """Whether the UNet has compiled kernels."""
        return self._unet.may_be_compiled

    def forget_graphs(self) -> None:
        """Free the memory of what was recorded on weights where they lie; it is recorded anew when it is needed."""
        self._unet.forget()
        self.prompts.forget_graphs()

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
        noise = torch.cat(drawn).to(self.dtype)
        # From pinned memory the copy waits for nothing that the device still has to do.
        return noise.pin_memory().to(self.device, non_blocking=True) if self.device.startswith("cuda") else noise

    def _draw_all(
        self,
        request: ImageRequest,
        conditioning: Conditioning,
        way: Sampling,
        on_step: Callable[[int, int, torch.Tensor], None],
    ) -> tuple[list[Picture], list[int]]:
        pictures: list[Picture] = []
        batch_sizes: list[int] = []
        size = self._size_of_batches(request)
        while len(pictures) < len(request.seeds):
            seeds = request.seeds[len(pictures) : len(pictures) + size]
            remaining_batches = -(-(len(request.seeds) - len(pictures)) // size)
            steps_done = len(batch_sizes) * way.computed
            steps_total = steps_done + remaining_batches * way.computed
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
            pictures += self._decoded(latents)
        return pictures, batch_sizes

    def _size_of_batches(self, request: ImageRequest) -> int:
        """How many images at once, by what the memory took before: batches of nearly one size."""
        images = len(request.seeds)
        batches = -(-images // self.residence.rows(_denoising(request, images)))
        return -(-images // batches)

    def _decoded(self, latents: torch.Tensor) -> list[Picture]:
        """The pictures of a batch, one by one: each fills the device."""
        is_finite = torch.isfinite(latents).all()
        pictures: list[Picture] = []
        for one in latents.split(1):
            decode = partial(self._decode, self._as_decoded(one))
            work = Work(name="decode", shape=tuple(one.shape[2:]))
            pixels = self._unless_out_of_memory(partial(self.residence.run, decode, work=work))
            if pixels is None:
                pixels = decode()  # now that the graphs are gone
            pictures.append(DevicePicture.send(pixels[0], is_finite))
        return pictures

    def _sampled(
        self,
        request: ImageRequest,
        conditioning: Conditioning,
        way: Sampling,
        seeds: Sequence[int],
        on_step: Callable[[int, torch.Tensor], None],
    ) -> torch.Tensor | None:
        """The latents of a batch, or None where it does not fit into memory."""
        pacer = StepPacer(self.device)

        def after_step(pipeline: Any, index: int, _timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
            pacer.step()
            # A scheduler of second order calls the UNet twice for one step.
            on_step(min(way.computed, index * way.computed // max(1, pipeline.num_timesteps) + 1), tensors["latents"])
            return {}

        def sample() -> torch.Tensor:
            generators = [torch.Generator("cpu").manual_seed(seed) for seed in seeds]
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
            return latents

        return self._unless_out_of_memory(lambda: self.residence.run(sample, work=_denoising(request, len(seeds))))

    def _unless_out_of_memory(self, make: Callable[[], torch.Tensor]) -> torch.Tensor | None:
        """What ``make`` makes, or None where it does not fit into memory; then all is freed that can be made again."""
        try:
            return make()
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
        # Only here has the exception let go of the tensors in its frames.
        self.forget_graphs()
        release_memory()
        return None

    def _as_decoded(self, latents: torch.Tensor) -> torch.Tensor:
        latents = latents.float()
        scaled = latents * self._latent_scale(latents) + self._latent_mean(latents)
        return scaled.to(next(self.base.vae.decoder.parameters()).dtype)

    def _latent_scale(self, latents: torch.Tensor) -> torch.Tensor:
        return self._latent_statistics[0].to(latents.dtype)

    def _latent_mean(self, latents: torch.Tensor) -> torch.Tensor:
        return self._latent_statistics[1].to(latents.dtype)


class _TextToImage(StableDiffusionXLPipeline):  # type: ignore[misc]
    """diffusers' pipeline, all of it on one device."""

    @property
    def _execution_device(self) -> torch.device:
        # diffusers looks for hooks at some 2,500 modules, for 8 ms before each batch in which the device has no work.
        return next(self.unet.parameters()).device


def _latent_statistics(config: Any, device: str) -> tuple[torch.Tensor, torch.Tensor]:
    """What the decoder's latents are multiplied by and what is added then, by channel."""
    spread = torch.tensor(config.latents_std or [1.0] * config.latent_channels) / config.scaling_factor
    mean = torch.tensor(config.latents_mean or [0.0] * config.latent_channels)
    return spread.view(1, -1, 1, 1).to(device), mean.view(1, -1, 1, 1).to(device)


def _lighten_decoder(vae: Any, dtype: torch.dtype) -> None:
    """Let the decoder work in bfloat16, which has the range of single precision; the encoder keeps its own.

    diffusers decodes in bfloat16 as well where a pipeline was loaded in it.
    """
    if dtype is torch.bfloat16:
        for part in (vae.decoder, vae.post_quant_conv):
            if part is not None:
                part.to(dtype)


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
        if is_directory:
            base = _from_directory(model, device, dtype)
        else:
            base = _from_checkpoint(model, device, dtype, complete_config_dir)
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


def _from_directory(model: Path, device: str, dtype: torch.dtype) -> Any:
    read = parts_of_directory(model, device, dtype) if device.startswith("cuda") else {}
    return _TextToImage.from_pretrained(str(model), dtype=dtype, local_files_only=True, add_watermarker=False, **read)


def _from_checkpoint(model: Path, device: str, dtype: torch.dtype, config_dir: Path | None) -> Any:
    is_read = device.startswith("cuda") and model.suffix == ".safetensors"
    read = parts_of_checkpoint(model, device, dtype, config_dir) if is_read else {}
    return _TextToImage.from_single_file(
        str(model), config=str(config_dir), dtype=dtype, local_files_only=True, add_watermarker=False, **read
    )


def parts_of_directory(model: Path, device: str, dtype: torch.dtype) -> dict[str, Any]:
    """The large parts of a pipeline in ``model``, read straight to ``device``, as far as that can be done."""
    parts = {name: read_module(cls, model / name, device=device, dtype=dtype) for name, cls in _LARGE_PARTS.items()}
    return {name: part for name, part in parts.items() if part is not None}


def parts_of_checkpoint(model: Path, device: str, dtype: torch.dtype, config_dir: Path | None) -> dict[str, Any]:
    """The large parts of a checkpoint, read straight to ``device``; diffusers gives its weights their names."""
    weights = read_weights([model], device=device, dtype_of=lambda _: dtype)
    local: dict[str, Any] = {"config": str(config_dir), "local_files_only": True}
    # Names are changed in the dictionary that is given.
    return {
        name: cls.from_single_file(dict(weights), subfolder=name, device=device, torch_dtype=dtype, **local)
        for name, cls in _LARGE_PARTS.items()
    }


def _report(
    on_step: Callable[[int, int, torch.Tensor], None], done: int, total: int, step: int, latents: torch.Tensor
) -> None:
    on_step(done + step, total, latents)


def _denoising(request: ImageRequest, images: int) -> Work:
    return Work(name="denoise", shape=(request.height, request.width), rows=images)


def _for_each(embeddings: torch.Tensor, seeds: Sequence[int]) -> torch.Tensor:
    return embeddings.expand(len(seeds), *embeddings.shape[1:])
