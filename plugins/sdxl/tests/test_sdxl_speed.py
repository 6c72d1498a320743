"""What makes a UNet and a decoder fast changes nothing of what they make."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import EulerDiscreteScheduler, StableDiffusionXLPipeline
from ourvidz_sdxl.config import Solver
from ourvidz_sdxl.pictures import DevicePicture
from ourvidz_sdxl.pipeline import DrawnImages, ImageRequest, SdxlPipeline, load_pipeline
from ourvidz_sdxl.references import Samplings
from ourvidz_sdxl.schedulers import scheduler_for
from ourvidz_sdxl.settings import SdxlSettings
from ourvidz_sdxl.speed import FastUnet, fuse_projections
from ourvidz_sdxl.variants import SdxlVariant

from ourvidz_core.engine.compilation import CompiledCall
from ourvidz_core.errors import GenerationError


@pytest.fixture(scope="module")
def plain(tiny_model: Path) -> StableDiffusionXLPipeline:
    pipeline = StableDiffusionXLPipeline.from_pretrained(str(tiny_model), add_watermarker=False)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@pytest.fixture(scope="module")
def model(tiny_model: Path) -> SdxlPipeline:
    loaded = load_pipeline(tiny_model, device="cpu", variant=SdxlVariant())
    fuse_projections(loaded.base.unet)  # as on a GPU
    return loaded


def test_a_draw_does_not_look_at_each_module_to_find_its_device(
    model: SdxlPipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert model.base._execution_device == StableDiffusionXLPipeline._execution_device.fget(model.base)
    monkeypatch.setattr(torch.nn.Module, "modules", None)
    drawn(model)


def drawn(model: SdxlPipeline, solver: Solver | None = None) -> DrawnImages:
    request = ImageRequest(
        prompt="a red fox",
        negative_prompt="text",
        seeds=(3, 4),
        width=128,
        height=96,
        num_inference_steps=3,
        guidance_scale=5.0,
        solver=solver,
    )
    return model.draw(request, sampling=Samplings(SdxlSettings()), on_step=lambda step, total, latents: None)


@pytest.mark.parametrize("solver", [None, Solver.UNIPC, Solver.DPM])
def test_pictures_are_those_of_plain_diffusers(
    model: SdxlPipeline, plain: StableDiffusionXLPipeline, solver: Solver | None
) -> None:
    plain.scheduler = scheduler_for(solver, plain.scheduler)
    if solver is None:
        plain.scheduler = EulerDiscreteScheduler.from_config(model.base.scheduler.config)
    generators = [torch.Generator().manual_seed(seed) for seed in (3, 4)]
    theirs = plain(
        ["a red fox"] * 2,
        negative_prompt=["text"] * 2,
        width=128,
        height=96,
        num_inference_steps=3,
        guidance_scale=5.0,
        generator=generators,
    ).images
    for ours, image in zip(drawn(model, solver).pictures, theirs, strict=True):
        difference = np.abs(np.asarray(ours.image()).astype(int) - np.asarray(image).astype(int))
        assert difference.max() <= 1  # one product in place of three is summed in another order


def test_the_single_layers_of_a_fused_one_do_what_they_did(
    model: SdxlPipeline, plain: StableDiffusionXLPipeline
) -> None:
    parts = dict(model.base.unet.named_modules())
    compared = 0
    for name, layer in plain.unet.named_modules():
        if name.endswith(("to_q", "to_k", "to_v")):
            values = torch.randn(2, 5, layer.in_features)
            assert torch.allclose(parts[name](values), layer(values), atol=1e-6)
            compared += 1
    assert compared > 6
    # Each weight is there once.
    assert sum(p.numel() for p in model.base.unet.parameters()) == sum(p.numel() for p in plain.unet.parameters())


class Calls:
    """A UNet's forward that counts its calls."""

    def __init__(self, forward: Any) -> None:
        self._forward = forward
        self.count = 0

    def __call__(self, *arguments: Any, **options: Any) -> Any:
        self.count += 1
        return self._forward(*arguments, **options)


@pytest.fixture
def compiled(plain: StableDiffusionXLPipeline) -> Iterator[Calls]:
    """What stands for the compiled forward of the plain UNet, which is left as it was."""
    own = plain.unet.forward
    yield Calls(own)
    plain.unet.forward = own


def call(unet: Any, rows: int, size: int = 8) -> torch.Tensor:
    config = unet.config
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        made: torch.Tensor = unet(
            torch.randn(rows, config.in_channels, size, size, generator=generator),
            torch.tensor(5.0),
            encoder_hidden_states=torch.randn(rows, 77, config.cross_attention_dim, generator=generator),
            added_cond_kwargs={"text_embeds": torch.ones(rows, 64), "time_ids": torch.ones(rows, 6)},
            return_dict=False,
        )[0]
    return made


def test_who_changes_the_unet_gets_none_of_its_kernels(plain: StableDiffusionXLPipeline, compiled: Calls) -> None:
    unet = plain.unet
    fast = FastUnet(unet, CompiledCall(unet.forward, name="the UNet", compiled=compiled))
    expected = call(unet, 2)
    assert (compiled.count, fast.ran_compiled) == (1, True)
    with fast.as_it_came():
        assert torch.equal(call(unet, 2), expected)
    assert (compiled.count, fast.ran_compiled) == (1, False)
    call(unet, 6, size=16)
    assert (compiled.count, fast.ran_compiled) == (2, True)


def test_a_unet_that_cannot_be_compiled_draws_and_says_so(plain: StableDiffusionXLPipeline) -> None:
    import torch._dynamo.exc

    def broken(*_: Any, **__: Any) -> Any:
        raise torch._dynamo.exc.InternalTorchDynamoError("no kernels today")

    unet = plain.unet
    own = unet.forward
    expected = call(unet, 2)
    fast = FastUnet(unet, CompiledCall(unet.forward, name="the UNet", compiled=broken))
    try:
        assert torch.equal(call(unet, 2), expected)
        assert not fast.ran_compiled
        assert not fast.may_be_compiled
    finally:
        unet.forward = own


def test_a_picture_that_is_no_number_is_found_when_it_is_asked_for() -> None:
    picture = DevicePicture.send(torch.zeros(8, 8, 3, dtype=torch.uint8), torch.tensor(False))
    with pytest.raises(GenerationError, match="not a number"):
        picture.image()
