"""Make a loaded transformer fast on its device. Nothing here changes a result beyond its last digits."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from attrs import field, frozen
from torch.nn import functional

from ourvidz_core.engine.compilation import CompiledCall, may_compile
from ourvidz_wan.attention import Kernel, KernelAttnProcessor, SignedRope, best_kernel

logger = logging.getLogger(__name__)

#: What ``torch.compile`` is told of a block. Its products are cuBLAS's, which needs no tuning. Rounding where eager
#: code rounds costs 2% of a single frame, and latents then differ from diffusers' by 0.010 and not 0.028 of their
#: length; without it they are nearer to those of single precision, which is not what was asked for.
BLOCK_OPTIONS: Mapping[str, Any] = {"fullgraph": True, "options": {"emulate_precision_casts": True}}


@frozen(kw_only=True)
class Acceleration:
    """What was done to a transformer."""

    kernel: Kernel = Kernel.TORCH
    compiled: tuple[CompiledCall, ...] = field(default=(), repr=False)

    @property
    def facts(self) -> dict[str, Any]:
        """What is true of it now: compiling may have failed since."""
        is_compiled = bool(self.compiled) and all(call.is_compiled for call in self.compiled)
        return {"attention": self.kernel.value, "compiled": is_compiled}


def prepare_transformer(transformer: torch.nn.Module, device: torch.device) -> Acceleration | None:
    """Choose the attention kernel, fuse, and compile the blocks; on a CPU nothing is done, and None answered.

    Blocks that diffusers has hooked, to spread them over devices, are left uncompiled.
    """
    if device.type != "cuda":
        return None
    config: Any = transformer.config
    dtype = next(_ffns(transformer)[0].parameters()).dtype
    kernel = best_kernel(device, dtype, config.attention_head_dim)
    use_kernel(transformer, kernel)
    fuse_projections(transformer)
    fuse_gelu(transformer)
    compiled = compile_blocks(transformer) if may_compile(str(device)) else ()
    return Acceleration(kernel=kernel, compiled=compiled)


def use_kernel(transformer: torch.nn.Module, kernel: Kernel) -> None:
    """Have all attention use ``kernel``, and the rotary tables that go with it."""
    model: Any = transformer
    for _, attn in (*_named(transformer, "attn1"), *_named(transformer, "attn2")):
        attn.set_processor(KernelAttnProcessor(kernel))
    if not isinstance(model.rope, SignedRope):
        model.rope = SignedRope(model.rope)


@contextmanager
def attending_in_fp8(transformer: torch.nn.Module) -> Iterator[None]:
    """Have what :func:`use_kernel` prepared attend to itself in fp8 meanwhile, and to its text as before.

    The first time it is compiled once more.
    """
    processors = [attn.processor for _, attn in _named(transformer, "attn1")]
    before = [processor.kernel for processor in processors]
    for processor in processors:
        processor.kernel = Kernel.FLASH_3_FP8
    try:
        yield
    finally:
        for processor, kernel in zip(processors, before, strict=True):
            processor.kernel = kernel


def fuse_projections(transformer: torch.nn.Module) -> None:
    """Give each self-attention one projection in place of three; those that it replaces are let go."""
    for name, attn in _named(transformer, "attn1"):
        if attn.fused_projections:
            continue
        attn.fuse_projections()
        attn.to_qkv.requires_grad_(False)
        for replaced in ("to_q", "to_k", "to_v"):
            delattr(attn, replaced)
        logger.debug("%s has one projection", name)


def fuse_gelu(transformer: torch.nn.Module) -> None:
    """Have each feed-forward apply its GELU where its product is written: its channels pass memory once less."""
    for ffn in _ffns(transformer):
        if getattr(ffn.net[0], "approximate", None) == "tanh":
            ffn.net[0] = LinearGelu(ffn.net[0].proj)


def compile_blocks(transformer: torch.nn.Module) -> tuple[CompiledCall, ...]:
    """Compile each kind of repeated block once, for all of its blocks."""
    model: Any = transformer
    calls: dict[type, CompiledCall] = {}
    for block in transformer.modules():
        kind = type(block)
        if kind.__name__ not in model._repeated_blocks or "forward" in vars(block):
            continue
        if kind not in calls:
            calls[kind] = CompiledCall(kind.forward, name=kind.__name__, **BLOCK_OPTIONS)
        block.forward = partial(calls[kind], block)
    return tuple(calls.values())


class LinearGelu(torch.nn.Module):  # type: ignore[misc]
    """A linear layer and the tanh GELU behind it, in one operation."""

    def __init__(self, proj: torch.nn.Linear) -> None:
        super().__init__()
        self.proj = proj

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """``[..., channels]`` to ``[..., more channels]``."""
        result: torch.Tensor = linear_gelu(hidden_states, self.proj.weight, self.proj.bias)
        return result


@torch.library.custom_op("ourvidz_wan::linear_gelu", mutates_args=())  # type: ignore[untyped-decorator]
def linear_gelu(hidden_states: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    """``gelu(hidden_states @ weight.T + bias)``; a compiler would split torch's own operation again."""
    if not hidden_states.is_cuda:
        return functional.gelu(functional.linear(hidden_states, weight, bias), approximate="tanh")
    rows = hidden_states.flatten(0, -2)
    result: torch.Tensor = torch._addmm_activation(bias, rows, weight.t(), use_gelu=True)
    return result.view(*hidden_states.shape[:-1], weight.shape[0])


@linear_gelu.register_fake  # type: ignore[untyped-decorator]
def _(hidden_states: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:  # noqa: ARG001
    return hidden_states.new_empty(*hidden_states.shape[:-1], weight.shape[0])


def _ffns(transformer: torch.nn.Module) -> list[Any]:
    return [module for _, module in _named(transformer, "ffn")]


def _named(transformer: torch.nn.Module, role: str) -> list[tuple[str, Any]]:
    return [(name, module) for name, module in transformer.named_modules() if name.rsplit(".", 1)[-1] == role]
