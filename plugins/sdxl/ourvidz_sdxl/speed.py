"""Make a loaded UNet and decoder as fast as their device allows, with the same results within numeric noise.

Every forward of SDXL's UNet is some 1,900 launches, more than a host can issue in the time that a GPU
takes for them; so they are compiled into fewer and replayed as one graph. On a CPU all of it is the plain model.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from diffusers.models.attention_processor import Attention
from torch.utils._pytree import tree_leaves

from ourvidz_core.engine.compilation import CompiledCall, may_compile
from ourvidz_core.engine.graphs import GraphedCall

#: Classes whose modules are compiled, each as one, and once for all that are alike. Compiled as a whole, the UNet
#: would be little faster and take a minute and a half.
REGIONS: tuple[str, ...] = ("BasicTransformerBlock", "ResnetBlock2D")


class FastUnet:
    """Takes the place of ``unet.forward``: compiled where that may be, and replayed as a graph on a GPU.

    A size is compiled when it is first used; once :meth:`settle` was called, new ones run as they
    come, still as a graph, so that no job waits for a compiler.
    """

    def __init__(self, unet: Any, compiled: CompiledCall | None) -> None:
        self._forward: Callable[..., Any] = unet.forward
        self._call = compiled
        self._shapes = _CompiledShapes()
        self._graphed = GraphedCall(self._launch, name="SDXL's UNet", module=unet, clones=True)
        self._is_plain = False
        self._ran_compiled = False
        unet.forward = self

    @property
    def may_be_compiled(self) -> bool:
        """Whether new shapes may be compiled at all."""
        return self._call is not None and self._call.is_compiled

    @property
    def ran_compiled(self) -> bool:
        """Whether the last forward was a compiled one."""
        return self._ran_compiled

    def __call__(self, sample: torch.Tensor, timestep: Any, encoder_hidden_states: Any, **options: Any) -> Any:
        """The UNet's forward."""
        if self._is_plain:
            self._ran_compiled = False
            return self._plain(sample, timestep, encoder_hidden_states, **options)
        if isinstance(timestep, torch.Tensor):
            # Some solvers count in whole numbers; the UNet makes this of them, and would need a graph for each kind.
            timestep = timestep.float()
        # What was compiled for one number of rows does for all others, but for a single one, without guidance.
        shape = (len(sample) > 1, sample.shape[1:], encoder_hidden_states.shape[1:])
        is_compiled = self.may_be_compiled and self._shapes.take(shape)
        made = self._graphed(is_compiled, sample, timestep, encoder_hidden_states, **options)
        self._ran_compiled = is_compiled and self.may_be_compiled
        return made

    def settle(self) -> None:
        """Compile no more shapes than there are now."""
        self._shapes.settle()

    def forget(self) -> None:
        """Free the memory of the graphs; they are made again when they are needed."""
        self._graphed.forget()

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
        return self._plain(*arguments, **options)

    def _plain(self, *arguments: Any, **options: Any) -> Any:
        if self._call is None:
            return self._forward(*arguments, **options)
        return _as_it_came(self._forward, *arguments, **options)


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


def compiled_unet(unet: Any, device: str) -> CompiledCall | None:
    """The UNet's forward with its regions compiled, where that may be."""
    if not may_compile(device):
        return None
    forward: Callable[..., Any] = unet.forward
    compile_regions(unet)
    return CompiledCall(partial(_as_it_came, forward), compiled=forward, name="SDXL's UNet")


def compile_regions(unet: Any, **options: Any) -> None:
    """Have the regions of ``unet`` compiled as they are called; ``options`` are ``torch.compile``'s."""
    for region in _outermost(unet):
        region.compile(fullgraph=True, dynamic=False, **options)
        region._compiled_call_impl = partial(_with_any_rows, region._compiled_call_impl)


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


def _outermost(module: torch.nn.Module) -> Iterator[torch.nn.Module]:
    for child in module.children():
        if type(child).__name__ in REGIONS:
            yield child
        else:
            yield from _outermost(child)


def _with_any_rows(call: Callable[..., Any], *arguments: Any, **options: Any) -> Any:
    """Call it with the first size of each tensor left open, whatever is said of the others."""
    for leaf in tree_leaves((arguments, options)):
        if isinstance(leaf, torch.Tensor):
            torch._dynamo.maybe_mark_dynamic(leaf, 0)
    return call(*arguments, **options)


def _as_it_came(forward: Callable[..., Any], *arguments: Any, **options: Any) -> Any:
    with torch.compiler.set_stance("force_eager"):
        return forward(*arguments, **options)
