"""Turn latents into frames, some at a time: while some are decoded, those before them are on their way.

The VAE is causal: a latent frame is decoded with what is kept of those before it. On a CPU the
decoder is diffusers' own, to the bit. On a GPU it is the same arithmetic in bfloat16, with its
channels last in memory and compiled; the tests show that the two are one.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch.nn import functional

from ourvidz_core.engine.compilation import CompiledCall, may_compile

#: Frames that a causal convolution looks back.
PAST_FRAMES = 2
#: What ``torch.compile`` is told of the decoder.
DECODER_OPTIONS: Mapping[str, Any] = {"fullgraph": True}
#: Chunks that are launched before the first of them is waited for.
_CHUNKS_AHEAD = 2

Frames = NDArray[np.uint8]


class Decoder:
    """The decoding half of a VAE, on its device."""

    def __init__(self, vae: Any, device: torch.device) -> None:
        self._vae = vae
        self._device = device
        self._decode: Callable[..., tuple[torch.Tensor, list[torch.Tensor]]] = decode_latent_frame
        self._is_own = device.type == "cuda" and is_decodable(vae)
        if self._is_own:
            make_fast(vae)
            if may_compile(str(device)):
                self._decode = CompiledCall(decode_latent_frame, name="the WAN decoder", **DECODER_OPTIONS)

    @property
    def facts(self) -> dict[str, Any]:
        """What is true of it beside diffusers' own; nothing on a CPU."""
        return {"vae_dtype": "bfloat16"} if self._is_own else {}

    def chunks(self, latents: torch.Tensor) -> Iterator[Frames]:
        """The frames of normalised ``latents``, ``[frames, height, width, 3]`` for each latent frame in turn.

        Holds the device while it is iterated, and never waits for it before the next chunk is launched.
        """
        arriving: deque[Arriving] = deque()
        for pixels in self._launched(self._scaled(latents)):
            arriving.append(Arriving(pixels))
            if len(arriving) >= _CHUNKS_AHEAD:
                yield arriving.popleft().wait().numpy()
        while arriving:
            yield arriving.popleft().wait().numpy()

    def _scaled(self, latents: torch.Tensor) -> torch.Tensor:
        vae = self._vae
        # As diffusers' own decode has it: where models are offloaded, the VAE comes to the device.
        hook = getattr(vae, "_hf_hook", None)
        if hook is not None and hasattr(hook, "pre_forward"):
            hook.pre_forward(vae)
        mean, std = latent_statistics(vae, latents.device)
        # In the order in which diffusers rounds it, so that its frames are matched to the bit.
        scaled: torch.Tensor = (latents / (1.0 / std) + mean).to(vae.dtype)
        return scaled

    def _launched(self, scaled: torch.Tensor) -> Iterator[torch.Tensor]:
        vae = self._vae
        if vae.use_tiling or vae.config.patch_size is not None:
            yield pixels_of(vae.decode(scaled, return_dict=False)[0])
            return
        entering = vae.post_quant_conv(scaled)
        if not self._is_own:
            yield from _decoded_by_diffusers(vae, entering)
            return
        entering = entering.to(torch.bfloat16)
        pasts: Sequence[torch.Tensor] = ()
        for index in range(entering.shape[2]):
            frame = _channels_last(entering[:, :, index : index + 1])
            pixels, pasts = self._decode(vae.decoder, frame, pasts)
            yield pixels


class Arriving:
    """A tensor on its way to the host, beside what the device does next; on a CPU it is there."""

    def __init__(self, tensor: torch.Tensor) -> None:
        self._event: torch.cuda.Event | None = None
        self._there = tensor
        if tensor.device.type != "cuda":
            return
        stream = _side_stream(tensor.device)
        self._there = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
        self._event = torch.cuda.Event(blocking=True)
        stream.wait_stream(torch.cuda.current_stream(tensor.device))
        with torch.cuda.stream(stream):
            self._there.copy_(tensor, non_blocking=True)
            self._event.record(stream)
        # Its memory is not given to others before it was read.
        tensor.record_stream(stream)

    def wait(self) -> torch.Tensor:
        """The tensor in main memory."""
        if self._event is not None:
            self._event.synchronize()
        return self._there


def latent_statistics(vae: Any, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean and standard deviation of each latent channel, ``[1, channels, 1, 1, 1]`` in float32."""

    def channels(values: Sequence[float]) -> torch.Tensor:
        return torch.tensor(values, dtype=torch.float32).to(device, non_blocking=True).view(1, -1, 1, 1, 1)

    return channels(vae.config.latents_mean), channels(vae.config.latents_std)


def is_decodable(vae: Any) -> bool:
    """Whether :func:`decode_latent_frame` knows this VAE: that of WAN 2.1, and not of 2.2."""
    return not vae.config.is_residual and vae.config.patch_size is None


def make_fast(vae: Any) -> None:
    """Bring the decoder to bfloat16 and its weights' channels last. The encoder stays in float32."""
    decoder = vae.decoder.to(torch.bfloat16)
    for module in decoder.modules():
        if isinstance(module, torch.nn.Conv3d):
            module.weight.data = module.weight.data.contiguous(memory_format=torch.channels_last_3d)
        elif isinstance(module, torch.nn.Conv2d):
            module.weight.data = module.weight.data.contiguous(memory_format=torch.channels_last)


def decode_latent_frame(
    decoder: Any, latent: torch.Tensor, pasts: Sequence[torch.Tensor]
) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """The pixels of one latent frame ``[1, channels, 1, height, width]``, and what the next one has to know.

    ``pasts`` are empty for the first latent frame, which is one picture; each later one is four.
    Pixels are bytes ``[frames, height, width, 3]``.

    diffusers pads a frame on all sides in memory before each convolution; here the convolution pads
    height and width, and what came before is joined to it without being padded or copied first.
    """
    is_first = len(pasts) == 0
    past = iter(pasts)
    kept: list[torch.Tensor] = []

    def causal(conv: Any, x: torch.Tensor) -> torch.Tensor:
        earlier = _nothing_before(x) if is_first else next(past)
        joined = torch.cat([earlier, x], dim=2)
        kept.append(_channels_last(joined[:, :, -PAST_FRAMES:]))
        across, _, down, *_ = conv._padding
        return functional.conv3d(joined, conv.weight, conv.bias, padding=(0, down, across))

    def residual(block: Any, x: torch.Tensor) -> torch.Tensor:
        shortcut = x if isinstance(block.conv_shortcut, torch.nn.Identity) else _pointwise(block.conv_shortcut, x)
        x = causal(block.conv1, block.nonlinearity(block.norm1(x)))
        x = causal(block.conv2, block.nonlinearity(block.norm2(x)))
        return x + shortcut

    def upsampled(resample: Any, x: torch.Tensor) -> torch.Tensor:
        if resample.mode == "upsample3d":
            if is_first:
                # The first latent frame is a single picture, and later ones do not look back at it here.
                kept.append(_nothing_before(x))
            else:
                x = _interleaved(causal(resample.time_conv, x))
        frames = x.shape[2]
        pictures = x.transpose(1, 2).flatten(0, 1)
        # Nearest neighbours are exact in any type.
        pictures = functional.interpolate(pictures, scale_factor=2.0, mode="nearest-exact")
        conv = resample.resample[1]
        pictures = functional.conv2d(pictures, conv.weight, conv.bias, padding=conv.padding)
        return pictures.unflatten(0, (-1, frames)).transpose(1, 2)

    x = causal(decoder.conv_in, latent)
    x = residual(decoder.mid_block.resnets[0], x)
    for index, attention in enumerate(decoder.mid_block.attentions):
        x = residual(decoder.mid_block.resnets[index + 1], attention(x))
    for up_block in decoder.up_blocks:
        for block in up_block.resnets:
            x = residual(block, x)
        if up_block.upsamplers is not None:
            x = upsampled(up_block.upsamplers[0], x)
    x = causal(decoder.conv_out, decoder.nonlinearity(decoder.norm_out(x)))
    return pixels_of(x.clamp(-1.0, 1.0)), kept


def pixels_of(video: torch.Tensor) -> torch.Tensor:
    """Bytes ``[frames, height, width, 3]`` of a ``video`` ``[1, 3, frames, height, width]`` between -1 and 1."""
    pixels = ((video[0].float() * 0.5 + 0.5).clamp(0, 1) * 255).round().to(torch.uint8)
    return pixels.permute(1, 2, 3, 0).contiguous()


def _decoded_by_diffusers(vae: Any, entering: torch.Tensor) -> Iterator[torch.Tensor]:
    kept: list[Any] = [None] * vae._cached_conv_counts["decoder"]
    for index in range(entering.shape[2]):
        frame = entering[:, :, index : index + 1]
        video = vae.decoder(frame, feat_cache=kept, feat_idx=[0], first_chunk=index == 0)
        yield pixels_of(video.clamp(-1.0, 1.0))


def _channels_last(x: torch.Tensor) -> torch.Tensor:
    """A copy of ``x`` with its channels last in memory.

    Its strides say nothing of the larger tensor that ``x`` is a part of: a compiler that sees
    others compiles again, and other videos and later chunks are parts of other tensors.
    """
    return x.permute(0, 2, 3, 4, 1).clone(memory_format=torch.contiguous_format).permute(0, 4, 1, 2, 3)


def _nothing_before(x: torch.Tensor) -> torch.Tensor:
    batch, channels, _, height, width = x.shape
    before = torch.zeros((batch, channels, PAST_FRAMES, height, width), dtype=x.dtype, device=x.device)
    return before.contiguous(memory_format=torch.channels_last_3d)


def _pointwise(conv: Any, x: torch.Tensor) -> torch.Tensor:
    return functional.conv3d(x, conv.weight, conv.bias)


def _interleaved(x: torch.Tensor) -> torch.Tensor:
    """Two frames of each: the halves of the channels are its two moments. Channels stay last in memory."""
    _, channels, _, _, _ = x.shape
    moments = x.permute(0, 2, 3, 4, 1).unflatten(-1, (2, channels // 2))
    frames = moments.permute(0, 1, 4, 2, 3, 5).flatten(1, 2)
    return frames.permute(0, 4, 1, 2, 3)


def _side_stream(device: torch.device) -> torch.cuda.Stream:
    index = device.index if device.index is not None else torch.cuda.current_device()
    if index not in _side_streams:
        _side_streams[index] = torch.cuda.Stream(index)
    return _side_streams[index]


_side_streams: dict[int, torch.cuda.Stream] = {}
