"""Attention in fp8 by FlashAttention 3: sooner on a card of Hopper's kind, and less exact. For the fast tier alone.

The numbers that it multiplies have eight bits, e4m3, and are off by up to a sixteenth. Two ways make
that harm less, and leave the result as it is but for the rounding: keys lose what all of them have in
common, which the softmax does not see (SageAttention, arXiv 2410.02367), and queries and keys are
turned by one Hadamard matrix, so that no channel is large in both (FlashAttention 3, arXiv 2407.08608).
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from ourvidz_wan.flash_3 import flash_3_fp8

EIGHT_BITS = torch.float8_e4m3fn
LARGEST = torch.finfo(EIGHT_BITS).max
_LEAST_SCALE = 1e-12


class Rounded(NamedTuple):
    """A tensor in eight bits; of a kind that torch's compiler looks into."""

    #: ``[batch, tokens, heads, channels]``.
    values: torch.Tensor
    #: What ``values`` are multiplied with, ``[batch, heads]`` in float32.
    scale: torch.Tensor


def attend_in_fp8(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    """Attention over ``[batch, tokens, heads, channels]``, and the same again; channels are a power of two."""
    rounded = round_inputs(query, key, value)
    attended: torch.Tensor = flash_3_fp8([one.values for one in rounded], [one.scale for one in rounded])
    return attended


def round_inputs(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> tuple[Rounded, Rounded, Rounded]:
    """What the kernel is given in place of these; nothing is read back from the device."""
    rotation = hadamard(query.shape[-1], query.device).to(query.dtype)
    return _rounded(query @ rotation), _rounded(key @ rotation, around_mean=True), _rounded(value)


def hadamard(size: int, device: torch.device) -> torch.Tensor:
    """The orthogonal matrix ``[size, size]`` whose entries are all as large; ``size`` is a power of two."""
    place = torch.arange(size, device=device)
    parity = place[:, None] & place[None, :]
    for shift in (8, 4, 2, 1):
        parity = parity ^ (parity >> shift)
    return (1 - 2 * (parity & 1)) / size**0.5


def _rounded(states: torch.Tensor, *, around_mean: bool = False) -> Rounded:
    states = states.float()
    if around_mean:
        mean = states.mean(1, keepdim=True)
        # By the extremes, which are found in the same look at all tokens as the mean.
        above, below = states.amax(1, keepdim=True) - mean, mean - states.amin(1, keepdim=True)
        states, largest = states - mean, torch.maximum(above, below).amax((1, 3))
    else:
        largest = states.abs().amax((1, 3))
    scale = (largest / LARGEST).clamp(min=_LEAST_SCALE)
    values = (states / scale[:, None, :, None]).clamp(-LARGEST, LARGEST).to(EIGHT_BITS)
    return Rounded(values=values, scale=scale)
