"""Make the decoder of a loaded autoencoder as fast as its device allows, with the same results within numeric noise."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from diffusers.models.attention_processor import Attention

from ourvidz_core.engine.compilation import CompiledCall, may_compile
from ourvidz_sdxl.blocks import FastResnet, OtherWays
from ourvidz_sdxl.operations import Operations, fast_operations
from ourvidz_sdxl.upsampling import FastUpsample

#: Scores that are in memory at once: 268 MB in single precision.
_SCORES = 2**26


class FastDecoder:
    """The autoencoder's decoder up to the bytes of a picture, with kernels of our own where that may be."""

    def __init__(self, vae: Any, device: str) -> None:
        self._vae = vae
        self._latents_to_pixels: Callable[[torch.Tensor], torch.Tensor] = self._decoded
        if may_compile(device):
            operations = fast_operations(device, next(vae.decoder.parameters()).dtype)
            if operations != Operations():  # or no kernel runs here, which was logged
                parts = DecoderParts(vae.decoder, operations)

                def fast(latents: torch.Tensor) -> torch.Tensor:
                    with parts.running():
                        return self._decoded(latents)

                self._latents_to_pixels = CompiledCall(self._decoded, compiled=fast, name="SDXL's decoder")

    def __call__(self, latents: torch.Tensor) -> torch.Tensor:
        """The pictures of latents (rows, 4, height, width), as uint8 (rows, height, width, 3)."""
        with torch.no_grad():
            pixels = self._latents_to_pixels(latents).float()
            # Rounded as diffusers' image processor does it in main memory.
            shades = ((pixels * 0.5 + 0.5).clamp(0, 1) * 255).round()
            return shades.to(torch.uint8).permute(0, 2, 3, 1).contiguous()

    def _decoded(self, latents: torch.Tensor) -> torch.Tensor:
        pixels: torch.Tensor = self._vae.decode(latents, return_dict=False)[0]
        return pixels


class DecoderParts(OtherWays):
    """Parts of a decoder that run in another way."""

    def __init__(self, decoder: Any, operations: Operations) -> None:
        super().__init__()
        for module in decoder.modules():
            if FastResnet.fits(module) and module.time_emb_proj is None:
                resnet = FastResnet(module, operations)
                resnet.prepare()
                self.replace(module, resnet)
            elif FastUpsample.fits(module):
                upsample = FastUpsample(module=module, weave=operations.weave)
                upsample.prepare()
                self.replace(module, upsample)
            elif isinstance(module, Attention) and _is_of_pictures(module):
                self.replace(module, _WideAttention(module, operations))
        self.replace_norm(decoder.conv_norm_out, decoder.conv_act, operations)


class _WideAttention:
    """diffusers' attention between a picture's pixels, for one head of 512 channels.

    No kernel of torch's is made for a head so wide. Scores are in single precision, as in those.
    """

    def __init__(self, attention: Any, operations: Operations) -> None:
        self._attention, self._operations = attention, operations

    def __call__(self, picture: torch.Tensor, **_: Any) -> torch.Tensor:
        attention = self._attention
        normed = self._operations.group_norm((picture,), None, attention.group_norm, False).flatten(2).transpose(1, 2)
        query, key, value = (layer(normed) for layer in (attention.to_q, attention.to_k, attention.to_v))
        made = attention.to_out[0](wide_attention(query, key, value, self._operations))
        return made.transpose(1, 2).reshape(picture.shape) + picture


def wide_attention(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, operations: Operations) -> torch.Tensor:
    """Attention of one head, all of (rows, tokens, channels), a part of the tokens after the other."""
    made = torch.empty_like(query)
    step = max(1, _SCORES // (key.shape[0] * key.shape[1]))
    for start in range(0, query.shape[1], step):
        part = slice(start, start + step)
        shares = operations.softmax(_scores(query[:, part], key), query.shape[-1] ** -0.5, value.dtype)
        made[:, part] = torch.bmm(shares, value)
    return made


def _scores(query: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
    if query.is_cuda and query.dtype != torch.float32:
        return torch.bmm(query, key.mT, out_dtype=torch.float32)
    return torch.bmm(query.float(), key.float().mT)


def _is_of_pictures(attention: Attention) -> bool:
    return (
        attention.heads == 1
        and attention.group_norm is not None
        and attention.spatial_norm is None
        and attention.residual_connection
        and attention.rescale_output_factor == 1
    )
