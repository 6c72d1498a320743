"""Let a reference image have its effect, and say by which method.

The base weights alone do img2img for every reference type. Where an operator has set
weights for it, style goes through an IP-Adapter limited to SDXL's style layers
(InstantStyle), character through a face IP-Adapter, and composition through a ControlNet.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from enum import StrEnum
from pathlib import Path
from typing import Any

import torch
from attrs import frozen
from diffusers import (
    ControlNetModel,
    ControlNetUnionModel,
    StableDiffusionXLControlNetPipeline,
    StableDiffusionXLControlNetUnionPipeline,
    StableDiffusionXLImg2ImgPipeline,
)
from PIL import Image, ImageOps
from safetensors import SafetensorError
from safetensors.torch import load_file
from transformers import CLIPImageProcessor, CLIPVisionModelWithProjection

from ourvidz_core.engine.device_memory import is_out_of_memory
from ourvidz_core.engine.tiers import Tier
from ourvidz_core.errors import ModelUnavailable
from ourvidz_sdxl.config import ReferenceType
from ourvidz_sdxl.edges import edge_map
from ourvidz_sdxl.pipeline import ImageRequest, ReferencePicture, Sampling, SdxlPipeline
from ourvidz_sdxl.schedulers import in_fewer_steps, steps_taken
from ourvidz_sdxl.settings import SdxlSettings

#: The position of canny among the conditions that a union ControlNet was trained with.
UNION_CANNY = 3


class ReferenceMethod(StrEnum):
    """How a reference image acts, as the callback says it."""

    IMG2IMG = "img2img"
    IP_ADAPTER_INSTANTSTYLE = "ip_adapter_instantstyle"
    IP_ADAPTER_FACE = "ip_adapter_face"
    CONTROLNET_CANNY = "controlnet_canny"


def choose_method(reference_type: ReferenceType, settings: SdxlSettings) -> ReferenceMethod:
    """The method for a type of reference: its own where its weights are configured, else img2img."""
    if reference_type is ReferenceType.STYLE and settings.ip_adapter_style:
        return ReferenceMethod.IP_ADAPTER_INSTANTSTYLE
    if reference_type is ReferenceType.CHARACTER and settings.ip_adapter_face:
        return ReferenceMethod.IP_ADAPTER_FACE
    if reference_type is ReferenceType.COMPOSITION and settings.controlnet:
        return ReferenceMethod.CONTROLNET_CANNY
    return ReferenceMethod.IMG2IMG


def fit_reference(path: Path, width: int, height: int) -> Image.Image:
    """The middle of the image at ``path`` in the wanted size: cropped, never stretched or framed."""
    with Image.open(path) as image:
        return ImageOps.fit(image.convert("RGB"), (width, height), Image.Resampling.LANCZOS)


def steps_for_strength(steps: int, strength: float) -> int:
    """How many of ``steps`` run on a reference: denoise = 1 - strength, and at least one."""
    # 25 * (1 - 0.8) is a little less than 5 to a computer.
    return min(steps, max(1, math.floor(round(steps * (1.0 - strength), 6) + 0.5)))


@frozen
class Samplings:
    """Makes the :class:`Sampling` of a request: the argument ``sampling`` of :meth:`SdxlPipeline.draw`."""

    settings: SdxlSettings

    def __call__(self, model: SdxlPipeline, request: ImageRequest, scheduler: Any) -> Sampling:
        if request.reference is None:
            return _from_text(model, request, _tiered(scheduler, request))
        method = choose_method(request.reference.type, self.settings)
        if method is ReferenceMethod.IMG2IMG:
            return _from_image(model, request, request.reference, scheduler)
        scheduler = _tiered(scheduler, request)
        if method is ReferenceMethod.CONTROLNET_CANNY:
            return _with_controlnet(model, request, request.reference, scheduler, self.settings)
        return _with_ip_adapter(
            model, request, request.reference, scheduler, _ip_adapter(method, request.reference, self.settings)
        )


def _tiered(scheduler: Any, request: ImageRequest, *, skipped: int = 0) -> Any:
    if request.tier is Tier.EXACT:
        return scheduler
    return in_fewer_steps(scheduler, request.num_inference_steps, skipped=skipped)


def _from_text(model: SdxlPipeline, request: ImageRequest, scheduler: Any) -> Sampling:
    model.base.scheduler = scheduler

    def arguments(generators: Sequence[torch.Generator]) -> dict[str, Any]:
        return {
            "width": request.width,
            "height": request.height,
            "num_inference_steps": request.num_inference_steps,
            "latents": model.noise(request.width, request.height, generators),
        }

    return Sampling(
        pipeline=model.base,
        steps=request.num_inference_steps,
        computed=steps_taken(scheduler, request.num_inference_steps),
        arguments=arguments,
    )


def _from_image(model: SdxlPipeline, request: ImageRequest, picture: ReferencePicture, scheduler: Any) -> Sampling:
    total = request.num_inference_steps
    steps = steps_for_strength(total, picture.strength)
    skipped = total - steps
    scheduler = _tiered(scheduler, request, skipped=skipped)
    components = {**model.base.components, "scheduler": scheduler}
    pipeline = StableDiffusionXLImg2ImgPipeline(**components, add_watermarker=False)
    pipeline.set_progress_bar_config(disable=True)
    # diffusers takes the whole part of total * strength; half a step more makes it exact.
    strength = min(1.0, (steps + 0.5) / total)
    encoded = model.encode_image(picture.image)

    def arguments(generators: Sequence[torch.Generator]) -> dict[str, Any]:
        noise = model.noise(request.width, request.height, generators)
        scheduler.set_timesteps(total, device=model.device)
        timesteps, _ = pipeline.get_timesteps(total, strength, model.device)
        count = len(generators)
        latents = scheduler.add_noise(encoded.expand_as(noise), noise, timesteps[:1].repeat(count))
        return {"image": picture.image, "strength": strength, "num_inference_steps": total, "latents": latents}

    return Sampling(
        pipeline=pipeline,
        steps=steps,
        computed=steps_taken(scheduler, total) - skipped,
        arguments=arguments,
        method=ReferenceMethod.IMG2IMG,
    )


def _with_controlnet(
    model: SdxlPipeline, request: ImageRequest, picture: ReferencePicture, scheduler: Any, settings: SdxlSettings
) -> Sampling:
    path = _configured(settings.controlnet, "OURVIDZ_SDXL_CONTROLNET")
    controlnet = model.companion(f"controlnet:{path}", lambda: _load_controlnet(path, model))
    is_union = isinstance(controlnet, ControlNetUnionModel)
    cls = StableDiffusionXLControlNetUnionPipeline if is_union else StableDiffusionXLControlNetPipeline
    pipeline = cls(**{**model.base.components, "scheduler": scheduler}, controlnet=controlnet, add_watermarker=False)
    pipeline.set_progress_bar_config(disable=True)
    edges = edge_map(picture.image)
    control = {"control_image": [edges], "control_mode": [UNION_CANNY]} if is_union else {"image": edges}
    plain = _from_text(model, request, scheduler)

    def arguments(generators: Sequence[torch.Generator]) -> dict[str, Any]:
        return {**plain.arguments(generators), **control, "controlnet_conditioning_scale": picture.strength}

    return Sampling(
        pipeline=pipeline,
        steps=plain.steps,
        computed=plain.computed,
        arguments=arguments,
        method=ReferenceMethod.CONTROLNET_CANNY,
        changes_unet=True,
    )


@frozen(kw_only=True)
class _IpAdapter:
    method: ReferenceMethod
    weights: Path
    image_encoder: Path
    #: How much each layer of the UNet looks at the image: diffusers' set_ip_adapter_scale.
    scale: Any


def _ip_adapter(method: ReferenceMethod, picture: ReferencePicture, settings: SdxlSettings) -> _IpAdapter:
    encoder = _configured(settings.ip_adapter_image_encoder, "OURVIDZ_SDXL_IP_ADAPTER_IMAGE_ENCODER")
    if method is ReferenceMethod.IP_ADAPTER_FACE:
        weights = _configured(settings.ip_adapter_face, "OURVIDZ_SDXL_IP_ADAPTER_FACE")
        return _IpAdapter(method=method, weights=weights, image_encoder=encoder, scale=picture.strength)
    weights = _configured(settings.ip_adapter_style, "OURVIDZ_SDXL_IP_ADAPTER_STYLE")
    # The middle layer of the first block upwards carries style: InstantStyle, arXiv:2404.02733.
    scale = {"up": {"block_0": [0.0, picture.strength, 0.0]}}
    return _IpAdapter(method=method, weights=weights, image_encoder=encoder, scale=scale)


def _with_ip_adapter(
    model: SdxlPipeline, request: ImageRequest, picture: ReferencePicture, scheduler: Any, adapter: _IpAdapter
) -> Sampling:
    weights = model.companion(f"ip_adapter:{adapter.weights}", lambda: _load_ip_adapter(adapter.weights))
    encoder = model.companion(
        f"image_encoder:{adapter.image_encoder}", lambda: _load_image_encoder(adapter.image_encoder, model)
    )
    base = model.base
    side = encoder.config.image_size
    base.register_modules(
        image_encoder=encoder,
        feature_extractor=CLIPImageProcessor(size={"shortest_edge": side}, crop_size={"height": side, "width": side}),
    )

    processors = dict(base.unet.attn_processors)

    def close() -> None:
        # Without this the UNet would want an image from every job that follows.
        base.unload_ip_adapter()
        # What was compiled, was compiled with these.
        base.unet.set_attn_processor(processors)
        base.register_modules(image_encoder=None, feature_extractor=None)

    try:
        base.load_ip_adapter(weights, subfolder="", weight_name=adapter.weights.name, image_encoder_folder=None)
        # The new layers come in the precision of their file.
        base.unet.encoder_hid_proj.to(device=model.device, dtype=model.dtype)
        for processor in base.unet.attn_processors.values():
            if isinstance(processor, torch.nn.Module):
                processor.to(device=model.device, dtype=model.dtype)
        base.set_ip_adapter_scale(adapter.scale)
        with torch.no_grad():
            embeds = base.prepare_ip_adapter_image_embeds(
                picture.image, None, model.device, 1, request.guidance_scale > 1
            )
    except (ValueError, KeyError, RuntimeError) as error:
        close()
        if is_out_of_memory(error):
            raise
        raise ModelUnavailable(f"the IP-Adapter {adapter.weights} does not go with this model: {error}") from error
    plain = _from_text(model, request, scheduler)

    def arguments(generators: Sequence[torch.Generator]) -> dict[str, Any]:
        return {**plain.arguments(generators), "ip_adapter_image_embeds": embeds}

    return Sampling(
        pipeline=base,
        steps=plain.steps,
        computed=plain.computed,
        arguments=arguments,
        method=adapter.method,
        changes_unet=True,
        close=close,
    )


def _configured(path: Path | None, variable: str) -> Path:
    if path is None:
        raise ModelUnavailable(f"the configured reference method also needs {variable}, which is not set")
    if not path.exists():
        raise ModelUnavailable(f"{variable} names {path}, which does not exist")
    return path


def _load_controlnet(path: Path, model: SdxlPipeline) -> Any:
    try:
        class_name = json.loads((path / "config.json").read_text("utf-8")).get("_class_name")
        cls = ControlNetUnionModel if class_name == "ControlNetUnionModel" else ControlNetModel
        controlnet = cls.from_pretrained(str(path), dtype=model.dtype, local_files_only=True)
    except (OSError, ValueError, RuntimeError) as error:
        raise ModelUnavailable(f"the ControlNet {path} cannot be loaded: {error}") from error
    return controlnet.to(model.device)


def _load_ip_adapter(path: Path) -> dict[str, dict[str, torch.Tensor]]:
    weights: dict[str, dict[str, torch.Tensor]] = {"image_proj": {}, "ip_adapter": {}}
    try:
        for key, tensor in load_file(path).items():
            part, _, name = key.partition(".")
            if part in weights:
                weights[part][name] = tensor
    except (OSError, SafetensorError) as error:
        raise ModelUnavailable(f"the IP-Adapter {path} cannot be loaded: {error}") from error
    if not all(weights.values()):
        raise ModelUnavailable(f"{path} holds no IP-Adapter: it lacks the tensors image_proj.* or ip_adapter.*")
    return weights


def _load_image_encoder(path: Path, model: SdxlPipeline) -> Any:
    try:
        encoder = CLIPVisionModelWithProjection.from_pretrained(str(path), dtype=model.dtype, local_files_only=True)
    except (OSError, ValueError, RuntimeError) as error:
        raise ModelUnavailable(f"the image encoder {path} cannot be loaded: {error}") from error
    return encoder.to(model.device)
