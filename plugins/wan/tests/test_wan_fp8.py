"""Attention in fp8: how little its rounding changes, and that jobs use it where they say so and nowhere else."""

from __future__ import annotations

import logging
from types import SimpleNamespace

import attrs
import pytest
import torch
from ourvidz_wan import flash_3, sampling
from ourvidz_wan.acceleration import Acceleration, attending_in_fp8, use_kernel
from ourvidz_wan.attention import Kernel, attend, best_kernel, may_attend_in_fp8
from ourvidz_wan.checkpoints import load_models
from ourvidz_wan.fp8 import EIGHT_BITS, attend_in_fp8, hadamard, round_inputs
from ourvidz_wan.sampling import make_latents
from ourvidz_wan.tasks import TASKS

CPU = torch.device("cpu")
BATCH, TOKENS, HEADS, CHANNELS = 2, 300, 3, 64


def quietly(step, total):
    """Nobody watches."""


def relative(made, wanted):
    return float((made.float() - wanted.float()).norm() / wanted.float().norm())


@pytest.fixture
def flash_3_stand_in(monkeypatch):
    """FlashAttention 3 in plain numbers, on a processor; answers the types that it was called with."""
    types = []

    def function(query, key, value, q_descale=None, k_descale=None, v_descale=None):
        types.append(query.dtype)
        scales = (q_descale, k_descale, v_descale)
        tensors = [
            tensor.float() if scale is None else tensor.float() * scale[:, None, :, None]
            for tensor, scale in zip((query, key, value), scales, strict=True)
        ]
        result = torch.bfloat16 if query.dtype == EIGHT_BITS else query.dtype
        return attend(*tensors, Kernel.TORCH).contiguous().to(result)

    monkeypatch.setattr(flash_3, "flash_3_function", lambda: function)
    return types


def draw(*, shared=0.0, loud=1.0):
    """Query, key and value; ``shared`` is an offset of some of the keys' channels, ``loud`` is how large some are."""
    generator = torch.Generator().manual_seed(2)
    query, key, value = torch.randn((3, BATCH, TOKENS, HEADS, CHANNELS), generator=generator)
    volume, offset = torch.ones(CHANNELS), torch.zeros(CHANNELS)
    volume[::16], offset[5::32] = loud, shared
    return query * volume, key * volume + offset, value


@pytest.mark.parametrize("size", [16, 64, 128])
def test_the_rotation_keeps_products_and_spreads_each_channel_over_all(size):
    rotation = hadamard(size, CPU)
    torch.testing.assert_close(rotation @ rotation.T, torch.eye(size))
    assert rotation.abs().unique().tolist() == pytest.approx([size**-0.5])


@pytest.mark.parametrize(
    ("inputs", "tolerated"),
    [(draw(), 0.06), (draw(shared=12.0), 0.06), (draw(loud=6.0), 0.07), (draw(shared=12.0, loud=6.0), 0.07)],
    ids=["random", "keys with an offset", "loud channels", "both"],
)
def test_rounding_is_all_that_changes(inputs, tolerated, flash_3_stand_in):
    wanted = attend(*inputs, Kernel.TORCH)
    assert 0.005 < relative(attend_in_fp8(*inputs), wanted) < tolerated
    assert flash_3_stand_in == [EIGHT_BITS]


def test_each_head_has_a_scale_of_its_own():
    query, key, value = draw()
    value[:, :, 1] *= 1000
    rounded = round_inputs(query, key, value)[2]
    assert rounded.scale.shape == (BATCH, HEADS)
    for head in range(HEADS):
        assert float(rounded.values[:, :, head].float().abs().max()) == torch.finfo(EIGHT_BITS).max


def test_nothing_at_all_stays_nothing(flash_3_stand_in):
    assert torch.equal(attend_in_fp8(*torch.zeros(3, 1, 4, 2, 16)), torch.zeros(1, 4, 2, 16, dtype=torch.bfloat16))


def test_it_is_compiled_as_one_graph(flash_3_stand_in):
    inputs = draw()
    compiled = torch.compile(attend_in_fp8, fullgraph=True, dynamic=False, backend="eager")
    assert torch.equal(compiled(*inputs), attend_in_fp8(*inputs))


def test_only_flash_attention_3_has_it():
    assert not may_attend_in_fp8(CPU, Kernel.CUDNN)
    assert not may_attend_in_fp8(CPU, best_kernel(CPU, torch.float32, 128))


@pytest.fixture(scope="module")
def loaded(tiny_wan, tmp_path_factory):
    """A model whose heads can be turned, prepared as on a card that has FlashAttention 3."""
    directory = tmp_path_factory.mktemp("fp8") / "t2v"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tiny_wan, "HEAD_DIM", 16)
        tiny_wan.save(tiny_wan.make_pipeline("t2v"), directory)
    models = load_models(directory, TASKS["t2v-1.3B"])
    use_kernel(models.pipeline.transformer, Kernel.FLASH_3)
    return attrs.evolve(models, acceleration=Acceleration(kernel=Kernel.FLASH_3))


@pytest.fixture
def able(monkeypatch, flash_3_stand_in):
    """A card that can, and videos that are long enough."""
    monkeypatch.setattr(sampling, "may_attend_in_fp8", lambda _device, kernel: kernel is Kernel.FLASH_3)
    monkeypatch.setattr(sampling, "LAUNCH_BOUND_TOKENS", 4)
    return flash_3_stand_in


def test_a_fast_video_attends_to_itself_in_fp8_and_says_so(loaded, asking, able):
    plain = make_latents(asking(frame_num=5, sample_steps=2, tier="fast"), loaded, quietly)
    assert set(able) == {torch.float32}
    made = make_latents(asking(frame_num=5, sample_steps=2, tier="fast", fp8_attention=True), loaded, quietly)
    # To its text as before.
    assert able.count(EIGHT_BITS) == able.count(torch.float32) // 3
    assert (plain.facts["attention"], made.facts["attention"]) == ("fa3", "fa3_fp8")
    assert 0 < relative(made.latents, plain.latents) < 0.1
    again = make_latents(asking(frame_num=5, sample_steps=2, tier="fast"), loaded, quietly)
    assert torch.equal(again.latents, plain.latents)


@pytest.mark.parametrize(
    ("lacks", "warns"),
    [("tokens", False), ("kernel", True), ("acceleration", True), ("single GPU", True)],
)
def test_a_video_that_cannot_have_it_says_what_it_had(lacks, warns, loaded, asking, able, monkeypatch, caplog):
    models, frames = loaded, 5
    if lacks == "tokens":
        frames = 1
        monkeypatch.setattr(sampling, "LAUNCH_BOUND_TOKENS", 15)
    elif lacks == "kernel":
        monkeypatch.setattr(sampling, "may_attend_in_fp8", lambda *_: False)
    elif lacks == "acceleration":
        models = attrs.evolve(models, acceleration=None)
    else:
        local = models.predictor
        models = attrs.evolve(models, predictor=SimpleNamespace(job=local.job, facts={"gpus": 2}))
    with caplog.at_level(logging.WARNING):
        made = make_latents(asking(frame_num=frames, sample_steps=1, tier="fast", fp8_attention=True), models, quietly)
    assert made.facts.get("attention") == (None if lacks == "acceleration" else "fa3")
    assert EIGHT_BITS not in able
    assert ("fp8 attention" in caplog.text) is warns


def test_what_breaks_off_a_video_leaves_exact_attention_behind(loaded):
    def attend_and_break():
        with attending_in_fp8(loaded.pipeline.transformer):
            kernels = [(block.attn1.processor.kernel, block.attn2.processor.kernel) for block in blocks]
            raise RuntimeError(kernels)

    blocks = loaded.pipeline.transformer.blocks
    with pytest.raises(RuntimeError) as seen:
        attend_and_break()
    assert set(seen.value.args[0]) == {(Kernel.FLASH_3_FP8, Kernel.FLASH_3)}
    assert {block.attn1.processor.kernel for block in blocks} == {Kernel.FLASH_3}
