"""Triton kernels for what SDXL's UNet and decoder do between their products, and for one product with what follows it.

Sizes of tiles are those that were the fastest on an H200: nothing is tried at a start. Sums are in single precision.
What is not contiguous, pictures with channels last, is copied.
"""

# mypy: disable-error-code="no-untyped-def, untyped-decorator"

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl

#: Rows of a program of the layer norm, and its warps: each has a row, and waits for no other.
_ROWS, _ROW_WARPS = 4, 4
#: Queries of a tile, tiles of a program, warps: of the attention to a text.
LOOK_TILE, LOOK_TILES, LOOK_WARPS = 64, 8, 4
#: Tokens of a text that are looked at at once, and channels of a head, one of these.
LOOK_TOKENS, LOOK_CHANNELS = 256, (16, 32, 64, 128)
#: Pixels and channels that a program of the group norm holds at once.
_PIXELS, _CHANNELS = 128, 64
#: Moments of a picture that are put together: of a large one a program takes up to eight tiles of pixels.
_MOMENTS, _TILES = 256, 8
_BLOCK = 1024
_LOG2_E = 1.4426950408889634
#: Columns that a softmax holds at once: the tokens of 2048 x 2048 pixels.
SOFTMAX_COLUMNS = 65536


def layer_norm(
    hidden: torch.Tensor, missing: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, eps: float
) -> torch.Tensor:
    """The layer norm of ``hidden + missing``: (..., columns), all others (columns,)."""
    hidden = hidden.contiguous()
    columns = hidden.shape[-1]
    rows = hidden.numel() // columns
    made = torch.empty_like(hidden)
    with _on(hidden):
        _layer_norm[(triton.cdiv(rows, _ROWS),)](
            hidden,
            missing,
            weight,
            bias,
            made,
            rows,
            columns,
            eps,
            ROWS=_ROWS,
            BLOCK=triton.next_power_of_2(columns),
            num_warps=_ROW_WARPS,
        )
    return made


def geglu(given: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    """cuBLAS' product (..., depth) with (2 * width, depth), of which one half goes through GELU and gates the other."""
    product = torch.nn.functional.linear(given, weight, bias)
    width = product.shape[-1] // 2
    made = product.new_empty((*product.shape[:-1], width))
    with _on(product):
        _gate[(triton.cdiv(made.numel(), _BLOCK),)](product, made, made.numel(), width, BLOCK=_BLOCK)
    return made


def look_at(query: torch.Tensor, text: torch.Tensor, heads: int) -> torch.Tensor:
    """Attention of ``query`` (rows, tokens, channels) to a text's keys and values beside each other."""
    query, text = query.contiguous(), text.contiguous()
    rows, tokens, channels = query.shape
    made = torch.empty_like(query)
    # 77 words are 64 and 16, and not 128.
    most = max(16, _power_of_2_below(text.shape[1] - 1))
    with _on(query):
        _look_at[(triton.cdiv(tokens, LOOK_TILE * LOOK_TILES), heads, rows)](
            query,
            text,
            made,
            tokens,
            text.shape[1],
            channels,
            (channels // heads) ** -0.5 * _LOG2_E,
            TILE=LOOK_TILE,
            TILES=LOOK_TILES,
            MOST=most,
            REST=max(16, triton.next_power_of_2(max(1, text.shape[1] - most))),
            HEAD=channels // heads,
            num_warps=LOOK_WARPS,
        )
    return made


def group_norm(
    pictures: Sequence[torch.Tensor], added: torch.Tensor | None, norm: torch.nn.GroupNorm, is_gated: bool
) -> torch.Tensor:
    """The group norm of ``pictures``, (rows, channels, height, width) each, whose channels lie beside each other.

    ``added`` (rows, all channels) is added to all pixels before. With ``is_gated`` the result goes through SiLU.
    """
    pictures = [picture.contiguous(memory_format=torch.channels_last) for picture in pictures]
    rows, _, height, width = pictures[0].shape
    channels = sum(picture.shape[1] for picture in pictures)
    starts = [sum(before.shape[1] for before in pictures[:index]) for index in range(len(pictures))]
    pixels = height * width
    like = {"device": pictures[0].device, "dtype": pictures[0].dtype}
    made = torch.empty((rows, channels, height, width), memory_format=torch.channels_last, **like)
    tiles = triton.cdiv(pixels, _PIXELS)
    in_chunk = min(_TILES, _power_of_2_below(tiles // _MOMENTS))
    chunks = triton.cdiv(tiles, in_chunk)
    moments = made.new_empty((2, rows, chunks, channels), dtype=torch.float32)
    factors = made.new_empty((2, rows, channels), dtype=torch.float32)
    tile = {"PIXELS": _PIXELS, "CHANNELS": _CHANNELS}
    in_group = channels // norm.num_groups
    with _on(made):
        for picture, start in zip(pictures, starts, strict=True):
            grid = (chunks, triton.cdiv(picture.shape[1], _CHANNELS), rows)
            _moments[grid](
                picture, moments[0], moments[1], pixels, picture.shape[1], start, channels, TILES=in_chunk, **tile
            )
        _factors[(norm.num_groups, rows)](
            moments[0],
            moments[1],
            moments if added is None else added.contiguous(),
            norm.weight,
            norm.bias,
            factors[0],
            factors[1],
            pixels,
            channels,
            chunks,
            in_group,
            norm.eps,
            IS_ADDED=added is not None,
            PIXELS=_PIXELS * in_chunk,
            IN_GROUP=triton.next_power_of_2(in_group),
            CHUNKS=max(1, 2048 // triton.next_power_of_2(in_group)),
        )
        for picture, start in zip(pictures, starts, strict=True):
            grid = (tiles, triton.cdiv(picture.shape[1], _CHANNELS), rows)
            _scaled[grid](
                picture,
                factors[0],
                factors[1],
                made,
                pixels,
                picture.shape[1],
                start,
                channels,
                IS_GATED=is_gated,
                **tile,
            )
    return made


def add_up(one: torch.Tensor, other: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    """The sum of two pictures and a bias of their channels, in the place of ``one``."""
    one = one.contiguous(memory_format=torch.channels_last)
    other = other.contiguous(memory_format=torch.channels_last)
    with _on(one):
        _add_up[(triton.cdiv(one.numel(), _BLOCK),)](one, other, bias, one.numel(), one.shape[1], BLOCK=_BLOCK)
    return one


def weave(four: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    """A picture of twice the size, from its four kinds of pixels: (rows, 4 * channels, height + 1, width + 1).

    ``bias`` (channels,) is added to all of them.
    """
    four = four.contiguous(memory_format=torch.channels_last)
    rows, channels, height, width = four.shape
    channels, height, width = channels // 4, 2 * height - 2, 2 * width - 2
    made = torch.empty(
        (rows, channels, height, width), device=four.device, dtype=four.dtype, memory_format=torch.channels_last
    )
    grid = (triton.cdiv(width * channels, _BLOCK), height, rows)
    with _on(four):
        _weave[grid](four, bias, made, height, width, channels, BLOCK=_BLOCK)
    return made


def softmax(scores: torch.Tensor, scale: float, dtype: torch.dtype) -> torch.Tensor:
    """The softmax of ``scores * scale`` over the last dimension, of at most ``SOFTMAX_COLUMNS``."""
    scores = scores.contiguous()
    columns = scores.shape[-1]
    made = torch.empty_like(scores, dtype=dtype)
    block = triton.next_power_of_2(columns)
    with _on(scores):
        _softmax[(scores.numel() // columns,)](
            scores, made, columns, scale * _LOG2_E, BLOCK=block, num_warps=max(4, min(32, block // 1024))
        )
    return made


@triton.jit
def _layer_norm(hidden, missing, weight, bias, made, rows, columns, eps, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, BLOCK)
    is_column = column < columns
    is_there = (row < rows)[:, None] & is_column[None, :]
    place = row[:, None] * columns + column[None, :]
    values = tl.load(hidden + place, mask=is_there, other=0.0).to(tl.float32)
    values += tl.load(missing + column, mask=is_column, other=0.0).to(tl.float32)[None, :]
    mean = tl.sum(values, axis=1) / columns
    centred = tl.where(is_column[None, :], values - mean[:, None], 0.0)
    spread = tl.rsqrt(tl.sum(centred * centred, axis=1) / columns + eps)
    factor = tl.load(weight + column, mask=is_column, other=0.0).to(tl.float32)
    summand = tl.load(bias + column, mask=is_column, other=0.0).to(tl.float32)
    normed = centred * spread[:, None] * factor[None, :] + summand[None, :]
    tl.store(made + place, normed.to(made.dtype.element_ty), mask=is_there)


@triton.jit
def _gate(product, made, count, width, BLOCK: tl.constexpr):
    index = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    is_there = index < count
    place = (index // width) * (2 * width) + index % width
    value = tl.load(product + place, mask=is_there, other=0.0).to(tl.float32)
    gate = tl.load(product + place + width, mask=is_there, other=0.0).to(tl.float32)
    gated = value * (0.5 * gate * (1.0 + tl.erf(gate * 0.7071067811865476)))
    tl.store(made + index, gated.to(made.dtype.element_ty), mask=is_there)


@triton.jit
def _look_at(
    query,
    text,
    made,
    tokens,
    seen,
    channels,
    factor,
    TILE: tl.constexpr,
    TILES: tl.constexpr,
    MOST: tl.constexpr,
    REST: tl.constexpr,
    HEAD: tl.constexpr,
):
    row = tl.program_id(2).to(tl.int64)
    column = tl.program_id(1) * HEAD + tl.arange(0, HEAD)
    word = tl.arange(0, MOST)
    last = MOST + tl.arange(0, REST)
    keys, values = _words(text, row, seen, channels, word, column)
    last_keys, last_values = _words(text, row, seen, channels, last, column)
    for tile in range(TILES):
        token = (tl.program_id(0) * TILES + tile) * TILE + tl.arange(0, TILE)
        is_there = (token < tokens)[:, None]
        place = (row * tokens + token)[:, None] * channels + column[None, :]
        asked = tl.load(query + place, mask=is_there, other=0.0)
        scores = tl.where((word < seen)[None, :], tl.dot(asked, keys.T), float("-inf"))
        last_scores = tl.where((last < seen)[None, :], tl.dot(asked, last_keys.T), float("-inf"))
        most = tl.maximum(tl.max(scores, axis=1), tl.max(last_scores, axis=1)) * factor
        powers = tl.exp2(scores * factor - most[:, None])
        last_powers = tl.exp2(last_scores * factor - most[:, None])
        found = tl.dot(powers.to(values.dtype), values)
        found = tl.dot(last_powers.to(values.dtype), last_values, found)
        found = found / (tl.sum(powers, axis=1) + tl.sum(last_powers, axis=1))[:, None]
        tl.store(made + place, found.to(made.dtype.element_ty), mask=is_there)


@triton.jit
def _words(text, row, seen, channels, word, column):
    place = (row * seen + word)[:, None] * (2 * channels) + column[None, :]
    is_there = (word < seen)[:, None]
    keys = tl.load(text + place, mask=is_there, other=0.0)
    return keys, tl.load(text + place + channels, mask=is_there, other=0.0)


@triton.jit
def _moments(
    picture,
    means,
    spreads,
    pixels,
    channels,
    start,
    all_channels,
    TILES: tl.constexpr,
    PIXELS: tl.constexpr,
    CHANNELS: tl.constexpr,
):
    chunk = tl.program_id(0)
    row = tl.program_id(2).to(tl.int64)
    channel = tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)
    mean = tl.zeros((CHANNELS,), dtype=tl.float32)
    spread = tl.zeros((CHANNELS,), dtype=tl.float32)
    for tile in range(TILES):
        first = (chunk * TILES + tile) * PIXELS
        pixel = first + tl.arange(0, PIXELS)
        is_there = (pixel < pixels)[:, None] & (channel < channels)[None, :]
        place = (row * pixels + pixel)[:, None] * channels + channel[None, :]
        values = tl.load(picture + place, mask=is_there, other=0.0).to(tl.float32)
        count = tl.maximum(tl.minimum(pixels - first, PIXELS), 0)
        mean_here = tl.sum(values, axis=0) / tl.maximum(count, 1)
        centred = tl.where(is_there, values - mean_here[None, :], 0.0)
        # Squares around the mean of both, from those around the mean of each: nothing large is subtracted.
        far = mean_here - mean
        part = count.to(tl.float32) / tl.maximum(tile * PIXELS + count, 1)
        spread += tl.sum(centred * centred, axis=0) + far * far * part * (tile * PIXELS)
        mean += far * part
    made = (row * tl.num_programs(0) + chunk) * all_channels + start + channel
    tl.store(means + made, mean, mask=channel < channels)
    tl.store(spreads + made, spread, mask=channel < channels)


# Compiled once for each size of a group, and not for each kind of number.
@triton.jit(do_not_specialize=["pixels", "channels", "chunks", "in_group"])
def _factors(
    means,
    spreads,
    added,
    weight,
    bias,
    factors,
    summands,
    pixels,
    channels,
    chunks,
    in_group,
    eps,
    IS_ADDED: tl.constexpr,
    PIXELS: tl.constexpr,
    IN_GROUP: tl.constexpr,
    CHUNKS: tl.constexpr,
):
    row = tl.program_id(1).to(tl.int64)
    column = tl.arange(0, IN_GROUP)
    channel = tl.program_id(0) * in_group + column
    is_channel = column < in_group
    # What is added to all pixels of a channel moves their mean, and nothing else.
    moved = tl.zeros((IN_GROUP,), dtype=tl.float32)
    if IS_ADDED:
        moved = tl.load(added + row * channels + channel, mask=is_channel, other=0.0).to(tl.float32)
    total = tl.zeros((CHUNKS, IN_GROUP), dtype=tl.float32)
    for first in range(0, chunks, CHUNKS):
        chunk = first + tl.arange(0, CHUNKS)
        is_there = (chunk < chunks)[:, None] & is_channel[None, :]
        place = (row * chunks + chunk)[:, None] * channels + channel[None, :]
        count = tl.minimum(pixels - chunk * PIXELS, PIXELS).to(tl.float32)
        mean_of_chunk = tl.load(means + place, mask=is_there, other=0.0) + moved[None, :]
        total += tl.where(is_there, mean_of_chunk * count[:, None], 0.0)
    size = pixels * in_group
    mean = tl.sum(total) / size
    # As in each chunk, squares around the mean of all.
    squares = tl.zeros((CHUNKS, IN_GROUP), dtype=tl.float32)
    for first in range(0, chunks, CHUNKS):
        chunk = first + tl.arange(0, CHUNKS)
        is_there = (chunk < chunks)[:, None] & is_channel[None, :]
        place = (row * chunks + chunk)[:, None] * channels + channel[None, :]
        count = tl.minimum(pixels - chunk * PIXELS, PIXELS).to(tl.float32)
        far = tl.load(means + place, mask=is_there, other=0.0) + moved[None, :] - mean
        within = tl.load(spreads + place, mask=is_there, other=0.0)
        squares += tl.where(is_there, within + far * far * count[:, None], 0.0)
    factor = tl.rsqrt(tl.sum(squares) / size + eps) * tl.load(weight + channel, mask=is_channel, other=0.0).to(
        tl.float32
    )
    summand = tl.load(bias + channel, mask=is_channel, other=0.0).to(tl.float32) + (moved - mean) * factor
    tl.store(factors + row * channels + channel, factor, mask=is_channel)
    tl.store(summands + row * channels + channel, summand, mask=is_channel)


@triton.jit
def _scaled(
    picture,
    factors,
    summands,
    made,
    pixels,
    channels,
    start,
    all_channels,
    IS_GATED: tl.constexpr,
    PIXELS: tl.constexpr,
    CHANNELS: tl.constexpr,
):
    row = tl.program_id(2).to(tl.int64)
    pixel = tl.program_id(0) * PIXELS + tl.arange(0, PIXELS)
    channel = tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)
    is_channel = channel < channels
    is_there = (pixel < pixels)[:, None] & is_channel[None, :]
    place = (row * pixels + pixel)[:, None] * channels + channel[None, :]
    to = (row * pixels + pixel)[:, None] * all_channels + start + channel[None, :]
    factor = tl.load(factors + row * all_channels + start + channel, mask=is_channel, other=0.0)
    summand = tl.load(summands + row * all_channels + start + channel, mask=is_channel, other=0.0)
    values = tl.load(picture + place, mask=is_there, other=0.0).to(tl.float32) * factor[None, :] + summand[None, :]
    if IS_GATED:
        values = values * tl.sigmoid(values)
    tl.store(made + to, values.to(made.dtype.element_ty), mask=is_there)


@triton.jit
def _add_up(one, other, bias, count, channels, BLOCK: tl.constexpr):
    index = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    is_there = index < count
    total = tl.load(one + index, mask=is_there, other=0.0).to(tl.float32)
    total += tl.load(other + index, mask=is_there, other=0.0).to(tl.float32)
    total += tl.load(bias + index % channels, mask=is_there, other=0.0).to(tl.float32)
    tl.store(one + index, total.to(one.dtype.element_ty), mask=is_there)


@triton.jit
def _weave(four, bias, made, height, width, channels, BLOCK: tl.constexpr):
    index = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    y = tl.program_id(1)
    row = tl.program_id(2).to(tl.int64)
    is_there = index < width * channels
    x, channel = index // channels, index % channels
    # A pixel of kind (down, right) lies in the four kinds' picture by as much further down and right.
    down, right = y % 2, x % 2
    line = (row * (height // 2 + 1) + y // 2 + down) * (width // 2 + 1)
    place = (line + x // 2 + right) * (4 * channels) + (2 * down + right) * channels + channel
    values = tl.load(four + place, mask=is_there, other=0.0).to(tl.float32)
    values += tl.load(bias + channel, mask=is_there, other=0.0).to(tl.float32)
    to = made + (row * height + y) * (width * channels) + index
    tl.store(to, values.to(made.dtype.element_ty), mask=is_there)


@triton.jit
def _softmax(scores, made, columns, factor, BLOCK: tl.constexpr):
    start = tl.program_id(0).to(tl.int64) * columns
    column = tl.arange(0, BLOCK)
    is_there = column < columns
    values = tl.load(scores + start + column, mask=is_there, other=float("-inf")) * factor
    powers = tl.exp2(values - tl.max(values, axis=0))
    shares = powers / tl.sum(powers, axis=0)
    tl.store(made + start + column, shares.to(made.dtype.element_ty), mask=is_there)


def _power_of_2_below(number: int) -> int:
    """The largest that is no larger, at least 1."""
    return 1 << (max(1, number).bit_length() - 1)


def _on(tensor: torch.Tensor) -> Any:
    """Triton launches on the device that is the current one."""
    return torch.cuda.device_of(tensor)
