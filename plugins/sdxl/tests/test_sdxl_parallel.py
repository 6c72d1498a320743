"""The images of one job on several GPUs: who draws what, equal files, and ranks that die, stop or cannot."""

from __future__ import annotations

import os
import shutil
import signal
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
import psutil
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from ourvidz_sdxl import plugin
from ourvidz_sdxl.doctor import gpu_findings
from ourvidz_sdxl.job_types import JOB_TYPES
from ourvidz_sdxl.parallel import ranks
from ourvidz_sdxl.parallel.plan import deal
from ourvidz_sdxl.parallel.ranks import DrawingRanks, ranks_of
from ourvidz_sdxl.settings import SdxlSettings
from sdxl_support import job, made, pixels

from ourvidz_core.doctor.gpus import Gpu, GpuReport
from ourvidz_core.engine.models import ModelCache
from ourvidz_core.engine.protocol import encode_error
from ourvidz_core.errors import (
    EngineUnusable,
    GenerationError,
    JobCancelled,
    JobTimeout,
    ModelUnavailable,
    OutOfMemory,
)
from ourvidz_core.testing.doubles import RecordingContext
from ourvidz_core.testing.ranks import outlive_lost_ranks
from ourvidz_core.wire.artifacts import Generation
from ourvidz_core.wire.payloads import Payload

NewContext = Callable[..., RecordingContext]


@given(images=st.integers(1, 40), gpus=st.integers(1, 12))
def test_every_image_is_dealt_once_and_no_gpu_has_two_more_than_another(images: int, gpus: int) -> None:
    parts = deal(images, gpus)
    assert [image for part in parts for image in part] == list(range(images))
    assert len(parts) == min(images, gpus)
    assert len(parts[0]) - len(parts[-1]) in (0, 1)


@pytest.mark.parametrize(
    ("gpus", "seen", "expected"),
    [(1, 0, []), (2, 2, ["green"]), (2, 1, ["red"]), (8, 8, ["yellow"])],
    ids=["one", "as many as there are", "more than there are", "more than images"],
)
def test_doctor_compares_the_setting_with_what_is_there(gpus: int, seen: int, expected: Sequence[str]) -> None:
    report = GpuReport(
        gpus=tuple(Gpu(index=index, name="X", free_gb=80.0, total_gb=80.0, capability="9.0") for index in range(seen))
    )
    assert [finding.level.value for finding in gpu_findings(SdxlSettings(gpus=gpus), lambda: report)] == expected


def test_more_gpus_than_are_there_are_refused_with_the_setting(new_context: NewContext) -> None:
    with pytest.raises(GenerationError, match=r"shall use 64 GPUs .* lower OURVIDZ_SDXL_GPUS"):
        made(job(config={"num_images": 3}), new_context(device="cuda", gpus=64))


@pytest.fixture(scope="module")
def environment(tiny_model: Path) -> Iterator[pytest.MonkeyPatch]:
    """What ranks read their settings from."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OURVIDZ_SDXL_MODEL", str(tiny_model))
        patch.setenv("OMP_NUM_THREADS", "1")
        yield patch


@pytest.fixture(scope="module")
def two(environment: pytest.MonkeyPatch) -> Iterator[DrawingRanks]:
    """Two ranks, warm for all tests of this file."""
    yield ranks_of(2, "cpu")
    assert ranks._ranks is not None
    ranks._ranks.close()


def assert_same_files(one: Generation, other: Generation) -> None:
    """What a batch of another size changes of a picture on a processor is less than one shade."""
    for ours, theirs in zip(one.artifacts, other.artifacts, strict=True):
        assert ours.seed == theirs.seed
        assert np.abs(pixels(ours) - pixels(theirs)).max() <= 1


def test_images_of_two_gpus_are_those_of_one_in_their_order(two: DrawingRanks, new_context: NewContext) -> None:
    a_job = job(config={"seed": 20, "num_images": 3, "num_inference_steps": 3})
    alone = made(a_job, new_context())
    context = new_context(gpus=2)
    shared = made(a_job, context)
    assert_same_files(shared, alone)
    assert (shared.facts["gpus"], shared.facts["batch_sizes"]) == (2, [2, 1])
    assert "gpus" not in alone.facts
    assert list(dict.fromkeys(context.steps)) == [("denoise", step, 3) for step in (1, 2, 3)]
    # Batches of the same sizes on one GPU make the same bits.
    third = made(job(config={"seed": 22, "num_inference_steps": 3}), new_context(gpus=2))
    assert third.facts["gpus"] == 1
    assert np.array_equal(pixels(shared.artifacts[2]), pixels(third.artifacts[0]))


@pytest.mark.parametrize(
    "error",
    [JobCancelled("asked for"), pytest.param(JobTimeout("too late"), marks=pytest.mark.slow)],
    ids=["cancelled", "too late"],
)
def test_a_job_that_stops_in_between_leaves_the_ranks_ready(
    two: DrawingRanks, new_context: NewContext, error: Exception
) -> None:
    class Stopped(RecordingContext):
        def progress(self, step: int, total: int, *, stage: str = "generate") -> None:
            super().progress(step, total, stage=stage)
            if step == 1:
                raise error

    context = new_context(kind=Stopped, gpus=2)
    with pytest.raises(type(error)):
        made(job(config={"num_images": 3, "num_inference_steps": 50}), context)
    assert context.steps == [("denoise", 1, 50)]
    pids = two.followers.pids
    a_job = job(config={"seed": 5, "num_images": 3, "num_inference_steps": 2})
    assert_same_files(made(a_job, new_context(gpus=2)), made(a_job, new_context()))
    assert two.followers.pids == pids
    # The stopped one's fifty steps were not made.
    assert not two._parts


@pytest.mark.slow
@pytest.mark.parametrize("reference_type", ["style", "character", "composition"])
def test_references_act_on_all_gpus(
    two: DrawingRanks, new_context: NewContext, reference_png: Path, reference_type: str
) -> None:
    asked = {"reference_image_url": "https://a.test/r.png", "reference_strength": 0.6, "reference_type": reference_type}
    config = {"seed": 9, "num_images": 3, "num_inference_steps": 6, **asked}
    shared = made(job(reference=reference_png, config=config), new_context(gpus=2))
    alone = made(job(reference=reference_png, config=config), new_context())
    assert shared.facts["reference_method"] == alone.facts["reference_method"] == "img2img"
    assert_same_files(shared, alone)


@pytest.mark.slow
def test_all_gpus_take_the_steps_of_the_fast_tier(two: DrawingRanks, new_context: NewContext) -> None:
    a_job = job(config={"seed": 9, "num_images": 3, "num_inference_steps": 11, "tier": "fast"})
    context = new_context(gpus=2)
    shared = made(a_job, context)
    assert_same_files(shared, made(a_job, new_context()))
    assert (shared.facts["gpus"], shared.facts["steps"], shared.facts["steps_computed"]) == (2, 11, 8)
    assert list(dict.fromkeys(context.steps)) == [("denoise", step, 8) for step in range(1, 9)]


@pytest.mark.slow
def test_a_model_that_no_rank_can_load_is_the_jobs_error_and_not_the_ranks(
    two: DrawingRanks, new_context: NewContext, tmp_path: Path
) -> None:
    made(job(config={"num_images": 3, "num_inference_steps": 1}), new_context(gpus=2))
    with pytest.raises(ModelUnavailable, match="nothing"):
        made(job(config={"num_images": 3}), new_context(model=tmp_path / "nothing", gpus=2))
    a_job = job(config={"seed": 5, "num_images": 3, "num_inference_steps": 2})
    assert made(a_job, new_context(gpus=2)).facts["gpus"] == 2
    assert two.followers.is_well


@pytest.mark.slow
def test_what_leaves_the_first_gpu_for_another_job_leaves_the_others(
    two: DrawingRanks, new_context: NewContext, tiny_model: Path, tmp_path: Path
) -> None:
    """On a processor weights have nowhere to wait, and are read again."""
    model = tmp_path / "model"
    shutil.copytree(tiny_model, model)
    a_job = job(config={"seed": 5, "num_images": 3, "num_inference_steps": 2})
    kept, left = ModelCache(), ModelCache()
    for models in (kept, left, kept):
        made(a_job, new_context(models=models, model=model, gpus=2))
    shutil.rmtree(model)
    made(a_job, new_context(models=kept, model=model, gpus=2))
    left.clear()
    with pytest.raises(ModelUnavailable, match=rf"rank 1 .*: there is no SDXL model at {model}"):
        made(a_job, new_context(models=kept, model=model, gpus=2))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("sent", "said"), [(signal.SIGKILL, "died: signal SIGKILL"), (signal.SIGSTOP, "has not answered for 3 s")]
)
def test_a_rank_that_is_gone_becomes_an_error_that_is_tried_again(
    environment: pytest.MonkeyPatch, new_context: NewContext, monkeypatch: pytest.MonkeyPatch, sent: int, said: str
) -> None:
    world = DrawingRanks(2, "cpu", silent_seconds=3.0)
    monkeypatch.setattr(ranks, "_ranks", world)
    (follower,) = map(psutil.Process, world.followers.pids)

    class Hurt(RecordingContext):
        def progress(self, step: int, total: int, *, stage: str = "generate") -> None:
            super().progress(step, total, stage=stage)
            if step == 1:
                os.kill(follower.pid, sent)

    with pytest.raises(EngineUnusable, match=rf"rank 1 \(cpu, process {follower.pid}\) {said}") as raised:
        made(job(config={"num_images": 3, "num_inference_steps": 8}), new_context(kind=Hurt, gpus=2))
    assert raised.value.is_transient
    assert not follower.is_running()


@pytest.mark.slow
def test_a_lack_of_memory_on_another_gpu_is_one_of_the_job(
    environment: pytest.MonkeyPatch, new_context: NewContext, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As a rank says it where not even one image fits; no processor runs out of a GPU's memory."""
    world = DrawingRanks(2, "cpu")
    monkeypatch.setattr(ranks, "_ranks", world)
    said = encode_error(OutOfMemory("one image of 128x128 does not fit into the memory of cuda"))
    models = ModelCache()
    freed: list[str] = []
    monkeypatch.setattr(models, "free_others", lambda: freed.append("the first GPU"))

    class Full(RecordingContext):
        def progress(self, step: int, total: int, *, stage: str = "generate") -> None:
            super().progress(step, total, stage=stage)
            if step == 2:
                ((_, number),) = world._parts
                world._hear(1, {"kind": "broken", "number": number, "error": said})

    try:
        with pytest.raises(OutOfMemory, match=r"rank 1 \(cpu, process \d+\): one image of 128x128 does not fit"):
            made(
                job(config={"num_images": 3, "num_inference_steps": 30}), new_context(kind=Full, models=models, gpus=2)
            )
    finally:
        world.close()
    assert not freed


@pytest.mark.slow
def test_four_gpus_share_six_images_and_warm_up_together(
    environment: pytest.MonkeyPatch, new_context: NewContext, monkeypatch: pytest.MonkeyPatch
) -> None:
    world = DrawingRanks(4, "cpu")
    monkeypatch.setattr(ranks, "_ranks", world)
    try:
        context = new_context(gpus=4)
        plugin.warm_up(context=context, job_types=JOB_TYPES)
        assert set(context.steps) == {("generate", 1, 1)}
        a_job = job(config={"seed": 20, "num_images": 6, "num_inference_steps": 3})
        shared = made(a_job, new_context(gpus=4))
    finally:
        world.close()
    assert (shared.facts["gpus"], shared.facts["batch_sizes"]) == (4, [2, 2, 1, 1])
    assert_same_files(shared, made(a_job, new_context()))
    assert not any(map(psutil.pid_exists, world.followers.pids))


@pytest.mark.slow
def test_an_engine_that_lost_a_rank_is_replaced_with_all_its_ranks(tiny_model: Path, tmp_path: Path) -> None:
    config = {"num_inference_steps": 6, "num_images": 3, "seed": 1}
    finished = outlive_lost_ranks(
        Payload(id="job-1", type="sdxl_image_fast", prompt="a cat", user_id="user-1", config=config),
        {
            "OURVIDZ_SDXL_MODEL": str(tiny_model),
            "OURVIDZ_SDXL_GPUS": "2",
            "OURVIDZ_DEVICE": "cpu",
            "OMP_NUM_THREADS": "1",
        },
        module="ourvidz_sdxl.parallel.follower",
        work_dir=tmp_path,
    )
    assert finished.generation.facts["gpus"] == 2
    assert len(finished.generation.artifacts) == 3


@pytest.mark.gpu
@pytest.mark.timeout(600)
def test_two_real_gpus_make_the_images_of_one(
    environment: pytest.MonkeyPatch, new_context: NewContext, monkeypatch: pytest.MonkeyPatch
) -> None:
    if torch.cuda.device_count() < 2:
        pytest.skip("this machine has fewer than two GPUs")
    world = DrawingRanks(2, "cuda")
    monkeypatch.setattr(ranks, "_ranks", world)
    models = ModelCache()
    a_job = job(config={"seed": 20, "num_images": 6, "num_inference_steps": 8})
    try:
        plugin.warm_up(context=new_context(models=models, device="cuda", gpus=2), job_types=JOB_TYPES)
        shared = made(a_job, new_context(models=models, device="cuda", gpus=2))
        again = made(a_job, new_context(models=models, device="cuda", gpus=2))
    finally:
        world.close()
    # In batches as large as the parts were: another size rounds otherwise in half precision.
    halves = [
        made(
            job(config={"seed": seed, "num_images": 3, "num_inference_steps": 8}),
            new_context(models=models, device="cuda"),
        )
        for seed in (20, 23)
    ]
    assert (shared.facts["gpus"], shared.facts["batch_sizes"]) == (2, [3, 3])
    alone = [artifact for half in halves for artifact in half.artifacts]
    for ours, repeated, theirs in zip(shared.artifacts, again.artifacts, alone, strict=True):
        for what, other in (("one GPU's", theirs), ("its own again", repeated)):
            difference = np.abs(pixels(ours) - pixels(other))
            print(f"seed {ours.seed}, {what}: {np.mean(difference == 0):.4f} equal, at most {difference.max()} apart")
            assert np.mean(difference <= 1) >= 0.99
