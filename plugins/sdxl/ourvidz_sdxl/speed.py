"""Make a loaded UNet as fast as its device allows, with the same results within numeric noise.

Every forward of SDXL's UNet is some 1,900 launches, more than a host can issue in the time that a GPU
takes for them; so they are made fewer and replayed as one graph. On a CPU all of it is the plain model.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from diffusers.models.attention_processor import Attention

from ourvidz_core.engine.compilation import CompiledCall, may_compile
from ourvidz_core.engine.graphs import GraphedCall
from ourvidz_sdxl.blocks import FastParts
from ourvidz_sdxl.operations import Operations, fast_operations


class FastUnet:
    """Takes the place of ``unet.forward``: with compiled kernels where that may be, replayed as a graph on a GPU."""

    def __init__(self, unet: Any, compiled: CompiledCall | None, parts: FastParts | None = None) -> None:
        self._forward: Callable[..., Any] = unet.forward
        self._call = compiled
        self._parts = parts
        self._graphed = GraphedCall(self._launch, name="SDXL's UNet", module=unet, clones=True)
        self._is_plain = False
        self._ran_compiled = False
        unet.forward = self

    @property
    def may_be_compiled(self) -> bool:
        """Whether compiled kernels are used at all."""
        return self._call is not None and self._call.is_compiled

    @property
    def ran_compiled(self) -> bool:
        """Whether the last forward was a compiled one."""
        return self._ran_compiled

    def __call__(self, sample: torch.Tensor, timestep: Any, encoder_hidden_states: Any, **options: Any) -> Any:
        """The UNet's forward."""
        if self._is_plain:
            self._ran_compiled = False
            return self._forward(sample, timestep, encoder_hidden_states, **options)
        if isinstance(timestep, torch.Tensor):
            # Some solvers count in whole numbers; the UNet makes this of them, and would need a graph for each kind.
            timestep = timestep.float()
        is_compiled = self.may_be_compiled and FastParts.take(options)
        if is_compiled and self._parts is not None:
            if not self._parts.has_room_for(encoder_hidden_states):
                self.forget()
            self._parts.prepare(encoder_hidden_states)
        made = self._graphed(is_compiled, sample, timestep, encoder_hidden_states, **options)
        self._ran_compiled = is_compiled and self.may_be_compiled
        return made

    def forget(self) -> None:
        """Free the memory of the graphs; they are made again when they are needed."""
        self._graphed.forget()
        if self._parts is not None:
            self._parts.forget()

    @contextmanager
    def as_it_came(self) -> Iterator[None]:
        """While it is open the forward is the model's own: for whoever changes the UNet, or calls it otherwise."""
        self._is_plain = True
        try:
            yield
        finally:
            self._is_plain = False

    def _launch(self, is_compiled: bool, *arguments: Any, **options: Any) -> Any:
        if is_compiled and self._call is not None:
            return self._call(*arguments, **options)
        return self._forward(*arguments, **options)


def fast_unet(unet: Any, device: str) -> FastUnet:
    """``unet``, whose projections are fused on a GPU, as fast as may be there."""
    if not may_compile(device):
        return FastUnet(unet, None)
    operations = fast_operations(device, unet.dtype)
    if operations == Operations():  # no kernel runs here, which was logged
        return FastUnet(unet, None)
    forward: Callable[..., Any] = unet.forward
    parts = FastParts(unet, operations)

    def compiled(*arguments: Any, **options: Any) -> Any:
        with parts.running():
            return forward(*arguments, **options)

    return FastUnet(unet, CompiledCall(forward, compiled=compiled, name="SDXL's UNet"), parts)


def fuse_projections(unet: Any) -> None:
    """Let one product make the queries, keys and values of an attention, and one the keys and values of a text.

    The single layers stay for those who call them, as parts of the one that holds the weights.
    """
    unet.fuse_qkv_projections()
    for module in unet.modules():
        if isinstance(module, Attention) and module.fused_projections:
            fused, names = (
                (module.to_kv, ("to_k", "to_v"))
                if module.is_cross_attention
                else (module.to_qkv, ("to_q", "to_k", "to_v"))
            )
            for name, rows in zip(names, torch.arange(fused.out_features).chunk(len(names)), strict=True):
                setattr(module, name, _Part(fused, int(rows[0]), int(rows[-1]) + 1))


class _Part(torch.nn.Module):  # type: ignore[misc]
    """Some of the outputs of a layer that it does not own."""

    def __init__(self, layer: torch.nn.Linear, start: int, end: int) -> None:
        super().__init__()
        self._layer = (layer,)  # in a tuple, or its weights would count twice
        self._rows = slice(start, end)

    def forward(self, given: torch.Tensor) -> torch.Tensor:
        (layer,) = self._layer
        bias = None if layer.bias is None else layer.bias[self._rows]
        return torch.nn.functional.linear(given, layer.weight[self._rows], bias)
