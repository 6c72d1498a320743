"""The model leaves the device for another and comes back, and memory that was measured decides how many fit."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from sdxl_support import job, made, pixels

from ourvidz_core.engine.device_memory import GIB
from ourvidz_core.engine.models import ModelCache
from ourvidz_core.engine.working_memory import WorkingMemory
from ourvidz_core.plugins.residency import Work
from ourvidz_core.testing.doubles import RecordingContext

NewContext = Callable[..., RecordingContext]
STEPS = {"num_inference_steps": 2}


def cpu_as_device(memory: WorkingMemory | None = None) -> ModelCache:
    """Room for one model. On a CPU that counts as the device, weights move all the same."""
    return ModelCache(0.1, find_device=lambda: torch.device("cpu"), working_memory=memory)


def test_images_are_the_same_after_the_model_was_away(new_context: NewContext) -> None:
    models = cpu_as_device()
    before = made(job(config=STEPS), new_context(models=models))
    (key,) = models.keys
    assert models.on_device[key] > 0
    models.get("another", lambda: torch.nn.Linear(4000, 6000))
    assert key not in models.on_device

    after = made(job(config=STEPS), new_context(models=models))

    assert set(models.on_device) == {key}
    for one, other in zip(before.artifacts, after.artifacts, strict=True):
        assert np.array_equal(pixels(one), pixels(other))


def test_batches_are_as_large_as_what_was_measured_lets_them_be(new_context: NewContext) -> None:
    memory = WorkingMemory()
    models = cpu_as_device(memory)
    made(job(config=STEPS), new_context(models=models))
    (key,) = models.keys
    room = 0.1 * GIB - models.on_device[key]
    # Six images took a little more than there is: four would fit, and twice three are as fast.
    memory.note(key, Work(name="denoise", shape=(128, 128), rows=6), round(room * 1.2))

    generation = made(job(config={**STEPS, "num_images": 6}), new_context(models=models))

    assert generation.facts["batch_sizes"] == [3, 3]
