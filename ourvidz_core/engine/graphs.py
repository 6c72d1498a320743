"""Replay a function's launches as one CUDA graph, where the host cannot launch them as fast as the device works."""

from __future__ import annotations

import contextlib
import logging
from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterator
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
#: Graphs whose capture broke. torch's allocator of pinned memory may go on asking them which stream was theirs.
_broken: list[torch.cuda.CUDAGraph] = []


class _Refused(Exception):
    """The device does not let a function be captured."""


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
        #: What could not be captured, for lack of memory perhaps, and what never will be.
        self._plain: set[Hashable] = set()
        self._refused: set[Hashable] = set()
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
        if device is None or signature is None or signature in self._plain or signature in self._refused:
            return self.function(*arguments, **options)
        if (places := self._find_places()) != self._places:
            self.forget()
            self._places = places
        if signature not in self._graphs:
            capture = self._capture_or_none(signature, leaves, lambda given: tree_unflatten(given, tree), device)
            if capture is None:
                return self.function(*arguments, **options)
            self._graphs[signature] = capture
        self._graphs.move_to_end(signature)
        return self._replayed(self._graphs[signature], _tensors(leaves))

    def forget(self) -> None:
        """Drop all graphs and free their memory; what may have lacked memory is captured when it is next called."""
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
        self, signature: Hashable, leaves: list[Any], unflatten: Callable[[list[Any]], Any], device: torch.device
    ) -> _Graph | None:
        import torch

        while len(self._graphs) >= self._capacity:
            torch.cuda.synchronize(device)
            self._graphs.popitem(last=False)
        try:
            with torch.cuda.device(device):
                return self._capture(leaves, unflatten, device)
        except _Refused as error:
            self._refused.add(signature)
            self._pool = None  # where a capture broke, none may begin
            reason = _first_line(error)
        except Exception as error:  # whatever else stands against a capture, the function itself may do
            self._plain.add(signature)
            reason = _first_line(error)
        # Only here has the exception let go of the tensors in its frames.
        logger.warning("%s runs without a CUDA graph, and slower: %s", self._name, reason)
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
        inputs = tuple(_tensors(given))
        with _recorded(self._pool, self._stream, device, any_tensor=inputs[0]) as graph:
            outputs = self.function(*arguments, **options)
        _refuse_what_cannot_be_seen_into(outputs)
        return _Graph(replay=graph.replay, inputs=inputs, outputs=outputs)


@contextlib.contextmanager
def _recorded(
    pool: Any, stream: torch.cuda.Stream, device: torch.device, *, any_tensor: torch.Tensor
) -> Iterator[torch.cuda.CUDAGraph]:
    """The graph of what is launched inside.

    :raises _Refused: the capture broke, and nothing of it is left.
    """
    import torch

    caller = torch.cuda.current_stream(device)
    graph = torch.cuda.CUDAGraph()
    try:
        with _capturing(graph, stream, pool):
            yield graph
    except Exception as error:
        # A capture that breaks leaves its own stream in place.
        torch.cuda.set_stream(caller)
        if _has_ended(graph):
            raise
        _end_broken(graph, pool, stream, device, any_tensor)
        raise _Refused(str(error)) from error


def _capturing(graph: torch.cuda.CUDAGraph, stream: torch.cuda.Stream, pool: Any = None) -> torch.cuda.graph:
    import torch

    # Threads beside this one write the last job's files, and may wait for the device meanwhile.
    return torch.cuda.graph(graph, pool=pool, stream=stream, capture_error_mode="thread_local")


def _has_ended(graph: torch.cuda.CUDAGraph) -> bool:
    try:
        graph.pool()
    except RuntimeError:
        return False
    return True


def _end_broken(
    graph: torch.cuda.CUDAGraph,
    pool: Any,
    stream: torch.cuda.Stream,
    device: torch.device,
    any_tensor: torch.Tensor,
) -> None:
    """End what torch takes for a capture that goes on, where the device has given it up.

    Without it no random number could be drawn on the device any more, and ``empty_cache`` would give nothing back.
    """
    import torch

    # torch 2.12 and later have ended this, and keep the pool: https://github.com/pytorch/pytorch/pull/190308
    with contextlib.suppress(RuntimeError):
        torch._C._cuda_endAllocateToPool(device.index, pool)
        torch._C._cuda_releasePool(device.index, pool)
    # The generator hears that nothing is captured any longer from a capture that ends well, and from nothing else.
    # A new state would do for it, and not for the graphs that were recorded with the old one.
    with _capturing(torch.cuda.CUDAGraph(), stream):
        any_tensor.zero_()  # is recorded and not done
    graph.reset()
    _broken.append(graph)


def _first_line(error: Exception) -> str:
    return next(iter(str(error).strip().splitlines()), type(error).__name__)


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
