"""Pictures on their way from the device to main memory, while the device goes on."""

from __future__ import annotations

from typing import Any, Protocol

import torch
from attrs import frozen
from PIL import Image

from ourvidz_core.errors import GenerationError


class Picture(Protocol):
    """A picture that has been decoded, or soon will be. Any thread may ask for it."""

    def image(self) -> Image.Image:
        """The picture; waits until it has arrived.

        :raises GenerationError: the model made no numbers.
        """
        ...


@frozen(kw_only=True)
class DevicePicture:
    """A :class:`Picture` that comes from this process's device."""

    _pixels: torch.Tensor
    _is_finite: torch.Tensor
    #: The event after which both have arrived; None where they were made in main memory.
    _arrival: Any

    @classmethod
    def send(cls, pixels: torch.Tensor, is_finite: torch.Tensor) -> DevicePicture:
        """Have ``pixels``, uint8 (height, width, 3), leave the device. ``is_finite``: whether their latents were."""
        if not pixels.is_cuda:
            return cls(pixels=pixels, is_finite=is_finite, arrival=None)
        sent = [_pinned(tensor) for tensor in (pixels, is_finite)]
        arrival = torch.cuda.Event(blocking=True)
        arrival.record(torch.cuda.current_stream(pixels.device))
        return cls(pixels=sent[0], is_finite=sent[1], arrival=arrival)

    def image(self) -> Image.Image:
        """See :meth:`Picture.image`."""
        if self._arrival is not None:
            self._arrival.synchronize()
        if not bool(self._is_finite):
            raise GenerationError("the model's output is not a number; its weights or their precision are unusable")
        return Image.fromarray(self._pixels.numpy())


def _pinned(tensor: torch.Tensor) -> torch.Tensor:
    return torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True).copy_(tensor, non_blocking=True)
