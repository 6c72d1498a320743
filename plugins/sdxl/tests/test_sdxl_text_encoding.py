"""Prompts as the UNet reads them: diffusers' own where they are plain, longer and weighted where they are not."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from ourvidz_sdxl.pipeline import SdxlPipeline, load_pipeline
from ourvidz_sdxl.text_encoding import MAX_CHUNKS, PromptEncoder
from ourvidz_sdxl.variants import SdxlVariant

from ourvidz_core.errors import PayloadError

PLAIN = [
    "a lighthouse on a rocky coast at sunset, detailed, photorealistic",
    'a cat (sitting) on C++ book, 4:3, "hi" -- neon',
    'word++ (x)1.2 ("a", "b").blend(0.5, 0.5) ("c").and()',
    "ünïcödé and 日本語 and !!!",
    "cat " * 75,
]
LONG = ", ".join(f"a red cat near the {word} house" for word in ("old", "new", "tall", "small", "dark", "light") * 3)


@pytest.fixture(scope="module")
def model(tiny_model: Path) -> SdxlPipeline:
    return load_pipeline(tiny_model, device="cpu", variant=SdxlVariant())


@pytest.mark.parametrize("prompt", PLAIN)
def test_plain_prompt_is_encoded_as_diffusers_does(model: SdxlPipeline, prompt: str) -> None:
    with torch.no_grad():
        expected = model.base.encode_prompt(prompt, negative_prompt="worst quality, text", device="cpu")
    made = model.prompts.encode(prompt, "worst quality, text")
    assert made.chunks == 1
    for ours, theirs in zip((made.prompt, made.negative, made.pooled, made.negative_pooled), expected, strict=True):
        assert ours.shape == theirs.shape
        assert (ours - theirs).abs().max() < 1e-5


def test_negative_prompt_is_as_long_as_a_long_prompt(model: SdxlPipeline) -> None:
    made = model.prompts.encode(LONG, "text")
    assert made.chunks > 1
    assert made.prompt.shape == made.negative.shape == (1, 77 * made.chunks, 96)
    assert made.pooled.shape == made.negative_pooled.shape == (1, 64)


def test_end_of_a_long_prompt_counts(model: SdxlPipeline) -> None:
    changed = model.prompts.encode(LONG.removesuffix("house") + "castle", "text").prompt
    assert not torch.equal(model.prompts.encode(LONG, "text").prompt, changed)


def test_prompt_is_as_long_as_a_long_negative_prompt(model: SdxlPipeline) -> None:
    made = model.prompts.encode("a cat", LONG)
    assert made.prompt.shape == made.negative.shape


def test_more_weight_moves_the_text_further(model: SdxlPipeline) -> None:
    plain = model.prompts.encode("a red cat", "text").prompt
    moved = [
        (model.prompts.encode(f"a (red:{weight}) cat", "text").prompt - plain).abs().sum() for weight in (1, 1.2, 1.6)
    ]
    assert moved[0] < 1e-4 < moved[1] < moved[2]


def test_less_weight_nears_the_text_without_the_word(model: SdxlPipeline) -> None:
    plain = model.prompts.encode("a red cat", "text").prompt
    moved = [
        (model.prompts.encode(f"a (red:{weight}) cat", "text").prompt - plain).abs().sum() for weight in (0.9, 0.5, 0)
    ]
    assert 0 < moved[0] < moved[1] < moved[2]


def test_weights_leave_the_summary_of_the_text_alone(model: SdxlPipeline) -> None:
    weighted = model.prompts.encode("a (red:1.5) cat", "text")
    assert torch.allclose(weighted.pooled, model.prompts.encode("a red cat", "text").pooled, atol=1e-5)


@pytest.mark.parametrize("prompt", ["", " ", "(\u200b a:1.3)", "! (! a !:0.5) !", "(a:0)", "(cat :0.5)(dog:0.5)"])
def test_odd_prompt_is_encoded(model: SdxlPipeline, prompt: str) -> None:
    assert torch.isfinite(model.prompts.encode(prompt, "text").prompt).all()


@settings(max_examples=40, deadline=None)
@given(prompt=st.text(max_size=60), weight=st.sampled_from([0.0, 0.4, 1.0, 1.7, 2.0]))
def test_any_weighted_text_is_encoded(model: SdxlPipeline, prompt: str, weight: float) -> None:
    made = model.prompts.encode(f"{prompt} (cat {prompt}:{weight}), {prompt}", prompt)
    assert torch.isfinite(made.prompt).all()
    assert made.prompt.shape == made.negative.shape


def test_tokens_are_counted_without_weights_and_marks(model: SdxlPipeline) -> None:
    assert model.prompts.count_tokens("a red cat") == 3
    assert model.prompts.count_tokens("a (red:1.3) cat") == 3
    assert model.prompts.count_tokens("") == 0


def test_endless_prompt_is_refused(model: SdxlPipeline) -> None:
    with pytest.raises(PayloadError, match=r"\$\.prompt: expected at most 1200 tokens, got 1201"):
        model.prompts.encode("cat " * (MAX_CHUNKS * 75 + 1), "text")


def test_text_is_encoded_once(model: SdxlPipeline) -> None:
    encoder = PromptEncoder(model.base, "cpu")
    calls = []
    hook = model.base.text_encoder.register_forward_hook(lambda *_: calls.append(1))
    try:
        encoder.encode("a cat", "text")
        encoder.encode("a cat", "text")
    finally:
        hook.remove()
    assert len(calls) == 2  # one for the prompt, one for the negative prompt
