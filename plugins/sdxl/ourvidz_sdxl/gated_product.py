"""A product of which one half goes through GELU and gates the other, as one kernel for Hopper.

One warp has tiles moved to shared memory and two groups of warps multiply them, each half of a tile's rows. One of the
two is some steps ahead, so that the tensor cores have work while the other applies GELU. It is written in Gluon: from
Triton the compiler makes a kernel without such parts, in which they wait.
"""

# mypy: disable-error-code="no-untyped-def, untyped-decorator"

from __future__ import annotations

from typing import Any

import torch
import triton
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

#: Rows that a group of warps multiplies, columns of a tile, and the depth that is moved at once.
_TALL, _WIDE, _DEEP = gl.constexpr(64), gl.constexpr(128), gl.constexpr(64)
#: Depths in shared memory at once, tiles of rows that share their columns, and depths that the first group is ahead.
_STAGES, _GROUP, _AHEAD = gl.constexpr(4), gl.constexpr(8), gl.constexpr(3)
_WARPS = gl.constexpr(4)


def geglu(given: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    """A product (..., depth) with (2 * width, depth), of which one half goes through GELU and gates the other.

    In bfloat16, for a width of whole tiles of 128 and a depth of whole eights.
    """
    flat = given.reshape(-1, given.shape[-1])
    rows, depth = flat.shape
    width = weight.shape[0] // 2
    made = torch.empty((rows, width), device=given.device, dtype=given.dtype)
    tiles = triton.cdiv(rows, 2 * _TALL.value) * (width // _WIDE.value)
    processors = torch.cuda.get_device_properties(given.device).multi_processor_count
    with torch.cuda.device_of(given):
        _geglu[(min(processors, tiles),)](
            _tiles(flat, _TALL, _DEEP),
            _tiles(weight, _WIDE, _DEEP),
            bias,
            _tiles(made, _TALL, _WIDE),
            rows,
            width,
            depth,
            num_warps=_WARPS.value,
        )
    return made.view(*given.shape[:-1], width)


def _tiles(tensor: torch.Tensor, tall: Any, wide: Any) -> Any:
    shape = [tall.value, wide.value]
    return TensorDescriptor.from_tensor(tensor, shape, gl.NVMMASharedLayout.get_default_for(shape, gl.bfloat16))


@gluon.jit
def _geglu(given, weight, bias, made, rows, width, depth):
    above_below = gl.allocate_shared_memory(given.dtype, [2 * _STAGES, _TALL, _DEEP], given.layout)
    halves = gl.allocate_shared_memory(weight.dtype, [2 * _STAGES, _WIDE, _DEEP], weight.layout)
    # Values and gates are multiplied at once: rows of the other factor are read from shared memory once.
    both = halves._reinterpret(weight.dtype, [_STAGES, 2 * _WIDE, _DEEP], weight.layout)
    results = gl.allocate_shared_memory(made.dtype, [2, _TALL, _WIDE], made.layout)
    full = gl.allocate_shared_memory(gl.int64, [_STAGES, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [_STAGES, 1], mbarrier.MBarrierLayout())
    is_ahead = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    for stage in gl.static_range(_STAGES):
        mbarrier.init(full.index(stage), count=1)
        mbarrier.init(empty.index(stage), count=2)
    mbarrier.init(is_ahead, count=1)
    fence_async_shared()
    gl.warp_specialize(
        [
            (_multiply, (0, made, bias, above_below, both, results, full, empty, is_ahead, rows, width, depth)),
            (_multiply, (1, made, bias, above_below, both, results, full, empty, is_ahead, rows, width, depth)),
            (_move, (given, weight, above_below, halves, full, empty, rows, width, depth)),
        ],
        [4, 1],  # warps, and registers of each of their threads
        [232, 24],
    )


@gluon.jit
def _move(given, weight, above_below, halves, full, empty, rows, width, depth):
    step = 0
    for tile in range(gl.program_id(0), _tiles_of(rows, width), gl.num_programs(0)):
        top, left = _place(tile, rows, width)
        for start in range(0, depth, _DEEP):
            stage = step % _STAGES
            ready = full.index(stage)
            mbarrier.wait(empty.index(stage), ((step // _STAGES) & 1) ^ 1)
            mbarrier.expect(ready, 2 * (_TALL + _WIDE) * _DEEP * 2)
            tma.async_copy_global_to_shared(given, [top, start], ready, above_below.index(2 * stage))
            tma.async_copy_global_to_shared(given, [top + _TALL, start], ready, above_below.index(2 * stage + 1))
            tma.async_copy_global_to_shared(weight, [left, start], ready, halves.index(2 * stage))
            tma.async_copy_global_to_shared(weight, [width + left, start], ready, halves.index(2 * stage + 1))
            step += 1


@gluon.jit
def _multiply(HALF: gl.constexpr, made, bias, above_below, both, results, full, empty, is_ahead, rows, width, depth):
    layout: gl.constexpr = gl.NVMMADistributedLayout(
        version=[3, 0], warps_per_cta=[_WARPS, 1], instr_shape=[16, 2 * _WIDE, 16]
    )
    column = gl.arange(0, 2 * _WIDE, layout=gl.SliceLayout(0, layout))
    # Values lie beside each other, and so do gates.
    column = gl.where(column < _WIDE, column, column + (width - _WIDE))
    zeros = gl.zeros((_TALL, 2 * _WIDE), gl.float32, layout)
    result = results.index(HALF)
    ahead = gl.minimum(gl.cdiv(depth, _DEEP), _AHEAD)
    step = 0
    if HALF == 1:
        mbarrier.wait(is_ahead, 0)
    for tile in range(gl.program_id(0), _tiles_of(rows, width), gl.num_programs(0)):
        top, left = _place(tile, rows, width)
        total = zeros + gl.load(bias + left + column).to(gl.float32)[None, :]
        first = step
        for _ in range(0, depth, _DEEP):
            stage = step % _STAGES
            mbarrier.wait(full.index(stage), (step // _STAGES) & 1)
            mine = above_below.index(2 * stage + HALF)
            total = warpgroup_mma(mine, both.index(stage).permute((1, 0)), total, is_async=True)
            # While this product runs, the one before is done, and what it was made of may be overwritten.
            total = warpgroup_mma_wait(num_outstanding=1, deps=(total,))
            mbarrier.arrive(empty.index((step + _STAGES - 1) % _STAGES), count=1, pred=step > first)
            step += 1
            if HALF == 0:
                mbarrier.arrive(is_ahead, count=1, pred=step == ahead)
        total = warpgroup_mma_wait(num_outstanding=0, deps=(total,))
        mbarrier.arrive(empty.index((step + _STAGES - 1) % _STAGES), count=1)
        value, gate = total.reshape((_TALL, 2, _WIDE)).permute((0, 2, 1)).split()
        gated = (value * _gelu(gate)).to(made.dtype)
        tma.store_wait(pendings=0)
        result.store(gated)
        fence_async_shared()
        tma.async_copy_shared_to_global(made, [top + HALF * _TALL, left], result)
    tma.store_wait(pendings=0)


@gluon.jit
def _tiles_of(rows, width):
    return gl.cdiv(rows, 2 * _TALL) * gl.cdiv(width, _WIDE)


@gluon.jit
def _place(tile, rows, width):
    # Tiles that follow each other read the same rows and columns, which are near then.
    in_group = _GROUP * gl.cdiv(width, _WIDE)
    first = (tile // in_group) * _GROUP
    size = gl.minimum(gl.cdiv(rows, 2 * _TALL) - first, _GROUP)
    return (first + (tile % in_group) % size) * (2 * _TALL), ((tile % in_group) // size) * _WIDE


@gluon.jit
def _gelu(gate):
    # Abramowitz and Stegun, 7.1.26: 1.5e-7 from the error function, and half of its work.
    size = gl.abs(gate)
    part = _unary("rcp.approx.ftz.f32 $0, $1;", 1.0 + size * 0.2316418882663604)
    total = 0.5307027145 * part - 0.7265760135
    total = total * part + 0.7107068705
    total = total * part - 0.142248368
    total = total * part + 0.127414796
    tail = total * part * _unary("ex2.approx.ftz.f32 $0, $1;", gate * gate * -0.7213475204444817)
    return gl.maximum(gate, 0.0) - size * tail


@gluon.jit
def _unary(INSTRUCTION: gl.constexpr, given):
    return gl.inline_asm_elementwise(INSTRUCTION, "=f,f", [given], dtype=gl.float32, is_pure=True, pack=1)
