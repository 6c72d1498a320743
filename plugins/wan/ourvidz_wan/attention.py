"""Which attention kernel a device runs fastest, and an attention processor that feeds it without copies."""

from __future__ import annotations

import logging
from enum import StrEnum
from functools import lru_cache
from typing import Any

import torch
from diffusers.models.attention_dispatch import AttentionBackendName
from diffusers.models.transformers.transformer_wan import WanAttnProcessor
from torch.nn import functional
from torch.nn.attention import SDPBackend, sdpa_kernel

from ourvidz_wan.flash_3 import FLASH_3_HEAD_DIM, flash_3
from ourvidz_wan.fp8 import attend_in_fp8

logger = logging.getLogger(__name__)

#: A kernel that differs more than this from torch's plain one does not work on this device.
TOLERATED_ERROR = 2e-2
#: The same of fp8: 0.054 was measured.
TOLERATED_ERROR_OF_FP8 = 0.1
_PROBED_TOKENS = 256


class Kernel(StrEnum):
    """What computes the attention; the names that facts say."""

    FLASH_3 = "fa3"
    #: In fewer bits; see :mod:`ourvidz_wan.fp8`.
    FLASH_3_FP8 = "fa3_fp8"
    CUDNN = "cudnn"
    #: Whatever torch picks: FlashAttention 2 on an Ada or Ampere card.
    TORCH = "torch"


#: The order in which torch tries, where cuDNN shall come first.
_CUDNN_FIRST = [
    SDPBackend.CUDNN_ATTENTION,
    SDPBackend.FLASH_ATTENTION,
    SDPBackend.EFFICIENT_ATTENTION,
    SDPBackend.MATH,
]


@lru_cache(maxsize=8)
def best_kernel(device: torch.device, dtype: torch.dtype, head_dim: int) -> Kernel:
    """The fastest kernel that works for heads of this size on ``device``: each is tried on a small example.

    Measured on an H200 at 32,760 tokens: FlashAttention 3 9.1 ms, cuDNN 11.2 ms, FlashAttention 2 18.6 ms.
    """
    if device.type != "cuda" or torch.cuda.get_device_capability(device)[0] != 9:
        return Kernel.TORCH
    candidates = (Kernel.FLASH_3, Kernel.CUDNN) if head_dim == FLASH_3_HEAD_DIM else (Kernel.CUDNN,)
    for kernel in candidates:
        if _works(kernel, device, dtype, head_dim):
            return kernel
    return Kernel.TORCH


@lru_cache(maxsize=8)
def may_attend_in_fp8(device: torch.device, kernel: Kernel) -> bool:
    """Whether what attends by ``kernel`` can do so in fp8, too; tried once, where that is FlashAttention 3."""
    return kernel is Kernel.FLASH_3 and _works(Kernel.FLASH_3_FP8, device, torch.bfloat16, FLASH_3_HEAD_DIM)


def attend(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, kernel: Kernel) -> torch.Tensor:
    """Attention over ``[batch, tokens, heads, channels]``, and the same again."""
    if kernel is Kernel.FLASH_3:
        attended: torch.Tensor = flash_3(query, key, value)
        return attended
    if kernel is Kernel.FLASH_3_FP8:
        return attend_in_fp8(query, key, value)
    # The heads stay where they are: these kernels take strides.
    query, key, value = (tensor.transpose(1, 2) for tensor in (query, key, value))
    if kernel is Kernel.CUDNN:
        with sdpa_kernel(_CUDNN_FIRST, set_priority=True):
            return functional.scaled_dot_product_attention(query, key, value).transpose(1, 2)
    return functional.scaled_dot_product_attention(query, key, value).transpose(1, 2)


class KernelAttnProcessor(WanAttnProcessor):  # type: ignore[misc]
    """WAN's attention on a kernel of our choice; what diffusers calculates, in an order that compiles well.

    Attention over image tokens, with a mask or spread over devices is diffusers' own.
    """

    def __init__(self, kernel: Kernel) -> None:
        super().__init__()
        self.kernel = kernel
        #: Where diffusers attends: of the kernels that we choose it knows this one.
        self.kernel_of_diffusers = Kernel.TORCH if kernel is Kernel.TORCH else Kernel.CUDNN
        if self.kernel_of_diffusers is Kernel.CUDNN:
            self._attention_backend = AttentionBackendName._NATIVE_CUDNN

    def __call__(
        self,
        attn: Any,
        hidden_states: torch.Tensor,
        encoder_hidden_states: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        rotary_emb: tuple[torch.Tensor, torch.Tensor] | None = None,
    ) -> torch.Tensor:
        """See diffusers. ``rotary_emb`` is what :class:`SignedRope` makes."""
        if attn.add_k_proj is not None or attention_mask is not None or self._parallel_config is not None:
            attended: torch.Tensor = super().__call__(
                attn, hidden_states, encoder_hidden_states, attention_mask, rotary_emb
            )
            return attended
        query, key, value = _projected(attn, hidden_states, encoder_hidden_states)
        query = attn.norm_q(query).unflatten(2, (attn.heads, -1))
        key = attn.norm_k(key).unflatten(2, (attn.heads, -1))
        value = value.unflatten(2, (attn.heads, -1))
        if rotary_emb is not None:
            query, key = rotated(query, *rotary_emb), rotated(key, *rotary_emb)
        mixed: torch.Tensor = attn.to_out[0](attend(query, key, value, self.kernel).flatten(2, 3).type_as(query))
        return mixed


class SignedRope(torch.nn.Module):  # type: ignore[misc]
    """diffusers' rotary tables, with the sign of a rotation's first half in the sine's.

    So a rotation is two products and a swap of neighbours, which a compiler merges with the norm
    before it. diffusers' own processors read the sine's other half alone, and work with it as well.
    """

    sign: torch.Tensor

    def __init__(self, rope: torch.nn.Module) -> None:
        super().__init__()
        self.rope = rope
        tables: Any = rope
        sign = torch.tensor([-1.0, 1.0], device=tables.freqs_sin.device).repeat(tables.attention_head_dim // 2)
        self.register_buffer("sign", sign, persistent=False)

    def forward(self, hidden_states: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Cosines and signed sines, each ``[1, tokens, 1, channels of a head]``."""
        cosines, sines = self.rope(hidden_states)
        return cosines, sines * self.sign


def rotated(states: torch.Tensor, cosines: torch.Tensor, signed_sines: torch.Tensor) -> torch.Tensor:
    """``states`` ``[batch, tokens, heads, channels]``, turned by their places."""
    swapped = states.unflatten(-1, (-1, 2)).flip(-1).flatten(-2)
    return (states * cosines + swapped * signed_sines).type_as(states)


def _projected(
    attn: Any, hidden_states: torch.Tensor, encoder_hidden_states: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    if attn.fused_projections and encoder_hidden_states is None:
        query, key, value = attn.to_qkv(hidden_states).chunk(3, dim=-1)
        return query, key, value
    source = hidden_states if encoder_hidden_states is None else encoder_hidden_states
    return attn.to_q(hidden_states), attn.to_k(source), attn.to_v(source)


def _works(kernel: Kernel, device: torch.device, dtype: torch.dtype, head_dim: int) -> bool:
    generator = torch.Generator(device).manual_seed(0)
    shape = (1, _PROBED_TOKENS, 2, head_dim)
    query, key, value = (torch.randn(shape, generator=generator, device=device, dtype=dtype) for _ in range(3))
    try:
        if kernel is Kernel.CUDNN:
            with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
                attended = attend(query, key, value, Kernel.TORCH)
        else:
            attended = attend(query, key, value, kernel)
        plain = attend(query.float(), key.float(), value.float(), Kernel.TORCH)
        error = float((attended.float() - plain).norm() / plain.norm())
    except ImportError:
        return False
    except (RuntimeError, AssertionError, NotImplementedError) as reason:
        logger.info("attention by %s does not work here: %s", kernel.value, reason)
        return False
    if not error <= (TOLERATED_ERROR_OF_FP8 if kernel is Kernel.FLASH_3_FP8 else TOLERATED_ERROR):
        logger.warning("attention by %s is off by %.3g on this device and is not used", kernel.value, error)
        return False
    return True
