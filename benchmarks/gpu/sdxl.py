"""SDXL's rows: requests to PNG files, with our pipeline and with plain diffusers."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from benchmarks.gpu.clock import allocated, relative_error, timed
from benchmarks.gpu.models import Models
from benchmarks.gpu.rows import Measured, Scale
from ourvidz_core.engine.tiers import Tier

GUIDANCE, SEED = 7.5, 7
NEGATIVE = "blurry, low quality"


class Sdxl:
    """Both models, loaded when a row first needs them."""

    def __init__(self, scale: Scale, models: Models, out: Path) -> None:
        self._scale = scale
        self._directory = models.sdxl()
        self._out = out
        self._prompts = 0
        self._last: torch.Tensor | None = None

    def measure(self, row: str) -> Measured:
        """The row of this name."""
        if row == "sdxl6_fast":
            return self._fast(self._scale.images)
        return self._images(1 if row == "sdxl1" else self._scale.images)

    def _images(self, count: int) -> Measured:
        scale = self._scale
        plain_bytes = self._plain_bytes if "_plain" in self.__dict__ else 0
        self._run_ours(count)
        ours = timed(lambda: self._run_ours(count), scale.device, repeats=scale.repeats, elsewhere=plain_bytes)
        self._run_plain(count, 2)
        held = allocated(scale.device)
        plain = timed(
            lambda: self._run_plain(count, scale.steps),
            scale.device,
            elsewhere=held - self._plain_bytes,
        )
        return Measured(
            ours=ours.seconds, alternative=plain.seconds, peak=ours.peak, alternative_peak=plain.peak, facts=ours.value
        )

    def _fast(self, count: int) -> Measured:
        """Beside its time, how near its pictures come to those of all steps."""
        scale = self._scale
        self._run_ours(count, Tier.FAST)
        elsewhere = self._plain_bytes if "_plain" in self.__dict__ else 0
        ours = timed(lambda: self._run_ours(count, Tier.FAST), scale.device, repeats=scale.repeats, elsewhere=elsewhere)
        made = []
        for tier in (Tier.EXACT, Tier.FAST):
            self._run_ours(count, tier, prompt=0)
            assert self._last is not None
            made.append((self._last, self._pixels(count)))
        (exact, exact_pixels), (fast, fast_pixels) = made
        error = np.mean((fast_pixels - exact_pixels) ** 2)
        psnr = float(10 * np.log10(255**2 / max(float(error), 1e-10)))
        facts = {"psnr_db": psnr, "latent_error": relative_error(fast, exact), **ours.value}
        return Measured(ours=ours.seconds, peak=ours.peak, facts=facts)

    def _pixels(self, count: int) -> Any:
        return np.stack([np.asarray(Image.open(self._ours_path(index)), np.float32) for index in range(count)])

    def _ours_path(self, index: int) -> Path:
        return self._out / f"ours-{index}.png"

    @cached_property
    def _ours(self) -> Any:
        from ourvidz_sdxl.pipeline import load_pipeline
        from ourvidz_sdxl.variants import SdxlVariant

        from ourvidz_core.engine.variants import read_variant

        variant = read_variant(self._directory, SdxlVariant)
        pipeline = load_pipeline(self._directory, device=self._scale.device, variant=variant)
        # As a worker warms up, which begins with the most images.
        self._draw(pipeline, self._scale.images, 1, _prompt(0))
        return pipeline

    @cached_property
    def _plain(self) -> Any:
        before = allocated(self._scale.device)
        pipeline = self._load_plain(torch.float32 if self._scale.device == "cpu" else torch.float16)
        self._plain_bytes = allocated(self._scale.device) - before
        return pipeline

    def _load_plain(self, dtype: torch.dtype) -> Any:
        from diffusers import StableDiffusionXLPipeline

        pipeline = StableDiffusionXLPipeline.from_pretrained(
            str(self._directory), torch_dtype=dtype, add_watermarker=False
        ).to(self._scale.device)
        pipeline.set_progress_bar_config(disable=True)
        return pipeline

    def _run_ours(self, count: int, tier: Tier = Tier.EXACT, prompt: int | None = None) -> dict[str, Any]:
        from ourvidz_core.engine.pictures import write_png

        if prompt is None:
            self._prompts += 1
        number = self._prompts if prompt is None else prompt
        drawn = self._draw(self._ours, count, self._scale.steps, _prompt(number), tier)
        with ThreadPoolExecutor(count) as pool:
            paths = [self._ours_path(index) for index in range(count)]
            list(pool.map(lambda picture, path: write_png(picture.image(), path, {}), drawn.pictures, paths))
        return {
            "steps_computed": drawn.steps_computed,
            "batches": "+".join(map(str, drawn.batch_sizes)),
            "compiled": drawn.is_compiled,
            "file_mb": paths[0].stat().st_size / 1e6,
        }

    def _draw(self, pipeline: Any, count: int, steps: int, prompt: str, tier: Tier = Tier.EXACT) -> Any:
        from ourvidz_sdxl.pipeline import ImageRequest
        from ourvidz_sdxl.references import Samplings
        from ourvidz_sdxl.settings import SdxlSettings

        side = self._scale.side
        request = ImageRequest(
            prompt=prompt,
            negative_prompt=NEGATIVE,
            seeds=tuple(range(SEED, SEED + count)),
            width=side,
            height=side,
            num_inference_steps=steps,
            guidance_scale=GUIDANCE,
            tier=tier,
        )

        def keep(step: int, total: int, latents: torch.Tensor) -> None:
            if step == total:
                self._last = latents.clone()

        return pipeline.draw(request, sampling=Samplings(SdxlSettings()), on_step=keep)

    def _run_plain(self, count: int, steps: int) -> None:
        images = self._plain(**self._asked(count, steps, _prompt(self._prompts))).images
        for index, image in enumerate(images):
            image.save(self._out / f"plain-{index}.png")

    def _asked(self, count: int, steps: int, prompt: str) -> dict[str, Any]:
        return {
            "prompt": [prompt] * count,
            "negative_prompt": [NEGATIVE] * count,
            "width": self._scale.side,
            "height": self._scale.side,
            "num_inference_steps": steps,
            "guidance_scale": GUIDANCE,
            "generator": [torch.Generator("cpu").manual_seed(SEED + index) for index in range(count)],
        }


class SdxlExact(Sdxl):
    """How near the final latents are, in a process that begins with plain diffusers and ends with it."""

    def measure(self, _row: str) -> Measured:
        """Against diffusers in the precision that ours has; where one usually runs it in fp16, ours takes bf16.

        Plain diffusers runs a second time at the end: whatever ours sets in the process must not reach others.
        """
        from ourvidz_sdxl.pipeline import precision

        plain, single = (self._load_plain(dtype) for dtype in (precision(self._scale.device), torch.float32))
        theirs, true = (self._plain_latents(one) for one in (plain, single))
        self._draw(self._ours, 1, self._scale.steps, _prompt(0))
        assert self._last is not None
        again = self._plain_latents(plain)
        facts = {
            "ours_to_fp32": relative_error(self._last, true),
            "plain_to_fp32": relative_error(theirs, true),
            "plain_to_itself_after_ours": relative_error(again, theirs),
        }
        return Measured(ours=relative_error(self._last, theirs), facts=facts)

    def _plain_latents(self, pipeline: Any) -> torch.Tensor:
        """From the noise that ours begins with, in the pipeline's precision.

        Left to itself diffusers draws it in that precision, and torch 2.11 then makes other numbers of the same seed:
        https://github.com/huggingface/diffusers/issues/11056
        """
        side = self._scale.side // pipeline.vae_scale_factor
        generator = torch.Generator("cpu").manual_seed(SEED)
        noise = torch.randn((1, pipeline.unet.config.in_channels, side, side), generator=generator)
        asked = self._asked(1, self._scale.steps, _prompt(0))
        latents: torch.Tensor = pipeline(**asked, latents=noise.to(pipeline.dtype), output_type="latent").images
        return latents.clone()


def _prompt(number: int) -> str:
    return f"a lighthouse on a rocky coast, wave number {number}"
