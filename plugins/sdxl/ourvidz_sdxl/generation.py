"""The SDXL part of a job's walk on the device: from the job to image files and the truth about them."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any, Self

from attrs import evolve, frozen
from torch import Tensor

from ourvidz_core.engine.compilation import timed_with_compiling
from ourvidz_core.engine.pictures import write_png
from ourvidz_core.engine.tiers import Tier
from ourvidz_core.engine.variants import find_model
from ourvidz_core.errors import ModelUnavailable, ReferenceUnavailable
from ourvidz_core.plugins.context import JobContext
from ourvidz_core.wire.artifacts import Artifact, Generation
from ourvidz_core.wire.job_types import JobType
from ourvidz_core.wire.jobs import Job
from ourvidz_sdxl.config import IMAGE_COUNTS, SdxlConfig
from ourvidz_sdxl.negative_prompts import NegativePrompt, fit_terms, negative_terms
from ourvidz_sdxl.parallel.plan import deal, part_sizes
from ourvidz_sdxl.parallel.ranks import DrawingRanks, make_room, ranks_of
from ourvidz_sdxl.pictures import Picture
from ourvidz_sdxl.pipeline import DrawnImages, ImageRequest, ReferencePicture, SdxlPipeline
from ourvidz_sdxl.references import Samplings, fit_reference
from ourvidz_sdxl.settings import SdxlSettings, UnknownVariant
from ourvidz_sdxl.warm import warm_pipeline

logger = logging.getLogger(__name__)

MEDIA_TYPE = "image/png"
#: What the file itself says, beside the prompts and the seeds.
FACTS_IN_FILE = (
    "model",
    "width",
    "height",
    "steps",
    "tier",
    "steps_computed",
    "guidance_scale",
    "scheduler",
    "reference_method",
    "reference_type",
    "reference_strength",
)


def generate_images(job: Job, context: JobContext) -> Generation:
    """Draw the job's images; they are written down while the device draws others."""
    settings = context.settings(SdxlSettings)
    model_path = choose_model(settings, job.model_variant)
    config: SdxlConfig = job.config
    parts = deal(config.num_images, settings.gpus)
    warm = _WarmModel.of(context, settings, model_path, gpus=len(parts))
    model = warm.model
    width, height = model.variant.size_for(config.width, config.height)
    prompt = job.enhanced_prompt or job.prompt
    negative = fit_terms(negative_terms(job.negative_prompt, prompt), model.prompts.count_tokens)
    request = ImageRequest(
        prompt=prompt,
        negative_prompt=negative.text,
        seeds=tuple(job.seed + index for index in range(config.num_images)),
        width=width,
        height=height,
        num_inference_steps=config.num_inference_steps,
        guidance_scale=config.guidance_scale,
        solver=config.sample_solver,
        tier=config.tier or settings.tier,
        reference=_reference(job, width, height),
    )

    requests = [evolve(request, seeds=request.seeds[part.start : part.stop]) for part in parts]
    drawn = warm.draw(
        requests,
        progress=partial(context.progress, stage="denoise"),
        show=lambda latents: context.preview(lambda: model.sketch(latents)),
    )
    facts = _facts(job, request=request, drawn=drawn, negative=negative, model=model, model_path=model_path)
    if settings.gpus > 1:
        facts["gpus"] = len(parts)
    paths = [context.output_path("png") for _ in drawn.pictures]
    write = partial(_write, job=job, request=request, facts=facts)

    def finish() -> tuple[Artifact, ...]:
        with ThreadPoolExecutor(len(paths)) as pool:
            return tuple(pool.map(write, drawn.pictures, paths, request.seeds))

    return Generation(facts=facts, finish=finish)


def warm_up_model(context: JobContext, job_types: Sequence[JobType]) -> None:
    """Load the model that jobs get which name none, and draw one step in each size of the presets.

    Where it is compiled, in each number of images that a GPU may have of a job, so that no job waits for a compiler.
    Where several GPUs share a job's images, all of them do so.
    """
    settings = context.settings(SdxlSettings)
    logger.info("loading the model")
    model_path = choose_model(settings, None)
    warm = _WarmModel.of(context, settings, model_path, gpus=settings.gpus)
    model = warm.model
    presets: list[SdxlConfig] = [job_type.preset for job_type in job_types]
    sizes = sorted({model.variant.size_for(preset.width, preset.height) for preset in presets})
    # The largest first: the graphs of all others find room in the memory of its own.
    counts = part_sizes(IMAGE_COUNTS, settings.gpus) if model.may_be_compiled else (1,)
    for (width, height), count in product(sizes, counts):
        logger.info("drawing a step of %d at %dx%d", count, width, height)
        request = ImageRequest(
            prompt="",
            negative_prompt="",
            seeds=tuple(range(count)),
            width=width,
            height=height,
            num_inference_steps=1,
            guidance_scale=presets[0].guidance_scale,
            solver=presets[0].sample_solver,
        )
        with timed_with_compiling(logger, "drew it"):
            drawn = warm.draw([request] * settings.gpus, progress=context.progress)
            for picture in drawn.pictures:
                picture.image()


def choose_model(settings: SdxlSettings, model_variant: str | None) -> Path:
    """Where the model for ``model_variant`` lies.

    :raises ModelUnavailable: no model is configured for it, and what to set.
    """
    if model_variant is not None and model_variant in settings.models:
        return find_model(settings.models[model_variant], "sdxl")
    if model_variant is not None and settings.unknown_variant is UnknownVariant.FAIL:
        known = ", ".join(sorted(settings.models)) or "none"
        raise ModelUnavailable(
            f"no SDXL model is configured as {model_variant!r} (configured: {known});"
            " add it to OURVIDZ_SDXL_MODELS, or set OURVIDZ_SDXL_UNKNOWN_VARIANT=default"
        )
    if settings.model is None:
        raise ModelUnavailable(
            "no SDXL model is configured: set OURVIDZ_SDXL_MODEL to a .safetensors checkpoint"
            " or to a directory in the diffusers layout"
        )
    return find_model(settings.model, "sdxl")


@frozen(kw_only=True)
class _WarmModel:
    """A model that is loaded on all GPUs that a job uses."""

    model: SdxlPipeline
    path: Path
    settings: SdxlSettings
    #: None where one GPU does all.
    ranks: DrawingRanks | None

    @classmethod
    def of(cls, context: JobContext, settings: SdxlSettings, path: Path, *, gpus: int) -> Self:
        ranks = ranks_of(settings.gpus, context.device) if gpus > 1 else None
        with ranks.loading(path) if ranks is not None else nullcontext():
            model = warm_pipeline(context.models, path, settings, context.device, on_leave=make_room)
        return cls(model=model, path=path, settings=settings, ranks=ranks)

    def draw(
        self,
        requests: Sequence[ImageRequest],
        *,
        progress: Callable[[int, int], None],
        show: Callable[[Tensor], None] = lambda latents: None,
    ) -> DrawnImages:
        """Each of ``requests`` on a GPU of its own."""

        def on_step(step: int, total: int, latents: Tensor) -> None:
            progress(step, total)
            show(latents)

        sampling = Samplings(self.settings)
        if self.ranks is None:
            (request,) = requests
            return self.model.draw(request, sampling=sampling, on_step=on_step)
        return self.ranks.draw(self.model, self.path, requests, sampling=sampling, on_step=on_step, progress=progress)


def _reference(job: Job, width: int, height: int) -> ReferencePicture | None:
    reference = job.references.single
    if reference is None:
        return None
    if reference.path is None:
        raise ReferenceUnavailable("the job's reference image was not fetched before its generation began")
    return ReferencePicture(
        image=fit_reference(reference.path, width, height),
        type=job.config.reference_type,
        strength=job.config.reference_strength,
    )


def _facts(
    job: Job,
    *,
    request: ImageRequest,
    drawn: DrawnImages,
    negative: NegativePrompt,
    model: SdxlPipeline,
    model_path: Path,
) -> dict[str, Any]:
    config: SdxlConfig = job.config
    is_guided = config.guidance_scale > 1
    facts: dict[str, Any] = {
        "model": model_path.name,
        "model_variant": job.model_variant,
        "device": model.device,
        "dtype": str(model.dtype).removeprefix("torch."),
        "width": request.width,
        "height": request.height,
        "requested_width": config.width,
        "requested_height": config.height,
        "size_scale": model.variant.size_scale,
        "steps": drawn.steps,
        "num_inference_steps": config.num_inference_steps,
        "tier": request.tier.value,
        "guidance_scale": config.guidance_scale,
        "scheduler": drawn.scheduler,
        "compiled": drawn.is_compiled,
        "batch_sizes": list(drawn.batch_sizes),
        "prompt_chunks": drawn.prompt_chunks,
        # Without guidance the model never sees a negative prompt.
        "negative_prompt_used": negative.text if is_guided else None,
        "negative_prompt_source": str(config.negative_prompt_source) if is_guided else None,
        "negative_terms_dropped": list(negative.dropped) if is_guided else [],
        "reference_applied": request.reference is not None,
    }
    if request.tier is not Tier.EXACT:
        facts["steps_computed"] = drawn.steps_computed
    if request.reference is not None:
        facts |= {
            "reference_method": str(drawn.reference_method),
            "reference_type": str(request.reference.type),
            "reference_strength": request.reference.strength,
        }
    return facts


def _write(
    picture: Picture, path: Path, seed: int, *, job: Job, request: ImageRequest, facts: Mapping[str, Any]
) -> Artifact:
    image = picture.image()
    write_png(
        image,
        path,
        {
            "prompt": request.prompt,
            "negative_prompt": facts["negative_prompt_used"],
            "job_type": job.job_type,
            "seed": seed,
            "base_seed": job.seed,
            **{key: facts[key] for key in FACTS_IN_FILE if key in facts},
        },
    )
    return Artifact(path=path, media_type=MEDIA_TYPE, seed=seed, width=image.width, height=image.height)
