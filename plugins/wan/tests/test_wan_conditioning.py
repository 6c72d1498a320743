"""References change the pixels they should change, exactly where they should."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from diffusers import WanPipeline
from ourvidz_wan.checkpoints import make_scheduler
from ourvidz_wan.conditioning import (
    FrameConditioner,
    image_start_sigma,
    pinned,
    resembling,
    schedule_from,
)
from ourvidz_wan.config import Solver
from ourvidz_wan.sampling import decode, encode_still, fit_image, sample
from PIL import Image

SIZE = (48, 80)
PINS = {"start": ("first_frame",), "end": ("last_frame",), "both": ("first_frame", "last_frame")}
PLACES = {"first_frame": 0, "last_frame": -1}


def quietly(step: int, total: int) -> None:
    """Nobody watches."""


def psnr(shown: np.ndarray, wanted: np.ndarray) -> float:
    error = np.mean((shown.astype(float) - wanted.astype(float)) ** 2)
    return float("inf") if error == 0 else float(10 * np.log10(255**2 / error))


@pytest.fixture
def encoded(models, pictures):
    """What each pin must end as: a picture alone at the start, the last of a still clip at the end."""

    def encode(option, picture, frames):
        image = fit_image(pictures[picture], SIZE)
        if option == "first_frame":
            return encode_still(models, image, 1)[:, :, 0]
        return encode_still(models, image, frames)[:, :, -1]

    return encode


@pytest.mark.parametrize("steps", [25, 50])
@pytest.mark.parametrize("solver", ["unipc", "dpm++"])
@pytest.mark.parametrize("mode", PINS)
def test_pinned_latents_end_as_the_encoded_references(mode, solver, steps, models, asking, pictures, encoded):
    shown = dict(zip(PINS[mode], ("lake", "fire"), strict=False))
    options = {option: pictures[picture] for option, picture in shown.items()}
    made = sample(asking(sample_solver=solver, sample_steps=steps, **options), models, quietly)
    for option, picture in shown.items():
        wanted = encoded(option, picture, 9)
        error = (made.latents[:, :, PLACES[option]] - wanted).norm() / wanted.norm()
        assert error < 1e-4
    assert made.facts["reference_applied"] is True
    assert made.facts["reference_method"] == "pinned_frames"


def test_the_first_frame_shows_the_start_picture(models, asking, pictures, encoded):
    made = sample(asking(first_frame=pictures["lake"], sample_steps=25), models, quietly)
    round_trip = decode(models, encoded("first_frame", "lake", 9)[:, :, None])
    assert psnr(made.frames[0], round_trip[0]) > 45


@pytest.mark.parametrize("option", ["first_frame", "last_frame", "image"])
def test_another_picture_changes_the_other_frames_too(option, models, asking, pictures):
    lake, fire = (sample(asking(**{option: pictures[name]}), models, quietly).latents for name in ("lake", "fire"))
    others = {"first_frame": slice(1, None), "last_frame": slice(None, -1), "image": slice(1, None)}[option]
    difference = (lake - fire)[:, :, others].flatten(3).norm(dim=(1, 3))
    assert (difference > 0.1).all()


def test_a_stronger_single_reference_is_met_more_closely(models, asking, pictures, encoded):
    wanted = encoded("first_frame", "rings", 9)
    distances = []
    for strength in (0.1, 0.3, 0.5, 0.7, 0.85, 1.0):
        asked = asking(image=pictures["rings"], reference_strength=strength, sample_steps=10)
        distances.append(float((sample(asked, models, quietly).latents[:, :, 0] - wanted).norm() / wanted.norm()))
    assert distances == sorted(distances, reverse=True)
    assert distances[-1] < 1e-4


def test_a_stronger_reference_makes_an_image_closer_to_it(models, asking, pictures, encoded):
    wanted = encoded("first_frame", "rings", 1)
    distances = []
    for strength in (0.1, 0.3, 0.5, 0.7, 0.9, 1.0):
        asked = asking(frame_num=1, image=pictures["rings"], reference_strength=strength, sample_steps=10)
        made = sample(asked, models, quietly)
        assert made.frames.shape == (1, 80, 48, 3)
        assert made.facts["reference_method"] == "image_to_image"
        distances.append(float((made.latents[:, :, 0] - wanted).norm() / wanted.norm()))
    assert distances == sorted(distances, reverse=True)


@pytest.mark.parametrize("solver", [Solver.UNIPC, Solver.DPM])
@pytest.mark.parametrize("frames", [1, 9])
def test_without_references_it_is_plain_text_to_video(frames, solver, models, asking):
    asked = asking(sample_solver=solver.value, frame_num=frames, sample_steps=10)
    made = sample(asked, models, quietly)
    plain = WanPipeline(**{**models.pipeline.components, "scheduler": make_scheduler(solver, 5.0)})
    plain.set_progress_bar_config(disable=True)
    options = {
        "prompt": asked.prompt,
        "negative_prompt": models.variant.negative_prompt,
        "width": 48,
        "height": 80,
        "num_frames": frames,
        "num_inference_steps": 10,
        "guidance_scale": 5.0,
    }
    latents = plain(**options, generator=torch.Generator().manual_seed(5), output_type="latent").frames
    frames_of_plain = plain(**options, generator=torch.Generator().manual_seed(5), output_type="np").frames[0]
    assert torch.equal(made.latents, latents)
    assert np.array_equal(made.frames, (frames_of_plain * 255).round().astype(np.uint8))
    assert made.facts["reference_applied"] is False
    assert "reference_method" not in made.facts


def test_a_job_with_a_reference_leaves_nothing_behind_in_the_warm_model(models, asking, pictures):
    before = sample(asking(), models, quietly)
    sample(asking(first_frame=pictures["lake"], sample_solver="dpm++", sample_shift=3.0), models, quietly)
    after = sample(asking(), models, quietly)
    assert torch.equal(before.latents, after.latents)
    assert np.array_equal(before.frames, after.frames)


def test_the_gain_of_a_pin_reaches_less_far_as_the_noise_falls():
    conditioner = pinned(start=torch.zeros(1, 16, 1, 2, 2))
    reach = [float(conditioner.gain(sigma, 21)[5, 0]) for sigma in (0.999, 0.9, 0.7, 0.5, 0.2, 0.05)]
    assert reach == sorted(reach, reverse=True)
    assert reach[0] > 0.6
    assert reach[-1] < 0.01


def test_a_pinned_frame_follows_its_own_residual_completely():
    conditioner = pinned(start=torch.zeros(1, 16, 1, 2, 2), end=torch.zeros(1, 16, 1, 2, 2))
    for sigma in (0.999999, 0.5, 0.005):
        torch.testing.assert_close(conditioner.gain(sigma, 21)[[0, -1]], torch.eye(2, dtype=torch.float64))


def test_doubt_moves_a_frame_part_of_the_way():
    known = torch.ones(1, 1, 1, 1, 1)
    doubtful = FrameConditioner(frames=(0,), latents=known, doubt=1.0)
    moved = doubtful(torch.zeros(1, 1, 3, 1, 1), 0.9)
    assert 0.0 < float(moved[0, 0, 0]) < 1.0
    assert float(moved[0, 0, 0]) > float(moved[0, 0, 1]) > float(moved[0, 0, 2]) > 0.0


def test_full_strength_leaves_no_doubt():
    assert resembling(torch.zeros(1, 16, 1, 2, 2), 1.0).doubt == 0.0
    assert image_start_sigma(1.0) == 0.05
    assert image_start_sigma(0.3) == pytest.approx(0.7)


@pytest.mark.parametrize("solver", [Solver.UNIPC, Solver.DPM])
def test_a_schedule_that_starts_lower_keeps_its_steps_and_its_end(solver):
    scheduler = make_scheduler(solver, 5.0)
    scheduler.set_timesteps(25)
    lower = schedule_from(scheduler.sigmas, 0.6, 5.0)
    assert len(lower) == len(scheduler.sigmas)
    assert float(lower[0]) == pytest.approx(0.6, abs=1e-6)
    assert float(lower[-1]) == 0.0
    assert (lower.diff() < 0).all()


def test_references_are_cropped_and_never_letterboxed(tmp_path, pictures):
    wide = tmp_path / "wide.png"
    picture = Image.new("RGB", (300, 100), "red")
    picture.paste("green", (100, 0, 200, 100))
    picture.save(wide)
    fitted = np.asarray(fit_image(wide, (48, 80)))
    assert fitted.shape == (80, 48, 3)
    assert (fitted == (0, 128, 0)).all()


def test_a_still_is_encoded_once(models, pictures):
    image = fit_image(pictures["lake"], SIZE)
    assert encode_still(models, image, 5) is encode_still(models, image, 5)


def test_a_picture_of_one_colour_is_another_one_upright_and_lying(models):
    upright, lying = (encode_still(models, Image.new("RGB", size, "navy"), 1) for size in (SIZE, SIZE[::-1]))
    assert upright.shape[3:] == lying.shape[:2:-1] == (10, 6)


def test_a_still_begins_like_the_picture_alone(models, pictures):
    """The VAE is causal, so one encoding serves as the start and as the clip."""
    image = fit_image(pictures["fire"], SIZE)
    torch.testing.assert_close(encode_still(models, image, 9)[:, :, :1], encode_still(models, image, 1))


def test_the_encoding_cache_stays_small(models):
    for shade in range(12):
        encode_still(models, Image.new("RGB", SIZE, (shade, 0, 0)), 1)
    assert len(models.stills) <= 8
