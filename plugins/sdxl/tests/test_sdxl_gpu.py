"""What only a GPU can show: half precision keeps the promises of single precision."""

from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from ourvidz_sdxl.plugin import generate
from ourvidz_sdxl.speed import fast_unet, fuse_projections
from sdxl_support import job, made, pixels, warm_model

from benchmarks.gpu.models import sdxl_unet, sdxl_vae
from ourvidz_core.engine.models import ModelCache
from ourvidz_core.testing.doubles import RecordingContext

pytestmark = [pytest.mark.gpu, pytest.mark.timeout(600)]

#: bfloat16 has three digits, and another number of rows is summed in another order: of the distance between seeds.
NOISE = 0.05


@pytest.fixture
def on_gpu(new_context: Callable[..., RecordingContext]) -> RecordingContext:
    return new_context(models=ModelCache(), device="cuda")


def share_of_seeds(one: Any, same: Any, other: Any) -> float:
    """How far two pictures of one seed are from each other, as a share of how far another seed's is from them."""
    return float(np.abs(one - same).mean() / np.abs(one - other).mean())


@pytest.mark.parametrize("solver", [None, "unipc", "dpm++"])
def test_image_of_a_batch_is_the_image_of_its_seed_on_the_gpu(on_gpu: RecordingContext, solver: str | None) -> None:
    batch = made(job(config={"seed": 40, "num_images": 3, "sample_solver": solver}), on_gpu)
    single = made(job(config={"seed": 42, "sample_solver": solver}), on_gpu)
    assert single.facts["device"] == "cuda"
    assert single.facts["dtype"] == "bfloat16"
    other, same, alone = (pixels(artifact) for artifact in (*batch.artifacts[1:], *single.artifacts))
    print(f"{solver}: {share_of_seeds(same, alone, other):.4f} of the distance between two seeds")
    assert share_of_seeds(same, alone, other) < NOISE


def test_closer_reference_is_closer_on_the_gpu(on_gpu: RecordingContext, reference_png: Path) -> None:
    config = {"seed": 1, "num_images": 1}
    distances = []
    for strength in (0.3, 0.9):
        asked = job(
            reference=reference_png,
            config={**config, "reference_image_url": "https://a.test/r.png", "reference_strength": strength},
        )
        distances.append(made(asked, on_gpu).artifacts[0])
    exact = job(
        reference=reference_png,
        config={**config, "reference_image_url": "https://a.test/r.png", "reference_strength": 1.0},
    )
    nearest = pixels(made(exact, on_gpu).artifacts[0])
    far, near = (float(np.abs(pixels(artifact) - nearest).mean()) for artifact in distances)
    print(f"distance at 0.3: {far:.1f}, at 0.9: {near:.1f}")
    assert near < far


def test_graphs_and_compiling_change_nothing_but_noise(
    new_context: Callable[..., RecordingContext], monkeypatch: pytest.MonkeyPatch
) -> None:
    a_job = job(config={"seed": 40, "num_images": 3, "num_inference_steps": 8})
    pictures = {}
    for mode in ("off", "auto"):
        monkeypatch.setenv("OURVIDZ_COMPILE", mode)
        generation = made(a_job, new_context(models=ModelCache(), device="cuda"))
        pictures[mode] = [pixels(artifact) for artifact in generation.artifacts]
        print(f"{mode}: compiled {generation.facts['compiled']}")
    others = [*pictures["off"][1:], pictures["off"][0]]
    for plain, compiled, other in zip(pictures["off"], pictures["auto"], others, strict=True):
        print(f"{share_of_seeds(plain, compiled, other):.4f} of the distance between two seeds")
        assert share_of_seeds(plain, compiled, other) < NOISE


def test_denoising_never_waits_for_the_device_to_read_from_it(on_gpu: RecordingContext) -> None:
    a_job = job(config={"seed": 40, "num_inference_steps": 8})
    made(a_job, on_gpu)
    base = warm_model(on_gpu).base
    own, waits = base.unet.forward, []

    def strict(*arguments: Any, **options: Any) -> Any:
        # From the first step on: what comes before the first is done while the device has nothing to do.
        torch.cuda.set_sync_debug_mode("error")
        waits.append(1)
        return own(*arguments, **options)

    base.unet.forward = strict
    try:
        generate(a_job, on_gpu)
    finally:
        torch.cuda.set_sync_debug_mode("default")
        base.unet.forward = own
    assert len(waits) == 8


def test_a_new_text_is_read_while_the_device_goes_on(on_gpu: RecordingContext) -> None:
    made(job(config={"seed": 40, "num_inference_steps": 2}), on_gpu)
    prompts = warm_model(on_gpu).prompts
    torch.cuda.set_sync_debug_mode("error")
    try:
        read = prompts.encode("a text that no job had", "and another")
    finally:
        torch.cuda.set_sync_debug_mode("default")
    prompts.forget_graphs()
    again = prompts.encode("a text that no job had ", "and another")
    assert torch.equal(read.prompt, again.prompt)


def noise(*size: int) -> torch.Tensor:
    generator = torch.Generator("cuda").manual_seed(sum(size))
    return torch.randn(size, generator=generator, device="cuda", dtype=torch.bfloat16)


def far(made: torch.Tensor, expected: torch.Tensor) -> float:
    return float((made.float() - expected).norm() / expected.norm())


@pytest.mark.parametrize("rows", [2, 12])
@pytest.mark.parametrize(("edge", "channels"), [(64, 640), (32, 1280)])
def test_each_kernel_is_as_exact_as_bfloat16_lets_it_be(rows: int, edge: int, channels: int) -> None:
    from ourvidz_sdxl import kernels
    from ourvidz_sdxl.operations import Operations

    exact, tokens = Operations(), rows * edge * edge
    hidden, missing, weight, bias = noise(tokens, channels), *noise(3, channels).unbind()
    expected = exact.layer_norm(hidden.float(), missing.float(), weight.float(), bias.float(), 1e-5)
    assert far(kernels.layer_norm(hidden, missing, weight, bias, 1e-5), expected) < 4e-3
    wide, wide_bias = noise(8 * channels, channels) * 0.03, noise(8 * channels) * 0.1
    expected = exact.geglu(hidden.float(), wide.float(), wide_bias.float())
    assert far(kernels.geglu(hidden, wide, wide_bias), expected) < 8e-3
    if torch.cuda.get_device_capability()[0] == 9:
        from ourvidz_sdxl import gated_product

        assert far(gated_product.geglu(hidden, wide, wide_bias), expected) < 4e-3
        some = slice(None, 300)  # no whole tiles
        assert far(gated_product.geglu(hidden[some], wide, wide_bias), expected[some]) < 4e-3
    picture = noise(rows, channels, edge, edge + 1).contiguous(memory_format=torch.channels_last) + 2
    norm = torch.nn.GroupNorm(32, channels, device="cuda", dtype=torch.bfloat16)
    time = noise(rows, channels)
    with torch.no_grad():
        for added in (None, time):
            for is_gated in (False, True):
                made = kernels.group_norm((picture,), added, norm, is_gated)
                moved = picture.float() if added is None else picture.float() + time.float()[:, :, None, None]
                assert far(made, exact.group_norm((moved,), None, deepcopy(norm).float(), is_gated)) < 4e-3
    expected = exact.add_up(picture.float(), picture.float() * 2, bias.float())
    assert far(kernels.add_up(picture.clone(), picture * 2, bias), expected) < 4e-3
    expected = exact.weave(picture.float(), bias[: channels // 4].float())
    assert far(kernels.weave(picture, bias[: channels // 4]), expected) < 4e-3
    heads, text = channels // 64, noise(rows, 77, 2 * channels)
    expected = exact.look_at(hidden.float().unflatten(0, (rows, -1)), text.float(), heads)
    assert far(kernels.look_at(hidden.unflatten(0, (rows, -1)), text, heads), expected) < 8e-3


def test_all_kernels_are_in_use_on_this_card() -> None:
    from ourvidz_sdxl.operations import Operations, fast_operations

    found = fast_operations("cuda", torch.bfloat16)
    for name in ("layer_norm", "geglu", "look_at", "group_norm", "add_up", "softmax", "weave"):
        assert getattr(found, name) is not getattr(Operations(), name), name


def test_a_step_of_the_whole_unet_is_that_of_diffusers() -> None:
    unet = sdxl_unet()
    inputs = {
        rows: {
            "sample": noise(rows, 4, 128, 128),
            "timestep": torch.tensor(500.0, device="cuda"),
            "encoder_hidden_states": noise(rows, 77, 2048),
            "added_cond_kwargs": {"text_embeds": noise(rows, 1280), "time_ids": noise(rows, 6)},
            "return_dict": False,
        }
        for rows in (12, 2, 1)
    }
    with torch.no_grad():
        expected = {rows: unet(**given)[0].float() for rows, given in inputs.items()}
        unet.to(memory_format=torch.channels_last)
        fuse_projections(unet)
        fast = fast_unet(unet, "cuda")
        for rows, given in inputs.items():
            distance = far(unet(**given)[0], expected[rows])
            print(f"{rows} rows: {distance:.4f} from diffusers, compiled: {fast.ran_compiled}")
            assert fast.ran_compiled
            assert distance < 2e-2


def test_the_decoder_s_attention_is_attention_in_bfloat16() -> None:
    from ourvidz_sdxl.decoder import wide_attention
    from ourvidz_sdxl.operations import fast_operations

    query, key, value = noise(3, 1, 16384, 512).unbind()
    expected = torch.nn.functional.scaled_dot_product_attention(query.float(), key.float(), value.float())
    assert far(wide_attention(query, key, value, fast_operations("cuda", torch.bfloat16)), expected) < 1e-2


def test_the_decoder_is_that_of_diffusers() -> None:
    from ourvidz_sdxl.decoder import DecoderParts
    from ourvidz_sdxl.operations import fast_operations

    plain = sdxl_vae()
    single, fast = deepcopy(plain).float(), deepcopy(plain).to(memory_format=torch.channels_last)
    parts = DecoderParts(fast.decoder, fast_operations("cuda", torch.bfloat16))
    for rows, size in ((1, (128, 128)), (2, (40, 56)), (1, (16, 11))):
        latents = noise(rows, 4, *size)
        with torch.no_grad(), parts.running():
            expected = single.decode(latents.float(), return_dict=False)[0]
            ours, theirs = (far(vae.decode(latents, return_dict=False)[0], expected) for vae in (fast, plain))
        print(f"{rows} of {size}: {ours:.4f} from single precision, diffusers' own bfloat16 {theirs:.4f}")
        assert ours < 1.5 * theirs
