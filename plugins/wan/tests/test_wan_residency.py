"""On a device too small for the whole model its parts take turns, and the frames are the same."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import attrs
import numpy as np
import pytest
import torch
from ourvidz_wan import plugin
from ourvidz_wan.arguments import GenerateArguments
from ourvidz_wan.checkpoints import WanModels, load_models
from ourvidz_wan.decoding import Decoder, Frames
from ourvidz_wan.job_types import JOB_TYPES
from ourvidz_wan.prediction import LocalPredictor
from ourvidz_wan.sampling import decode, sample
from ourvidz_wan.tasks import TASKS

from ourvidz_core.engine.device_memory import GIB
from ourvidz_core.engine.models import ModelCache
from ourvidz_core.testing.doubles import RecordingContext

T2V = TASKS["t2v-1.3B"]


def test_parts_take_turns_on_a_small_device(
    models: WanModels,
    model_dir: Path,
    asking: Callable[..., GenerateArguments],
    pictures: dict[str, Path],
) -> None:
    arguments = asking(frame_num=5, sample_steps=2, first_frame=pictures["lake"])
    fresh = attrs.evolve(models, texts=type(models.texts)(), stills=type(models.stills)())
    expected = sample(arguments, fresh, lambda step, total: None)
    sizes = {name: sum(p.nbytes for p in part.parameters()) for name, part in models.parts.items()}
    there: list[set[str]] = []
    # On a CPU that counts as the device, weights move all the same, from one place in main memory to another.
    # The VAE is by far the largest of the small model's parts.
    cache = ModelCache(sizes["vae"] * 1.01 / GIB, find_device=lambda: torch.device("cpu"))
    loaded = cache.get("wan", lambda: load_models(model_dir, T2V), parts=lambda model: model.parts)

    made = sample(
        arguments,
        attrs.evolve(loaded, residence=cache.residence("wan")),
        lambda step, total: there.append(set(cache.on_device)),
    )

    assert all("wan (transformer)" in names and "wan (vae)" not in names for names in there)
    assert set(cache.on_device) == {"wan (vae)"}
    assert np.array_equal(made.frames, expected.frames)


def test_a_video_whose_decoding_runs_out_of_memory_in_the_middle_is_whole(
    models: WanModels, model_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    latents = torch.randn(1, 16, 3, 8, 8, generator=torch.Generator().manual_seed(5))
    expected = decode(models, latents)
    cache = ModelCache(find_device=lambda: torch.device("cpu"))
    cache.get("another", lambda: torch.nn.Linear(4, 4))
    loaded = cache.get("wan", lambda: load_models(model_dir, T2V), parts=lambda model: model.parts)
    whole = Decoder.chunks

    def chunks(decoder: Decoder, given: torch.Tensor) -> Iterator[Frames]:
        for number, frames in enumerate(whole(decoder, given)):
            if number == 1 and "another" in cache.on_device:
                raise torch.OutOfMemoryError("CUDA out of memory")
            yield frames

    monkeypatch.setattr(Decoder, "chunks", chunks)
    made = decode(attrs.evolve(loaded, residence=cache.residence("wan")), latents)

    assert np.array_equal(made, expected)
    assert (cache.traffic.retries, set(cache.on_device)) == (1, {"wan (vae)"})


def test_graphs_go_before_the_weights_that_they_were_recorded_on(
    model_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    there: list[set[str]] = []
    cache = ModelCache(0.1, find_device=lambda: torch.device("cpu"))
    monkeypatch.setattr(LocalPredictor, "forget_graphs", lambda _: there.append(set(cache.on_device)))
    context = RecordingContext(tmp_path, environ={"OURVIDZ_WAN_CKPT_DIR": str(model_dir)}, models=cache)
    plugin.warm_up(context=context, job_types=JOB_TYPES)
    (key,) = cache.keys
    assert there == []

    cache.get("another", lambda: torch.nn.Linear(4000, 6600))

    (names,) = there
    assert f"{key} (transformer)" in names
    assert set(cache.on_device) == {"another"}
