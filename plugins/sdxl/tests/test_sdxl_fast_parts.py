"""The parts of a UNet and of a decoder that run in another way make what diffusers makes."""

from __future__ import annotations

import sys
from copy import deepcopy
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from attrs import evolve
from ourvidz_sdxl.blocks import FastParts
from ourvidz_sdxl.decoder import DecoderParts, wide_attention
from ourvidz_sdxl.operations import Operations, fast_operations
from ourvidz_sdxl.speed import FastUnet, fuse_projections
from sdxl_support import load_example

from ourvidz_core.engine.compilation import CompiledCall

CLOSE = 2e-6


def relative(made: torch.Tensor, expected: torch.Tensor) -> float:
    return float((made - expected).norm() / expected.norm())


@pytest.fixture(scope="module")
def plain() -> Any:
    """A small SDXL, with biases that are not zero."""
    pipeline = load_example("tiny_sdxl").build_pipeline()
    generator = torch.Generator().manual_seed(1)
    for part in (pipeline.unet, pipeline.vae):
        for weight in part.parameters():
            if weight.dim() == 1:
                weight.data += 0.3 * torch.randn(weight.shape, generator=generator)
    return pipeline


class Fast:
    """A copy of a UNet as on a GPU, without kernels and compilers."""

    def __init__(self, plain: Any) -> None:
        self.unet = deepcopy(plain.unet)
        fuse_projections(self.unet)
        own, self.ran = self.unet.forward, 0
        self.parts = FastParts(self.unet, evolve(Operations(), layer_norm=self.layer_norm, add_up=self.add_up))

        def compiled(*arguments: Any, **options: Any) -> Any:
            with self.parts.running():
                return own(*arguments, **options)

        self.forward = FastUnet(self.unet, CompiledCall(own, name="the UNet", compiled=compiled), self.parts)

    def layer_norm(self, *arguments: Any) -> torch.Tensor:
        self.ran += 1
        return Operations().layer_norm(*arguments)

    def add_up(self, *arguments: Any) -> torch.Tensor:
        self.ran += 1
        return Operations().add_up(*arguments)


@pytest.fixture(scope="module")
def fast(plain: Any) -> Fast:
    return Fast(plain)


def text_for(rows: int, tokens: int = 77, seed: int = 0) -> torch.Tensor:
    return torch.randn(rows, tokens, 96, generator=torch.Generator().manual_seed(seed))


def call(unet: Any, text: torch.Tensor, size: tuple[int, int] = (8, 12), **options: Any) -> torch.Tensor:
    rows = len(text)
    sample = torch.randn(rows, 4, *size, generator=torch.Generator().manual_seed(rows))
    conditions = {"text_embeds": torch.ones(rows, 64), "time_ids": torch.ones(rows, 6)}
    with torch.no_grad():
        made: torch.Tensor = unet(
            sample, torch.tensor(5.0), text, added_cond_kwargs=conditions, return_dict=False, **options
        )[0]
    return made


@pytest.mark.parametrize(("rows", "tokens"), [(6, 77), (2, 77), (2, 154), (1, 77)])
def test_a_step_is_that_of_diffusers(plain: Any, fast: Fast, rows: int, tokens: int) -> None:
    before = fast.ran
    text = text_for(rows, tokens)
    assert relative(call(fast.unet, text), call(plain.unet, text)) < CLOSE
    assert fast.forward.ran_compiled
    assert fast.ran == before + 3 * 17 + 17  # three norms in each of 17 blocks, and 17 residual blocks


def test_a_picture_that_is_not_halved_evenly_is_that_of_diffusers(plain: Any, fast: Fast) -> None:
    text = text_for(2)
    assert relative(call(fast.unet, text, (10, 14)), call(plain.unet, text, (10, 14))) < CLOSE


def test_a_new_text_takes_the_place_of_one_of_its_size(plain: Any, fast: Fast) -> None:
    first, second, longer = text_for(2, seed=3), text_for(2, seed=4), text_for(2, 154, seed=5)
    call(fast.unet, first)
    keys = fast.parts._texts.of(first, 0)
    assert relative(call(fast.unet, longer), call(plain.unet, longer)) < CLOSE
    assert relative(call(fast.unet, second), call(plain.unet, second)) < CLOSE
    assert fast.parts._texts.of(second, 0) is keys  # where a graph looks for them
    second.mul_(2.0)
    assert relative(call(fast.unet, second), call(plain.unet, second)) < CLOSE
    assert relative(call(fast.unet, first), call(plain.unet, first)) < CLOSE


def test_no_more_sizes_of_texts_are_kept_than_graphs(plain: Any, fast: Fast) -> None:
    for tokens in range(1, 11):
        text = text_for(1, tokens)
        assert relative(call(fast.unet, text, (4, 4)), call(plain.unet, text, (4, 4))) < CLOSE
        assert len(fast.parts._texts) <= 8


def test_what_was_made_of_weights_is_made_anew_once_it_was_forgotten(plain: Any) -> None:
    fast, text = Fast(plain), text_for(2)
    call(fast.unet, text)
    changed = deepcopy(plain.unet)
    for unet in (fast.unet, changed):
        for name, weight in unet.named_parameters():
            if "to_out" in name or "upsamplers" in name:
                weight.data *= 1.5
    fast.forward.forget()
    assert not len(fast.parts._texts)
    assert relative(call(fast.unet, text), call(changed, text)) < CLOSE


def test_who_changes_the_unet_finds_it_as_it_came(plain: Any, fast: Fast) -> None:
    text, before = text_for(2), fast.ran
    with fast.forward.as_it_came():
        assert relative(call(fast.unet, text), call(plain.unet, text)) < CLOSE
    residual = {"mid_block_additional_residual": torch.ones(2, 128, 2, 3)}
    assert relative(call(fast.unet, text, **residual), call(plain.unet, text, **residual)) < CLOSE
    assert not fast.forward.ran_compiled
    assert fast.ran == before


@pytest.mark.parametrize("rows", [1, 3])
def test_a_decoded_picture_is_that_of_diffusers(plain: Any, rows: int) -> None:
    vae, normed = deepcopy(plain.vae), []

    def group_norm(*given: Any) -> torch.Tensor:
        normed.append(given)
        return Operations().group_norm(*given)

    parts = DecoderParts(vae.decoder, evolve(Operations(), group_norm=group_norm))
    latents = torch.randn(rows, 4, 16, 20, generator=torch.Generator().manual_seed(0))
    with torch.no_grad(), parts.running():
        made, expected = (each.decode(latents, return_dict=False)[0] for each in (vae, plain.vae))
    assert relative(made, expected) < 1e-5
    norms = sum(isinstance(module, torch.nn.GroupNorm) for module in vae.decoder.modules())
    assert len(normed) == norms  # none is left to torch


def test_attention_in_parts_is_attention(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ourvidz_sdxl.decoder._SCORES", 100)
    query, key, value = torch.randn(3, 2, 37, 16, generator=torch.Generator().manual_seed(0)).unbind()
    expected = torch.nn.functional.scaled_dot_product_attention(query, key, value)
    assert relative(wide_attention(query, key, value, Operations()), expected) < CLOSE


def test_a_kernel_that_fails_or_is_wrong_is_left_out_and_named(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def failing(*_: Any) -> Any:
        raise RuntimeError("no such instruction")

    torchs = Operations()
    kernels = SimpleNamespace(
        layer_norm=failing,
        geglu=lambda *given: torchs.geglu(*given) * 1.1,
        look_at=failing,
        group_norm=lambda *given: torchs.group_norm(*given) * 1.001,
        add_up=failing,
        softmax=failing,
        weave=torchs.weave,
    )
    monkeypatch.setitem(sys.modules, "ourvidz_sdxl.kernels", kernels)
    found = fast_operations.__wrapped__("cpu", torch.float32)  # what it finds here is for nobody else
    assert found == evolve(torchs, group_norm=kernels.group_norm)
    assert "layer_norm in Triton does not run on cpu, and SDXL is slower: no such instruction" in caplog.text
    assert "geglu in Triton is wrong by 0.1 on cpu" in caplog.text
