"""From a job to image files on a real pipeline with a tiny model; pixels are looked at."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import EulerAncestralDiscreteScheduler
from ourvidz_sdxl.plugin import generate
from sdxl_support import job, made, parsed, pixels, produced, warm_model

from ourvidz_core.engine.pictures import read_facts
from ourvidz_core.errors import JobCancelled, OutOfMemory, PayloadError, ReferenceUnavailable
from ourvidz_core.testing.doubles import RecordingContext
from ourvidz_core.wire.artifacts import Artifact

NewContext = Callable[..., RecordingContext]
#: Where the steps are not the point.
FEW_STEPS = {"num_inference_steps": 2}


def assert_same_picture(one: Artifact, other: Artifact) -> None:
    close = np.abs(pixels(one) - pixels(other)) <= 1
    assert close.mean() >= 0.99


def test_message_of_the_producer_becomes_three_different_images(new_context: NewContext) -> None:
    context = new_context()
    a_job = parsed(produced("sdxl_image_fast_n3"))
    generation = made(a_job, context)
    assert [artifact.seed for artifact in generation.artifacts] == [a_job.seed, a_job.seed + 1, a_job.seed + 2]
    digests = {hashlib.sha256(pixels(artifact).tobytes()).hexdigest() for artifact in generation.artifacts}
    assert len(digests) == 3
    for artifact in generation.artifacts:
        assert artifact.media_type == "image/png"
        assert (artifact.width, artifact.height) == (128, 128)
        assert pixels(artifact).shape == (128, 128, 3)
        assert pixels(artifact).std(axis=(0, 1)).min() > 10  # not a flat grey


def test_callback_is_told_what_ran(new_context: NewContext) -> None:
    facts = made(job(model_variant="lustify_sdxl", config={"seed": 5}), new_context()).facts
    assert facts == {
        "model": "tiny-sdxl",
        "model_variant": "lustify_sdxl",
        "device": "cpu",
        "dtype": "float32",
        "width": 128,
        "height": 128,
        "requested_width": 1024,
        "requested_height": 1024,
        "size_scale": 0.125,
        "steps": 15,
        "num_inference_steps": 15,
        "tier": "exact",
        "guidance_scale": 6.0,
        "scheduler": "EulerDiscreteScheduler",
        "compiled": False,
        "batch_sizes": [1],
        "prompt_chunks": 1,
        "negative_prompt_used": facts["negative_prompt_used"],
        "negative_prompt_source": "generated",
        "negative_terms_dropped": [],
        "reference_applied": False,
    }
    assert "worst quality" in facts["negative_prompt_used"]


def test_file_says_what_made_it(new_context: NewContext) -> None:
    a_job = job(prompt="a red fox", negative_prompt="text", config={"seed": 7, "num_images": 3, **FEW_STEPS})
    facts = read_facts(made(a_job, new_context()).artifacts[1].path)
    expected = {
        "prompt": "a red fox",
        "negative_prompt": "text",
        "seed": "8",
        "base_seed": "7",
        "width": "128",
        "height": "128",
        "steps": "2",
        "guidance_scale": "6.0",
        "scheduler": "EulerDiscreteScheduler",
        "model": "tiny-sdxl",
        "job_type": "sdxl_image_fast",
    }
    assert expected.items() <= facts.items()
    assert facts["digital_source_type"].endswith("trainedAlgorithmicMedia")


def test_same_job_makes_the_same_bytes(new_context: NewContext) -> None:
    first, second = (
        made(job(config={"seed": 3, "num_inference_steps": 4}), new_context()).artifacts[0].path.read_bytes()
        for _ in range(2)
    )
    assert first == second


def test_prompt_and_seed_and_guidance_change_the_picture(new_context: NewContext) -> None:
    few = {"seed": 3, "num_inference_steps": 4}
    base: dict[str, Any] = {"prompt": "a red fox", "config": few}
    others: list[dict[str, Any]] = [
        {"prompt": "a blue ship in a storm", "config": few},
        {"prompt": "a red fox", "config": {**few, "seed": 4}},
        {"prompt": "a red fox", "config": {**few, "guidance_scale": 12}},
        {"prompt": "a red fox", "config": few, "negative_prompt": "tree, river, mountain"},
        {"prompt": "a (red:1.6) fox", "config": few},
    ]
    picture = pixels(made(job(**base), new_context()).artifacts[0])
    for other in others:
        difference = np.abs(picture - pixels(made(job(**other), new_context()).artifacts[0]))
        assert difference.mean() > 0.1, other


@pytest.mark.parametrize("solver", [None, "unipc", "dpm++"])
@pytest.mark.parametrize("with_reference", [False, True], ids=["text", "reference"])
def test_image_of_a_batch_is_the_image_of_its_seed(
    new_context: NewContext, reference_png: Path, solver: str | None, with_reference: bool
) -> None:
    reference = reference_png if with_reference else None
    batch = job(
        config={"seed": 10, "num_images": 3, "sample_solver": solver, "num_inference_steps": 4}, reference=reference
    )
    single = job(config={"seed": 12, "sample_solver": solver, "num_inference_steps": 4}, reference=reference)
    images = made(batch, new_context())
    assert images.facts["batch_sizes"] == [3]
    assert_same_picture(images.artifacts[2], made(single, new_context()).artifacts[0])


@pytest.mark.parametrize("with_reference", [False, True], ids=["text", "reference"])
def test_noise_of_an_ancestral_scheduler_is_each_images_own(
    new_context: NewContext, reference_png: Path, with_reference: bool
) -> None:
    context = new_context()
    made(job(config=FEW_STEPS), context)
    model = warm_model(context)
    own = model._own_scheduler
    model._own_scheduler = EulerAncestralDiscreteScheduler.from_config(own.config)
    reference = reference_png if with_reference else None
    try:
        batch = made(
            job(config={"seed": 10, "num_images": 3, "num_inference_steps": 3}, reference=reference), new_context()
        )
        single = made(job(config={"seed": 12, "num_inference_steps": 3}, reference=reference), new_context())
    finally:
        model._own_scheduler = own
    assert single.facts["scheduler"] == "EulerAncestralDiscreteScheduler"
    assert_same_picture(batch.artifacts[2], single.artifacts[0])


@pytest.mark.parametrize(
    ("solver", "scheduler"),
    [
        (None, "EulerDiscreteScheduler"),
        ("unipc", "UniPCMultistepScheduler"),
        ("dpm++", "DPMSolverMultistepScheduler"),
    ],
)
def test_solver_of_the_message_samples(new_context: NewContext, solver: str | None, scheduler: str) -> None:
    context = new_context()
    config = {"sample_solver": solver, "num_inference_steps": 3}
    assert made(job(config=config), context).facts["scheduler"] == scheduler
    # The next job without a solver has the checkpoint's own again.
    assert made(job(config=FEW_STEPS), new_context()).facts["scheduler"] == "EulerDiscreteScheduler"


def test_a_second_job_with_the_same_texts_encodes_nothing_and_draws_the_same(new_context: NewContext) -> None:
    a_job = job(prompt="a tin robot on a red hill", config=FEW_STEPS)
    made(job(config=FEW_STEPS), new_context())
    base = warm_model(new_context()).base
    forwards: list[int] = []
    hooks = [
        encoder.register_forward_hook(lambda *_: forwards.append(1))
        for encoder in (base.text_encoder, base.text_encoder_2)
    ]
    try:
        first = made(a_job, new_context())
        encoded = len(forwards)
        second = made(a_job, new_context())
    finally:
        for hook in hooks:
            hook.remove()
    assert encoded > 0
    assert len(forwards) == encoded
    assert np.array_equal(pixels(first.artifacts[0]), pixels(second.artifacts[0]))


def test_size_is_scaled_to_the_model(new_context: NewContext) -> None:
    generation = made(job(config={"size": "1152*896", "num_inference_steps": 2}), new_context())
    assert pixels(generation.artifacts[0]).shape == (112, 144, 3)
    assert (generation.facts["width"], generation.facts["requested_width"]) == (144, 1152)


def test_size_above_the_models_limit_is_refused(new_context: NewContext, tiny_model: Path, tmp_path: Path) -> None:
    limited = tmp_path / "limited"
    limited.mkdir()
    for part in tiny_model.iterdir():
        (limited / part.name).symlink_to(part)
    (limited / "variant.toml").unlink()
    (limited / "variant.toml").write_text("size_scale = 0.125\nmax_pixels = 16384\n", "utf-8")
    with pytest.raises(PayloadError, match=r"\$\.config: expected at most 1048576 pixels"):
        made(job(config={"width": 2048, "height": 1024}), new_context(model=limited))


def test_files_can_be_written_after_the_next_job_was_drawn(new_context: NewContext) -> None:
    jobs = [job(config={"seed": seed, "num_images": 3, **FEW_STEPS}) for seed in (3, 30)]
    alone = [[pixels(artifact) for artifact in made(a_job, new_context()).artifacts] for a_job in jobs]
    contexts = [new_context() for _ in jobs]
    generations = [generate(a_job, context) for a_job, context in zip(jobs, contexts, strict=True)]
    assert not any(list(context.work_dir.iterdir()) for context in contexts)
    for generation, expected in reversed(list(zip(generations, alone, strict=True))):
        for artifact, picture in zip(generation.finish(), expected, strict=True):
            assert np.array_equal(pixels(artifact), picture)


def test_progress_is_told_at_every_step(new_context: NewContext) -> None:
    context = new_context()
    made(job(config={"num_images": 3, "num_inference_steps": 4}), context)
    assert context.steps == [("denoise", step, 4) for step in (1, 2, 3, 4)]


def test_job_stops_where_progress_says_so(new_context: NewContext) -> None:
    class Cancelled(RecordingContext):
        def progress(self, step: int, total: int, *, stage: str = "generate") -> None:
            super().progress(step, total, stage=stage)
            if step == 2:
                raise JobCancelled("stop")

    context = new_context(kind=Cancelled)
    with pytest.raises(JobCancelled):
        made(job(), context)
    assert [step for _, step, _ in context.steps] == [1, 2]


def test_without_guidance_no_negative_prompt_is_claimed(new_context: NewContext) -> None:
    facts = made(
        job(config={"guidance_scale": 1, "num_inference_steps": 2}, negative_prompt="text"), new_context()
    ).facts
    assert facts["negative_prompt_used"] is None
    assert facts["guidance_scale"] == 1.0


def test_negative_prompt_beyond_the_budget_loses_whole_terms(new_context: NewContext) -> None:
    terms = [f"bad {word} tree{index}" for index, word in enumerate(["cat", "dog", "fox", "house"] * 10)]
    facts = made(job(negative_prompt=", ".join(terms), prompt="two women", config=FEW_STEPS), new_context()).facts
    kept = facts["negative_prompt_used"].split(", ")
    assert kept == terms[: len(kept)]
    assert facts["negative_terms_dropped"][: len(terms) - len(kept)] == terms[len(kept) :]
    assert "merged bodies" in facts["negative_terms_dropped"]
    assert facts["negative_prompt_source"] == "job"


def test_several_people_reach_the_negative_prompt(new_context: NewContext) -> None:
    facts = made(job(prompt="two women", negative_prompt="text", config=FEW_STEPS), new_context()).facts
    assert facts["negative_prompt_used"].startswith("text, merged bodies, extra heads, extra limbs")


def test_long_prompt_is_drawn(new_context: NewContext) -> None:
    prompt = "a red cat near the old house, " * 12
    assert made(job(prompt=prompt, config=FEW_STEPS), new_context()).facts["prompt_chunks"] == 2


class ForgetfulUnet:
    """Makes the UNet run out of memory above a number of rows, as a small device would."""

    def __init__(self, unet: Any, max_images: int, error: Callable[[str], Exception]) -> None:
        self._hook = unet.register_forward_pre_hook(self._refuse)
        self._max_rows = 2 * max_images  # with guidance each image takes two
        self._error = error

    def _refuse(self, _: Any, arguments: tuple[Any, ...]) -> None:
        if arguments[0].shape[0] > self._max_rows:
            raise self._error("CUDA out of memory. Tried to allocate 20.00 MiB")

    def __enter__(self) -> None:
        return None

    def __exit__(self, *_: object) -> None:
        self._hook.remove()


@pytest.mark.parametrize(
    ("count", "fits", "batch_sizes", "error"),
    [
        (6, 3, [3, 3], torch.OutOfMemoryError),
        (6, 2, [1, 1, 1, 1, 1, 1], RuntimeError),
        (3, 1, [1, 1, 1], torch.OutOfMemoryError),
    ],
)
def test_batch_is_halved_until_it_fits(
    new_context: NewContext, count: int, fits: int, batch_sizes: list[int], error: Callable[[str], Exception]
) -> None:
    context = new_context()
    config = {"seed": 20, "num_images": count, "num_inference_steps": 2}
    whole = made(job(config=config), context)
    context = new_context()
    with ForgetfulUnet(warm_model(context).base.unet, fits, error):
        halved = made(job(config=config), context)
    assert halved.facts["batch_sizes"] == batch_sizes
    assert context.steps[-1] == ("denoise", 2 * len(batch_sizes), 2 * len(batch_sizes))
    for one, other in zip(whole.artifacts, halved.artifacts, strict=True):
        assert_same_picture(one, other)


def test_image_that_does_not_fit_alone_is_out_of_memory(new_context: NewContext) -> None:
    made(job(config=FEW_STEPS), new_context())
    context = new_context()
    with (
        ForgetfulUnet(warm_model(context).base.unet, 0, torch.OutOfMemoryError),
        pytest.raises(OutOfMemory, match="one image of 128x128 does not fit"),
    ):
        made(job(config={"num_images": 3}), context)


def test_other_error_of_the_model_is_not_taken_for_a_lack_of_memory(new_context: NewContext) -> None:
    made(job(config=FEW_STEPS), new_context())
    context = new_context()
    with (
        ForgetfulUnet(warm_model(context).base.unet, 0, lambda _: RuntimeError("CUDA error: misaligned address")),
        pytest.raises(RuntimeError, match="misaligned"),
    ):
        made(job(), context)


def test_reference_that_was_not_fetched_is_no_reason_to_go_on_without(new_context: NewContext) -> None:
    a_job = parsed(produced("sdxl_image_fast_ref_style"))
    with pytest.raises(ReferenceUnavailable):
        made(a_job, new_context())
