"""Read safetensors files straight to a device, by several threads.

One thread copies a fraction of what a disk or the page cache gives, and what is mapped
reaches a GPU by one small buffer of its driver. Here each thread reads into pinned memory of
its own, from which the device fetches it; another precision is made on the device too.
"""

from __future__ import annotations

import contextlib
import json
import logging
import math
import os
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from pathlib import Path
from typing import TYPE_CHECKING, Any

from attrs import frozen

if TYPE_CHECKING:
    import torch

logger = logging.getLogger(__name__)

#: Pinned memory of a thread, and what is read at once.
_CHUNK_BYTES = 16 * 2**20
_THREADS = 8
_REPORT_SECONDS = 0.5
#: And the log, which says where a start of minutes has come to.
_SAY_SECONDS = 2.0
_SUFFIX = ".safetensors"
#: The largest header that the format allows.
_HEADER_BYTES = 100_000_000
_DTYPES = {
    "F64": "float64",
    "F32": "float32",
    "F16": "float16",
    "BF16": "bfloat16",
    "I64": "int64",
    "I32": "int32",
    "I16": "int16",
    "I8": "int8",
    "U8": "uint8",
    "BOOL": "bool",
    "F8_E4M3": "float8_e4m3fn",
    "F8_E5M2": "float8_e5m2",
}


@frozen(kw_only=True)
class _Stored:
    """A tensor in a file."""

    path: Path
    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    #: Bytes from the beginning of the file.
    begin: int
    end: int


@frozen(kw_only=True)
class _Piece:
    """Bytes of a stored tensor that are read at once, and where in the file they begin."""

    stored: _Stored
    begin: int
    end: int


def read_weights(
    paths: Sequence[Path],
    *,
    device: str | torch.device = "cpu",
    dtype_of: Callable[[str], torch.dtype | None] = lambda name: None,
    on_progress: Callable[[int, int], None] = lambda done_bytes, total_bytes: None,
    threads: int = _THREADS,
) -> dict[str, torch.Tensor]:
    """The tensors of safetensors files, by name, on ``device``.

    ``dtype_of`` may give a floating-point tensor another precision. ``on_progress`` is told now and
    then, in the caller's thread, what it raises ends the reading. The caller's thread waits:
    while it does, the others do nothing on the device but copy.

    :raises ValueError: a file is no safetensors file, or is cut.
    :raises OSError: a file cannot be read.
    """
    import torch

    place = torch.device(device)
    stored = [tensor for path in paths for tensor in _stored_in(path)]
    found: dict[str, torch.Tensor] = {}
    for tensor in stored:
        wanted = dtype_of(tensor.name) if tensor.dtype.is_floating_point else None
        found[tensor.name] = torch.empty(tensor.shape, dtype=wanted or tensor.dtype, device=place)
    total = sum(tensor.end - tensor.begin for tensor in stored)
    started, said = time.monotonic(), time.monotonic()
    name = "/".join(paths[0].parts[-2:]) if paths else "nothing"

    def tell(done_bytes: int, total_bytes: int) -> None:
        nonlocal said
        on_progress(done_bytes, total_bytes)
        if time.monotonic() - said >= _SAY_SECONDS:
            said = time.monotonic()
            logger.info("reading %s: %.1f of %.1f GB", name, done_bytes / 1e9, total_bytes / 1e9)

    _Reading(_chunks(stored), found, place).finish(min(threads, os.cpu_count() or 1), total, tell)
    seconds = time.monotonic() - started
    logger.info("read %s: %.2f GB to %s in %.2f s", name, total / 1e9, place, seconds)
    return found


def read_module(
    cls: Any,
    directory: Path,
    *,
    device: str | torch.device,
    dtype: torch.dtype,
    kept_in_float32: Sequence[str] = (),
    on_progress: Callable[[int, int], None] = lambda done_bytes, total_bytes: None,
) -> torch.nn.Module | None:
    """A diffusers model of class ``cls`` with the weights in ``directory``, on ``device``.

    None where its files are not plainly the model's, under older names of its weights for example: those are a
    matter of ``from_pretrained``. ``kept_in_float32`` are parts of names, as in ``_keep_in_fp32_modules``.
    """
    import torch
    from accelerate import init_empty_weights

    paths = weight_files(directory)
    if not paths:
        return None
    with init_empty_weights(include_buffers=False):
        model: Any = cls.from_config(cls.load_config(directory, local_files_only=True))
    expected = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    if expected != {tensor.name: tensor.shape for path in paths for tensor in _stored_in(path)}:
        return None

    def dtype_of(name: str) -> torch.dtype:
        return torch.float32 if set(name.split(".")) & set(kept_in_float32) else dtype

    weights = read_weights(paths, device=device, dtype_of=dtype_of, on_progress=on_progress)
    model.load_state_dict(weights, assign=True)
    model.register_to_config(_name_or_path=str(directory))
    module: torch.nn.Module = model.to(device).eval()
    return module


@contextlib.contextmanager
def tensor_by_tensor() -> Iterator[None]:
    """Let transformers' ``from_pretrained`` allocate each tensor by itself.

    It would take the place of all of them from the device as one block before it reads the first. What else
    comes to lie in gaps of that block keeps it whole, 14 GiB of a language model for a kilobyte of another,
    and where memory is short so large a block may not be had though there is enough.
    """
    from transformers import modeling_utils

    own = modeling_utils.caching_allocator_warmup
    modeling_utils.caching_allocator_warmup = lambda *arguments, **options: None
    try:
        yield
    finally:
        modeling_utils.caching_allocator_warmup = own


def weight_files(directory: Path) -> list[Path]:
    """The safetensors files of a model's directory: one, or the shards that its index names; else none."""
    indexes = sorted(directory.glob(f"*{_SUFFIX}.index.json"))
    if len(indexes) == 1:
        names = json.loads(indexes[0].read_text("utf-8"))["weight_map"].values()
        return [directory / name for name in sorted(set(names))]
    files = sorted(directory.glob(f"*{_SUFFIX}"))
    # Beside another there is a second precision of the same weights.
    return files if len(files) == 1 and not indexes else []


class _Reading:
    """Chunks that threads take one after another until none is left or one failed."""

    def __init__(
        self, chunks: Iterator[list[_Piece]], targets: Mapping[str, torch.Tensor], place: torch.device
    ) -> None:
        self._chunks = chunks
        self._targets = targets
        self._place = place
        self._lock = threading.Lock()
        self._is_over = threading.Event()
        self._done_bytes = 0

    def finish(self, threads: int, total_bytes: int, on_progress: Callable[[int, int], None]) -> None:
        """Read everything."""
        import torch

        if self._place.type == "cuda":
            # Memory of the targets may be in use until what was launched before is done.
            torch.cuda.current_stream(self._place).synchronize()
        with ThreadPoolExecutor(threads, thread_name_prefix="weights") as pool:
            work = [pool.submit(self._work) for _ in range(threads)]
            try:
                for one in work:
                    while not one.done():
                        on_progress(self._done_bytes, total_bytes)
                        wait([one], timeout=_REPORT_SECONDS)
                    one.result()
            finally:
                self._is_over.set()
        if self._place.type == "cuda":
            # What the threads' streams used for other precisions is nobody's any more.
            torch.cuda.empty_cache()
        on_progress(total_bytes, total_bytes)

    def _work(self) -> None:
        import torch

        is_cuda = self._place.type == "cuda"
        buffer = torch.empty(_CHUNK_BYTES, dtype=torch.uint8, pin_memory=is_cuda)
        stream = torch.cuda.Stream(self._place) if is_cuda else None
        try:
            while (chunk := self._next()) is not None:
                self._read(chunk, buffer)
                # Without CUDA a stream of None changes nothing.
                with torch.inference_mode(False), torch.no_grad(), torch.cuda.stream(stream):
                    for piece in chunk:
                        self._place_piece(piece, buffer[piece.begin - chunk[0].begin : piece.end - chunk[0].begin])
                if stream is not None:
                    stream.synchronize()
                with self._lock:
                    self._done_bytes += chunk[-1].end - chunk[0].begin
        except BaseException:
            self._is_over.set()
            if stream is not None:
                stream.synchronize()  # nothing may arrive in memory that is somebody else's by then
            raise

    def _next(self) -> list[_Piece] | None:
        with self._lock:
            return None if self._is_over.is_set() else next(self._chunks, None)

    def _read(self, chunk: list[_Piece], buffer: torch.Tensor) -> None:
        path, begin, end = chunk[0].stored.path, chunk[0].begin, chunk[-1].end
        room = memoryview(buffer.numpy())[: end - begin]
        with path.open("rb", buffering=0) as file:
            file.seek(begin)
            done = 0
            while done < len(room):
                number = file.readinto(room[done:])
                if not number:
                    raise ValueError(f"{path} became shorter while it was read")
                done += number

    def _place_piece(self, piece: _Piece, raw: torch.Tensor) -> None:
        import torch

        stored, target = piece.stored, self._targets[piece.stored.name]
        begin, end = piece.begin - stored.begin, piece.end - stored.begin
        if stored.dtype == target.dtype:
            target.reshape(-1).view(torch.uint8)[begin:end].copy_(raw, non_blocking=True)
            return
        size = stored.dtype.itemsize
        # A copy of its own, since a piece may begin at any byte of the buffer.
        given = raw.clone() if self._place.type == "cpu" else raw.to(self._place, non_blocking=True)
        target.reshape(-1)[begin // size : end // size].copy_(given.view(stored.dtype))


def _stored_in(path: Path) -> list[_Stored]:
    """The tensors of a file, in the order in which they lie there."""
    import torch

    size = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if not 2 <= length <= min(_HEADER_BYTES, size - 8):
            raise ValueError(f"{path} is no safetensors file, or is cut; get it again")
        header: dict[str, Any] = json.loads(file.read(length))
    header.pop("__metadata__", None)
    found = []
    for name, entry in header.items():
        if entry["dtype"] not in _DTYPES:
            raise ValueError(f"{path} holds {name} as {entry['dtype']}, which is none of {', '.join(_DTYPES)}")
        dtype, shape = getattr(torch, _DTYPES[entry["dtype"]]), tuple(entry["shape"])
        begin, end = (8 + length + offset for offset in entry["data_offsets"])
        if end > size or end - begin != dtype.itemsize * math.prod(shape):
            raise ValueError(f"{path} is cut or damaged at {name}; get it again")
        found.append(_Stored(path=path, name=name, dtype=dtype, shape=shape, begin=begin, end=end))
    return sorted(found, key=lambda stored: stored.begin)


def _chunks(tensors: Sequence[_Stored]) -> Iterator[list[_Piece]]:
    """Neighbouring pieces that a buffer holds together."""
    chunk: list[_Piece] = []
    for piece in _pieces(tensors):
        is_next = chunk and chunk[-1].stored.path == piece.stored.path and chunk[-1].end == piece.begin
        if chunk and (not is_next or piece.end - chunk[0].begin > _CHUNK_BYTES):
            yield chunk
            chunk = []
        chunk.append(piece)
    if chunk:
        yield chunk


def _pieces(tensors: Sequence[_Stored]) -> Iterator[_Piece]:
    for stored in tensors:
        for begin in range(stored.begin, stored.end, _CHUNK_BYTES):
            yield _Piece(stored=stored, begin=begin, end=min(begin + _CHUNK_BYTES, stored.end))
