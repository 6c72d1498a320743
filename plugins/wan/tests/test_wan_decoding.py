"""The decoder: diffusers' own to the bit on a CPU, and the one for GPUs beside it."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from ourvidz_wan.decoding import Decoder, decode_latent_frame, is_decodable, make_fast
from ourvidz_wan.sampling import decoded
from torch._dynamo.testing import CompileCounter

from ourvidz_core.errors import GenerationError

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def latents():
    return torch.randn((1, 16, 3, 10, 6), generator=torch.Generator().manual_seed(2))


def test_parts_are_the_frames_of_each_latent_frame_in_turn(models, latents):
    vae = models.pipeline.vae
    parts = list(decoded(models, latents))
    mean, std = (
        torch.tensor(values).view(1, -1, 1, 1, 1) for values in (vae.config.latents_mean, vae.config.latents_std)
    )
    video = vae.decode(latents / (1.0 / std) + mean).sample[0].permute(1, 2, 3, 0)
    assert [part.shape for part in parts] == [(1, 80, 48, 3), (4, 80, 48, 3), (4, 80, 48, 3)]
    assert np.array_equal(np.concatenate(parts), ((video * 0.5 + 0.5).clamp(0, 1) * 255).round().byte().numpy())


def test_latents_that_are_no_numbers_are_an_error_and_no_frames(models, latents):
    broken = latents.clone()
    broken[0, 0, 1, 2, 3] = float("nan")
    with pytest.raises(GenerationError, match="tiny-wan produced values that are no numbers"):
        next(decoded(models, broken))


def test_the_decoder_for_gpus_makes_the_same_pixels(tiny_wan, latents):
    torch.manual_seed(0)
    vae = tiny_wan.make_vae().eval().requires_grad_(False)
    assert is_decodable(vae)
    entering = vae.post_quant_conv(latents)
    wanted = np.concatenate(list(Decoder(vae, CPU).chunks(unscaled(vae, latents)))).astype(int)
    for is_fast, most, on_average in ((False, 1, 0.01), (True, 12, 1.0)):
        if is_fast:
            make_fast(vae)
            assert vae.dtype == torch.float32  # the encoder's
            entering = entering.bfloat16()
        pasts, made = (), []
        for index in range(entering.shape[2]):
            frame = entering[:, :, index : index + 1]
            pixels, pasts = decode_latent_frame(vae.decoder, frame, pasts)
            made.append(pixels.numpy())
        difference = np.abs(np.concatenate(made).astype(int) - wanted)
        assert difference.max() <= most
        assert difference.mean() < on_average


def test_what_is_kept_lies_alike_in_memory_whatever_it_was_cut_from(tiny_wan, latents):
    vae = tiny_wan.make_vae().eval().requires_grad_(False)
    make_fast(vae)
    pasts, layouts = (), []
    for frame in latents.bfloat16().split(1, dim=2):
        _, pasts = decode_latent_frame(vae.decoder, frame, pasts)
        layouts.append([past.stride() for past in pasts])
    # A compiler that was shown other strides would compile the decoder once more.
    assert layouts[0] == layouts[1] == layouts[2]


@pytest.mark.slow
def test_a_video_is_decoded_by_two_compiled_functions_whatever_its_length(tiny_wan):
    vae = tiny_wan.make_vae().eval().requires_grad_(False)
    make_fast(vae)
    counter = CompileCounter()
    decoder = Decoder(vae, CPU)
    decoder._is_own = True
    decoder._decode = torch.compile(decode_latent_frame, backend=counter, fullgraph=True, dynamic=False)
    with torch.no_grad():
        for frames in (4, 1, 3):
            list(decoder.chunks(torch.randn((1, 16, frames, 6, 4))))
    # For the first latent frame, which is one picture, and for those after it.
    assert counter.frame_count == 2


def unscaled(vae, scaled):
    """Latents that the decoder scales to these."""
    mean, std = (
        torch.tensor(values).view(1, -1, 1, 1, 1) for values in (vae.config.latents_mean, vae.config.latents_std)
    )
    return (scaled - mean) * (1.0 / std)
