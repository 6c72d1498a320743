"""What only a GPU can show: compiled, batched and replayed, WAN makes what plain diffusers makes there."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from diffusers import WanPipeline
from ourvidz_wan import prediction
from ourvidz_wan.checkpoints import load_models, make_scheduler
from ourvidz_wan.config import Solver
from ourvidz_wan.sampling import sample
from ourvidz_wan.tasks import TASKS

pytestmark = [pytest.mark.gpu, pytest.mark.timeout(600)]


def quietly(step: int, total: int) -> None:
    """Nobody watches."""


@pytest.fixture(scope="module")
def on_gpu(model_dir):
    """The small model in single precision, where a difference would be one of method."""
    return load_models(model_dir, TASKS["t2v-1.3B"], device="cuda", dtype=torch.float32)


@pytest.mark.parametrize(
    ("frames", "launch_bound_tokens"),
    [(1, prediction.LAUNCH_BOUND_TOKENS), (9, prediction.LAUNCH_BOUND_TOKENS), (9, 0)],
    ids=["image", "video", "video whose branches go one after another"],
)
def test_latents_are_those_of_plain_diffusers(frames, launch_bound_tokens, on_gpu, model_dir, asking, monkeypatch):
    monkeypatch.setattr(prediction, "LAUNCH_BOUND_TOKENS", launch_bound_tokens)
    asked = asking(frame_num=frames, sample_steps=10)
    plain = WanPipeline.from_pretrained(model_dir, local_files_only=True).to("cuda")
    plain.set_progress_bar_config(disable=True)
    plain.scheduler = make_scheduler(Solver.UNIPC, 5.0)
    options = {
        "prompt": asked.prompt,
        "negative_prompt": on_gpu.variant.negative_prompt,
        "width": 48,
        "height": 80,
        "num_frames": frames,
        "num_inference_steps": 10,
        "guidance_scale": 5.0,
    }
    latents = plain(**options, generator=torch.Generator().manual_seed(5), output_type="latent").frames
    frames_of_plain = plain(**options, generator=torch.Generator().manual_seed(5), output_type="np").frames[0]
    # What is replayed in the second run was recorded in the first.
    for made in (sample(asked, on_gpu, quietly), sample(asked, on_gpu, quietly)):
        assert float((made.latents - latents).norm() / latents.norm()) < 1e-4
        assert np.abs(made.frames.astype(float) - frames_of_plain * 255).mean() < 1.5
        assert made.facts["vae_dtype"] == "bfloat16"


def test_a_video_after_an_image_is_the_video_alone(on_gpu, asking, pictures):
    asked = asking(first_frame=pictures["lake"])
    before = sample(asked, on_gpu, quietly)
    sample(asking(frame_num=1), on_gpu, quietly)
    after = sample(asked, on_gpu, quietly)
    assert torch.equal(before.latents, after.latents)
    assert np.array_equal(before.frames, after.frames)
