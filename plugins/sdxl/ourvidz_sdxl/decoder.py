"""Make the decoder of a loaded autoencoder as fast as its device allows, with the same results within numeric noise."""

from __future__ import annotations

from collections.abc import Hashable
from typing import Any

import torch
from diffusers.models.attention_processor import Attention

from ourvidz_core.engine.compilation import CompiledCall, may_compile
from ourvidz_sdxl.upsampling import FastUpsample

#: Scores that are in memory at once: 268 MB in single precision.
_SCORES = 2**26


class FastDecoder:
    """The autoencoder's decoder up to the bytes of a picture, compiled where that may be."""

    def __init__(self, vae: Any, device: str) -> None:
        def decode(latents: torch.Tensor) -> torch.Tensor:
            with torch.no_grad():
                pixels = vae.decode(latents, return_dict=False)[0].float()
                # Rounded as diffusers' image processor does it in main memory.
                shades = ((pixels * 0.5 + 0.5).clamp(0, 1) * 255).round()
                return shades.to(torch.uint8).permute(0, 2, 3, 1).contiguous()

        self._plain = decode
        self._call: CompiledCall | None = None
        if may_compile(device):
            rebuild_decoder(vae.decoder)
            self._call = CompiledCall(self._plain, name="SDXL's decoder")
        self._shapes = _CompiledShapes()

    def __call__(self, latents: torch.Tensor) -> torch.Tensor:
        """The pictures of latents (rows, 4, height, width), as uint8 (rows, height, width, 3)."""
        call = self._call if self._call is not None and self._shapes.take(latents.shape) else self._plain
        pixels: torch.Tensor = call(latents)
        return pixels

    def plain(self, latents: torch.Tensor) -> torch.Tensor:
        """The same without compiling: for a shape that does not come often."""
        pixels: torch.Tensor = self._plain(latents)
        return pixels

    def settle(self) -> None:
        """Compile no more shapes than there are now."""
        self._shapes.settle()


def rebuild_decoder(decoder: Any) -> None:
    """Let ``decoder`` double its pictures with 4/9 of the work, and its one attention run as products."""
    for module in decoder.modules():
        if FastUpsample.fits(module):
            fast = FastUpsample(module=module)
            fast.prepare()
            module.forward = fast
        elif isinstance(module, Attention) and _is_of_pictures(module):
            module.processor = WideAttention()


class WideAttention:
    """diffusers' attention between a picture's pixels, for one head of 512 channels.

    No kernel of torch's is made for a head so wide. Scores are in single precision, as in those.
    """

    def __call__(
        self,
        attention: Any,
        hidden_states: torch.Tensor,
        *_: Any,
        temb: Any = None,  # noqa: ARG002  diffusers looks for it, and warns
        **__: Any,
    ) -> torch.Tensor:
        """A picture of the same size."""
        normed = attention.group_norm(hidden_states.flatten(2)).transpose(1, 2)
        query, key, value = (layer(normed) for layer in (attention.to_q, attention.to_k, attention.to_v))
        made = attention.to_out[0](wide_attention(query, key, value))
        return made.transpose(1, 2).reshape(hidden_states.shape) + hidden_states


@torch.library.custom_op("ourvidz_sdxl::wide_attention", mutates_args=())  # type: ignore[untyped-decorator]
def wide_attention(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    """Attention of one head, all of (rows, tokens, channels), a part of the tokens after the other."""
    made = torch.empty_like(query)
    step = max(1, _SCORES // (key.shape[0] * key.shape[1]))
    for start in range(0, query.shape[1], step):
        part = slice(start, start + step)
        scores = _scores(query[:, part], key).mul_(query.shape[-1] ** -0.5)
        made[:, part] = torch.bmm(scores.softmax(-1).to(value.dtype), value)
    return made


@wide_attention.register_fake  # type: ignore[untyped-decorator]
def _(query: torch.Tensor, _key: torch.Tensor, _value: torch.Tensor) -> torch.Tensor:
    return torch.empty_like(query)


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


class _CompiledShapes:
    def __init__(self) -> None:
        self._shapes: set[Hashable] = set()
        self._is_settled = False

    def take(self, shape: Hashable) -> bool:
        """Whether ``shape`` runs compiled."""
        if not self._is_settled:
            self._shapes.add(shape)
        return shape in self._shapes

    def settle(self) -> None:
        self._is_settled = True
