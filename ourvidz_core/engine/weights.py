"""The weights of a model's part: how large they are, and their way to the device and back.

A module keeps its parameters and buffers; only where their bytes lie changes. Strides stay, and so
does what is tied, so what a model computes is the same to the bit after any number of moves.
"""

from __future__ import annotations

import contextlib
import logging
import mmap
import time
import weakref
from collections.abc import Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

from attrs import frozen

if TYPE_CHECKING:
    import torch

logger = logging.getLogger(__name__)

GIB = 2**30
#: Where each tensor begins in a copy: no kernel asks for more.
_ALIGNMENT = 256
#: A model's modules lie in it, or in something in it: a wrapper around a diffusers pipeline.
_DEPTH = 2
_PORTABLE = 1


@frozen(eq=False)
class _Shared:
    """Parameters and buffers with the same bytes: one, or several that are tied."""

    tensors: tuple[torch.Tensor, ...]

    @property
    def first(self) -> torch.Tensor:
        return self.tensors[0]

    @property
    def bytes(self) -> int:
        return int(self.first.nbytes)

    def place(self, data: torch.Tensor) -> None:
        for tensor in self.tensors:
            tensor.data = data


class Weights:
    """The weights of ``modules``, on ``device`` or in main memory.

    Main memory is pinned for a CUDA device, and a copy there is kept when the weights come back to the
    device, so that they can leave again without being copied. Weights that were exchanged or changed in place
    since are copied anew; but what is changed behind autograd's back, as ``weight.data += ...`` does, is not seen,
    and belongs into a model's load.
    """

    def __init__(self, modules: Iterable[torch.nn.Module], device: torch.device) -> None:
        self._modules = tuple(modules)
        self._device = device
        self._copy: _HostCopy | None = None
        #: What lay on the device when the copy was known to be equal.
        self._copied: tuple[tuple[int, ...], ...] | None = None
        self.is_on_device = all(_lies_on(shared.first, device) for shared in self._shared())
        self.size_bytes = sum(shared.bytes for shared in self._shared())

    @property
    def host_bytes(self) -> int:
        """What they take of main memory."""
        if self._copy is not None:
            return self._copy.bytes
        return 0 if self.is_on_device else self.size_bytes

    @property
    def is_pinned(self) -> bool:
        """Whether the copy in main memory is pinned; False where there is none."""
        return self._copy is not None and self._copy.is_pinned

    def to_device(self) -> int:
        """Bring the weights to the device, and say how many bytes were copied.

        One that runs out of memory leaves them where they were.
        """
        import torch

        started = time.monotonic()
        shared = list(self._shared())
        # What is made in inference mode would look like another kind of tensor to what was compiled.
        with torch.inference_mode(False), torch.no_grad():
            arrived = [_empty_like(one.first, self._device).copy_(one.first, non_blocking=True) for one in shared]
            _wait_for(self._device)
            for one, data in zip(shared, arrived, strict=True):
                one.place(data)
        self._copied = _state_of(shared) if self._copy is not None else None
        self._arrived(shared, is_on_device=True, started=started)
        return self.size_bytes

    def to_host(self) -> int:
        """Take the weights off the device, and say how many bytes were copied: none where a copy was kept."""
        import torch

        copied = 0
        started = time.monotonic()
        shared = list(self._shared())
        with torch.inference_mode(False), torch.no_grad():
            if self._copy is None or self._copied != _state_of(shared):
                self._copy = None  # before the next: it would be there twice
                self._copy = _HostCopy(shared, is_pinned=self._device.type == "cuda")
                for one, data in zip(shared, self._copy.tensors, strict=True):
                    data.copy_(one.first, non_blocking=True)
                    copied += one.bytes
                _wait_for(self._device)
            for one, data in zip(shared, self._copy.tensors, strict=True):
                one.place(data)
        self._copied = None
        self._arrived(shared, is_on_device=False, started=started)
        return copied

    def forget_copy(self) -> None:
        """Free the copy in main memory of weights that are on the device."""
        if self.is_on_device:
            self._copy = self._copied = None

    def _arrived(self, shared: list[_Shared], *, is_on_device: bool, started: float) -> None:
        self.is_on_device = is_on_device
        # A plugin may have fused or added some since.
        self.size_bytes = sum(one.bytes for one in shared)
        seconds = time.monotonic() - started
        where = "on the device" if is_on_device else "in pinned main memory" if self.is_pinned else "in main memory"
        logger.debug("%.2f GiB of weights are %s after %.2f s", self.size_bytes / GIB, where, seconds)

    def _shared(self) -> Iterator[_Shared]:
        groups: dict[tuple[object, ...], list[torch.Tensor]] = {}
        for module in self._modules:
            for tensor in _tensors_of(module):
                key = (tensor.device, tensor.data_ptr(), tensor.dtype, tensor.shape, tensor.stride())
                group = groups.setdefault(key, [])
                if not any(tensor is other for other in group):
                    group.append(tensor)
        return (_Shared(tuple(group)) for group in groups.values())


class _HostCopy:
    """One block of main memory with a place for each weight.

    One block, because the operating system pins a few large ones far sooner than a thousand small ones,
    and because torch's own pinned memory comes in powers of two.
    """

    def __init__(self, shared: list[_Shared], *, is_pinned: bool) -> None:
        offsets, self.bytes = [], 0
        for one in shared:
            offsets.append(self.bytes)
            self.bytes += -(-one.bytes // _ALIGNMENT) * _ALIGNMENT
        block = _whole_pages(self.bytes)
        self.is_pinned = is_pinned and _pin(self, block)
        self.tensors = [_placed(block, offset, one.first) for offset, one in zip(offsets, shared, strict=True)]


def modules_of(model: object) -> list[torch.nn.Module]:
    """The torch modules that ``model`` is or holds and whose weights can be moved: none of accelerate's hooks is
    on them, and their tensors are plain ones."""
    found = list(dict.fromkeys(_found_in(model, _DEPTH)))
    return found if all(is_movable(module) for module in found) else []


def is_movable(module: torch.nn.Module) -> bool:
    """Whether nothing else moves the weights of ``module``, and they are plain tensors."""
    import torch

    hooked = any(hasattr(part, "_hf_hook") for part in module.modules())
    plain = (torch.Tensor, torch.nn.Parameter)
    return not hooked and all(
        type(tensor) in plain and not (tensor.is_meta or tensor.is_inference()) for tensor in _tensors_of(module)
    )


def _found_in(value: object, depth: int) -> Iterator[torch.nn.Module]:
    import torch

    if isinstance(value, torch.nn.Module):
        yield value
    elif depth >= 0 and not isinstance(value, str | bytes | type | torch.Tensor):
        for inner in _values_in(value):
            yield from _found_in(inner, depth - 1)


def _values_in(value: object) -> Iterable[object]:
    if isinstance(value, Mapping):
        return list(value.values())
    if isinstance(value, list | tuple):
        return value
    # attrs classes have slots.
    slots = (name for cls in type(value).__mro__ for name in getattr(cls, "__slots__", ()))
    inner = [getattr(value, name) for name in slots if hasattr(value, name)]
    return inner + list(getattr(value, "__dict__", {}).values())


def _tensors_of(module: torch.nn.Module) -> Iterator[torch.Tensor]:
    for tensor in (*module.parameters(), *module.buffers()):
        if tensor.numel():
            yield tensor


def _state_of(shared: list[_Shared]) -> tuple[tuple[int, ...], ...]:
    return tuple((one.first.data_ptr(), one.bytes, *(tensor._version for tensor in one.tensors)) for one in shared)


def _empty_like(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    import torch

    return torch.empty_strided(tensor.shape, _dense_strides(tensor), dtype=tensor.dtype, device=device)


def _placed(block: torch.Tensor, offset: int, like: torch.Tensor) -> torch.Tensor:
    flat = block[offset : offset + like.numel() * like.element_size()].view(like.dtype)
    return flat.as_strided(like.shape, _dense_strides(like), flat.storage_offset())


def _dense_strides(tensor: torch.Tensor) -> tuple[int, ...]:
    """The strides of ``tensor``, without the gaps where it is a slice of something larger."""
    import torch

    return tuple(torch.empty_like(tensor, device="meta").stride())


def _lies_on(tensor: torch.Tensor, device: torch.device) -> bool:
    return tensor.device.type == device.type and device.index in (None, tensor.device.index)


def _wait_for(device: torch.device) -> None:
    import torch

    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _whole_pages(size_bytes: int) -> torch.Tensor:
    """A block of main memory that shares no page with another: a page can be pinned once only.

    Its storage begins where it does, because there torch looks when it is asked whether a tensor is pinned.
    """
    import torch

    pages = max(1, -(-size_bytes // mmap.PAGESIZE))
    block = mmap.mmap(-1, pages * mmap.PAGESIZE, flags=mmap.MAP_PRIVATE)
    # Each page is cleared and pinned for itself, and of larger ones there are fewer. A kernel may not have them.
    with contextlib.suppress(OSError, AttributeError):
        block.madvise(mmap.MADV_HUGEPAGE)
    return torch.frombuffer(block, dtype=torch.uint8)


def _pin(copy: _HostCopy, block: torch.Tensor) -> bool:
    """Whether the operating system lets ``block`` be pinned."""
    import torch

    cudart: Any = torch.cuda.cudart()
    status = int(cudart.cudaHostRegister(block.data_ptr(), block.numel(), _PORTABLE))
    if status != 0:
        # Slower, and right: it may be forbidden in a container (ulimit -l).
        logger.warning("%.1f GiB of main memory could not be pinned (CUDA error %d)", block.numel() / GIB, status)
        with contextlib.suppress(RuntimeError):  # the next kernel is blamed for the error, and with that it is gone
            torch.zeros(1, device="cuda").add_(1)
        return False
    # The block is an argument, so that its memory is not given back before it is unpinned.
    weakref.finalize(copy, _unpin, block).atexit = False
    return True


def _unpin(block: torch.Tensor) -> None:
    import torch

    torch.cuda.synchronize()
    torch.cuda.cudart().cudaHostUnregister(block.data_ptr())
