"""A text is encoded once while its model is warm, and what is remembered makes the same frames."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from ourvidz_wan.sampling import CACHED_TEXTS, encode_text, sample


def quietly(step: int, total: int) -> None:
    """For runs that nobody watches."""


@pytest.fixture
def encodings(models):
    """The texts that reached the encoder itself, one entry a forward."""
    models.texts.clear()
    seen: list[int] = []
    hook = models.pipeline.text_encoder.register_forward_hook(lambda *_: seen.append(1))
    yield seen
    hook.remove()
    models.texts.clear()


def test_jobs_with_the_same_texts_encode_them_once_and_make_the_same_frames(models, asking, encodings):
    asked = asking(frame_num=1, sample_steps=2)
    first = sample(asked, models, quietly)
    assert len(encodings) == 2  # the prompt, and the model's own negative prompt
    again = sample(asked, models, quietly)
    assert len(encodings) == 2
    assert torch.equal(first.latents, again.latents)
    assert np.array_equal(first.frames, again.frames)

    sample(asking(frame_num=1, sample_steps=2, prompt="a red square on black"), models, quietly)
    assert len(encodings) == 3


def test_without_guidance_no_negative_prompt_is_encoded(models, asking, encodings):
    sample(asking(frame_num=1, sample_steps=1, sample_guide_scale=1.0), models, quietly)
    assert len(encodings) == 1


def test_the_texts_used_longest_ago_are_forgotten(models, encodings):
    with torch.no_grad():
        encode_text(models, "often")
        for number in range(CACHED_TEXTS - 1):
            encode_text(models, f"text {number}")
        encode_text(models, "often")
        encode_text(models, "one too many")
        assert len(models.texts) == CACHED_TEXTS
        assert "often" in models.texts
        assert "text 0" not in models.texts
