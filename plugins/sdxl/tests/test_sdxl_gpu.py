"""What only a GPU can show: half precision keeps the promises of single precision."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from ourvidz_sdxl.plugin import generate
from sdxl_support import job, made, pixels, warm_model

from ourvidz_core.engine.models import ModelCache
from ourvidz_core.testing.doubles import RecordingContext

pytestmark = [pytest.mark.gpu, pytest.mark.timeout(600)]


@pytest.fixture
def on_gpu(new_context: Callable[..., RecordingContext]) -> RecordingContext:
    return new_context(models=ModelCache(), device="cuda")


@pytest.mark.parametrize("solver", [None, "unipc", "dpm++"])
def test_image_of_a_batch_is_the_image_of_its_seed_on_the_gpu(on_gpu: RecordingContext, solver: str | None) -> None:
    batch = made(job(config={"seed": 40, "num_images": 3, "sample_solver": solver}), on_gpu)
    single = made(job(config={"seed": 42, "sample_solver": solver}), on_gpu)
    difference = np.abs(pixels(batch.artifacts[2]) - pixels(single.artifacts[0]))
    assert single.facts["device"] == "cuda"
    assert single.facts["dtype"] == "bfloat16"
    share = float(np.mean(difference <= 1))
    print(f"{solver}: {share:.4f} of the values within 1, the largest difference is {difference.max()}")
    assert share >= 0.99


def test_closer_reference_is_closer_on_the_gpu(on_gpu: RecordingContext, reference_png: Path) -> None:
    config = {"seed": 1, "num_images": 1}
    distances = []
    for strength in (0.3, 0.9):
        asked = job(
            reference=reference_png,
            config={**config, "reference_image_url": "https://a.test/r.png", "reference_strength": strength},
        )
        distances.append(made(asked, on_gpu).artifacts[0])
    exact = job(
        reference=reference_png,
        config={**config, "reference_image_url": "https://a.test/r.png", "reference_strength": 1.0},
    )
    nearest = pixels(made(exact, on_gpu).artifacts[0])
    far, near = (float(np.abs(pixels(artifact) - nearest).mean()) for artifact in distances)
    print(f"distance at 0.3: {far:.1f}, at 0.9: {near:.1f}")
    assert near < far


def test_graphs_and_compiling_change_nothing_but_noise(
    new_context: Callable[..., RecordingContext], monkeypatch: pytest.MonkeyPatch
) -> None:
    a_job = job(config={"seed": 40, "num_images": 3, "num_inference_steps": 8})
    pictures = {}
    for mode in ("off", "auto"):
        monkeypatch.setenv("OURVIDZ_COMPILE", mode)
        generation = made(a_job, new_context(models=ModelCache(), device="cuda"))
        pictures[mode] = [pixels(artifact) for artifact in generation.artifacts]
        print(f"{mode}: compiled {generation.facts['compiled']}")
    for plain, compiled in zip(pictures["off"], pictures["auto"], strict=True):
        difference = np.abs(plain - compiled)
        print(f"{np.mean(difference <= 2):.4f} of the values within 2, the largest difference is {difference.max()}")
        assert np.mean(difference <= 2) >= 0.98


def test_denoising_never_waits_for_the_device_to_read_from_it(on_gpu: RecordingContext) -> None:
    a_job = job(config={"seed": 40, "num_inference_steps": 8})
    made(a_job, on_gpu)
    base = warm_model(on_gpu).base
    own, waits = base.unet.forward, []

    def strict(*arguments: Any, **options: Any) -> Any:
        # From the first step on: what comes before the first is done while the device has nothing to do.
        torch.cuda.set_sync_debug_mode("error")
        waits.append(1)
        return own(*arguments, **options)

    base.unet.forward = strict
    try:
        generate(a_job, on_gpu)
    finally:
        torch.cuda.set_sync_debug_mode("default")
        base.unet.forward = own
    assert len(waits) == 8


def test_a_new_text_is_read_while_the_device_goes_on(on_gpu: RecordingContext) -> None:
    made(job(config={"seed": 40, "num_inference_steps": 2}), on_gpu)
    prompts = warm_model(on_gpu).prompts
    torch.cuda.set_sync_debug_mode("error")
    try:
        read = prompts.encode("a text that no job had", "and another")
    finally:
        torch.cuda.set_sync_debug_mode("default")
    prompts.forget_graphs()
    again = prompts.encode("a text that no job had ", "and another")
    assert torch.equal(read.prompt, again.prompt)
