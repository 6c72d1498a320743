"""Replay a function's launches as one CUDA graph, where the host cannot launch them as fast as the device works."""

from __future__ import annotations

import logging
from collections import OrderedDict
from collections.abc import Callable, Hashable
from typing import TYPE_CHECKING, Any

from attrs import frozen

from ourvidz_core.engine.device_memory import release_memory

if TYPE_CHECKING:
    import torch

logger = logging.getLogger(__name__)

#: Calls before the capture: the first compiles and chooses algorithms, the second is as all others will be.
_WARM_UPS = 2
#: A model's weights are moved together, and each look costs a fraction of a microsecond.
_WATCHED_WEIGHTS = 8


@frozen(kw_only=True)
class _Graph:
    replay: Callable[[], None]
    inputs: tuple[torch.Tensor, ...]
    outputs: Any


class GraphedCall:
    """A function of tensors, captured once for each signature of its arguments and then replayed.

    The signature is the shapes, the dtypes and the devices of the tensors, wherever they lie in
    nested tuples, lists and dicts, and all other arguments by value. Of the function it is asked that it
    does the same launches for the same signature, and reads nothing back from the device. Its weights stay
    where they are, or are those of ``module``: where they have moved, the graphs are dropped.

    **A result is overwritten by the next call**, whatever its signature: use it before, or clone it, or
    ask for ``clones``. ``capacity`` graphs are kept, the least recently used goes first; they
    share one pool of memory, which is as large as the largest needs.

    It calls straight through without CUDA, where gradients are recorded, inside another capture, and
    for a signature that could not be captured, which is logged once.
    """

    def __init__(
        self,
        function: Callable[..., Any],
        *,
        name: str = "",
        module: torch.nn.Module | None = None,
        capacity: int = 8,
        clones: bool = False,
    ) -> None:
        self.function = function
        self._name = name or getattr(function, "__qualname__", type(function).__name__)
        self._weights = _some(list(module.parameters())) if module is not None else ()
        self._places = self._find_places()
        self._capacity = capacity
        self._clones = clones
        self._graphs: OrderedDict[Hashable, _Graph] = OrderedDict()
        self._plain: set[Hashable] = set()
        self._pool: Any = None
        self._stream: torch.cuda.Stream | None = None

    def __len__(self) -> int:
        """How many graphs are kept."""
        return len(self._graphs)

    def __call__(self, *arguments: Any, **options: Any) -> Any:
        """The function's result; see the class for how long it lasts."""
        from torch.utils._pytree import tree_flatten, tree_unflatten

        leaves, tree = tree_flatten((arguments, options))
        device = _common_device(leaves)
        signature = _signature(leaves, tree)
        if device is None or signature is None or signature in self._plain:
            return self.function(*arguments, **options)
        if (places := self._find_places()) != self._places:
            self.forget()
            self._places = places
        if signature not in self._graphs:
            capture = self._capture_or_none(leaves, lambda given: tree_unflatten(given, tree), device)
            if capture is None:
                self._plain.add(signature)
                return self.function(*arguments, **options)
            self._graphs[signature] = capture
        self._graphs.move_to_end(signature)
        return self._replayed(self._graphs[signature], _tensors(leaves))

    def forget(self) -> None:
        """Drop all graphs and free their memory; what could not be captured may be tried again."""
        import torch

        had_graphs = bool(self._graphs)
        if had_graphs:
            torch.cuda.synchronize()  # the last replay may be under way
        self._graphs.clear()
        self._plain.clear()
        self._pool = None
        if had_graphs:
            release_memory()

    def _find_places(self) -> tuple[int, ...]:
        return tuple(weight.data_ptr() for weight in self._weights)

    def _replayed(self, graph: _Graph, tensors: list[torch.Tensor]) -> Any:
        import torch
        from torch.utils._pytree import tree_map_only

        for buffer, tensor in zip(graph.inputs, tensors, strict=True):
            buffer.copy_(tensor, non_blocking=True)
        graph.replay()
        return tree_map_only(torch.Tensor, torch.clone, graph.outputs) if self._clones else graph.outputs

    def _capture_or_none(
        self, leaves: list[Any], unflatten: Callable[[list[Any]], Any], device: torch.device
    ) -> _Graph | None:
        import torch

        while len(self._graphs) >= self._capacity:
            torch.cuda.synchronize(device)
            self._graphs.popitem(last=False)
        stream = torch.cuda.current_stream(device)
        try:
            with torch.cuda.device(device):
                return self._capture(leaves, unflatten, device)
        except Exception as error:  # whatever the device says against a capture, the function itself may do
            # A capture that breaks leaves its own stream in place.
            torch.cuda.set_stream(stream)
            reason = str(error).strip().splitlines() or [type(error).__name__]
        # Only here has the exception let go of the tensors in its frames.
        logger.warning("%s runs without a CUDA graph, and slower: %s", self._name, reason[0])
        if not self._graphs:
            self._pool = None
        release_memory()
        return None

    def _capture(self, leaves: list[Any], unflatten: Callable[[list[Any]], Any], device: torch.device) -> _Graph:
        import torch

        # Tensors made in inference mode could not be written to outside of it.
        with torch.inference_mode(False), torch.no_grad():
            given = [_buffer(leaf) if isinstance(leaf, torch.Tensor) else leaf for leaf in leaves]
        arguments, options = unflatten(given)
        if self._pool is None or not self._graphs:
            self._pool = torch.cuda.graph_pool_handle()
        if self._stream is None:
            self._stream = torch.cuda.Stream(device)
        self._stream.wait_stream(torch.cuda.current_stream(device))
        with torch.cuda.stream(self._stream):
            for _ in range(_WARM_UPS):
                self.function(*arguments, **options)
        torch.cuda.current_stream(device).wait_stream(self._stream)
        graph = torch.cuda.CUDAGraph()
        # Threads beside this one write the last job's files, and may wait for the device meanwhile.
        with torch.cuda.graph(graph, pool=self._pool, stream=self._stream, capture_error_mode="thread_local"):
            outputs = self.function(*arguments, **options)
        _refuse_what_cannot_be_seen_into(outputs)
        return _Graph(replay=graph.replay, inputs=tuple(_tensors(given)), outputs=outputs)


def _refuse_what_cannot_be_seen_into(outputs: Any) -> None:
    """An object would come back with tensors that nobody can clone."""
    import torch
    from torch.utils._pytree import tree_leaves

    for leaf in tree_leaves(outputs):
        if not isinstance(leaf, torch.Tensor | int | float | str | None):
            raise TypeError(f"its result holds a {type(leaf).__name__} and not only tensors")


def _some(weights: list[torch.nn.Parameter]) -> tuple[torch.nn.Parameter, ...]:
    """Enough of them to see that all have moved."""
    return tuple(weights[:: max(1, len(weights) // _WATCHED_WEIGHTS)])


def _common_device(leaves: list[Any]) -> torch.device | None:
    """The CUDA device that all tensors are on, where a graph may be used."""
    import torch

    devices = {leaf.device for leaf in leaves if isinstance(leaf, torch.Tensor)}
    if len(devices) != 1 or torch.is_grad_enabled():
        return None
    (device,) = devices
    if device.type != "cuda" or torch.cuda.is_current_stream_capturing():
        return None
    return device


def _signature(leaves: list[Any], tree: Any) -> Hashable | None:
    import torch

    parts = tuple(
        (leaf.shape, leaf.dtype, leaf.device) if isinstance(leaf, torch.Tensor) else (type(leaf), leaf)
        for leaf in leaves
    )
    signature = (parts, str(tree))
    try:
        hash(signature)
    except TypeError:
        return None
    return signature


def _tensors(leaves: list[Any]) -> list[torch.Tensor]:
    import torch

    return [leaf for leaf in leaves if isinstance(leaf, torch.Tensor)]


def _buffer(tensor: torch.Tensor) -> torch.Tensor:
    import torch

    return torch.empty_like(tensor).copy_(tensor)
