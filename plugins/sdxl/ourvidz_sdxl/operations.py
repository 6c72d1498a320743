"""What the fast UNet and decoder are made of beside products: as torch does it, and as Triton does where it can."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from functools import cache

import torch
from attrs import evolve, frozen
from torch import Tensor
from torch.nn import GroupNorm, functional

from ourvidz_core.engine.device_memory import is_out_of_memory

logger = logging.getLogger(__name__)

#: The generation of GPUs that one kernel is written for.
_HOPPER = 9
#: Columns of a tile of the product with GELU; others are left to the one that takes any width.
_TILE_COLUMNS = 128
#: Further than this from torch's, relative to its length, a kernel is wrong and not rounded in another way.
_FAR = 0.02


def _layer_norm(hidden: Tensor, missing: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    return functional.layer_norm(hidden + missing, weight.shape, weight, bias, eps)


def _geglu(given: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    value, gate = functional.linear(given, weight, bias).chunk(2, dim=-1)
    return value * functional.gelu(gate)


def _look_at(query: Tensor, text: Tensor, heads: int) -> Tensor:
    parts = (query, *text.chunk(2, dim=-1))
    split = (part.unflatten(-1, (heads, -1)).transpose(1, 2) for part in parts)
    return functional.scaled_dot_product_attention(*split).transpose(1, 2).flatten(2)


def _group_norm(pictures: Sequence[Tensor], added: Tensor | None, norm: GroupNorm, is_gated: bool) -> Tensor:
    picture = torch.cat(tuple(pictures), dim=1) if len(pictures) > 1 else pictures[0]
    if added is not None:
        picture = picture + added[:, :, None, None]
    normed = functional.group_norm(picture, norm.num_groups, norm.weight, norm.bias, norm.eps)
    return functional.silu(normed) if is_gated else normed


def _add_up(one: Tensor, other: Tensor, bias: Tensor) -> Tensor:
    return one + other + bias[:, None, None]


def _softmax(scores: Tensor, scale: float, dtype: torch.dtype) -> Tensor:
    return (scores * scale).softmax(-1).to(dtype)


def _weave(four: Tensor, bias: Tensor) -> Tensor:
    rows, channels, height, width = four.shape
    kinds = four.permute(0, 2, 3, 1).unflatten(-1, (2, 2, channels // 4))
    lines = [
        torch.stack([kinds[:, y : y + height - 1, x : x + width - 1, y, x] for x in (0, 1)], dim=3) for y in (0, 1)
    ]
    whole = torch.stack(lines, dim=2).reshape(rows, 2 * height - 2, 2 * width - 2, channels // 4)
    return (whole + bias).permute(0, 3, 1, 2)


@frozen(kw_only=True)
class Operations:
    """One way to do each of them."""

    #: Of (hidden + missing, weight, bias, eps), over the last dimension.
    layer_norm: Callable[[Tensor, Tensor, Tensor, Tensor, float], Tensor] = _layer_norm
    #: A product with (weight, bias), of which one half goes through GELU and gates the other.
    geglu: Callable[[Tensor, Tensor, Tensor], Tensor] = _geglu
    #: Attention of queries (rows, tokens, channels) to keys and values beside each other; and the number of heads.
    look_at: Callable[[Tensor, Tensor, int], Tensor] = _look_at
    #: Of pictures whose channels lie beside each other, what is added to all pixels of a channel before, and whether it
    #: goes through SiLU then.
    group_norm: Callable[[Sequence[Tensor], Tensor | None, GroupNorm, bool], Tensor] = _group_norm
    #: Of two pictures, of which the first may be changed, and a bias.
    add_up: Callable[[Tensor, Tensor, Tensor], Tensor] = _add_up
    #: Of (scores * scale), over the last dimension, in a precision.
    softmax: Callable[[Tensor, float, torch.dtype], Tensor] = _softmax
    #: A picture of twice the size, from its four kinds of pixels, (rows, 4 * channels, height + 1, width + 1), and a
    #: bias of its channels.
    weave: Callable[[Tensor, Tensor], Tensor] = _weave


@cache  # models are loaded anew wherever memory is short, and what runs stays the same
def fast_operations(device: str, dtype: torch.dtype) -> Operations:
    """Triton's, each tried once in a process, with torch's in place of one that does not run here, which is logged."""
    from ourvidz_sdxl import kernels

    torchs, random = Operations(), torch.Generator(device).manual_seed(0)

    def numbers(*size: int) -> Tensor:
        return torch.randn(size, generator=random, device=device, dtype=dtype)

    def runs(name: str, kernel: Callable[..., Tensor], *cases: tuple[object, ...]) -> bool:
        operation = getattr(torchs, name.partition(" ")[0])
        for case in cases:
            try:
                with torch.no_grad():
                    expected = operation(*case).float()
                    far = float((kernel(*case).float() - expected).norm() / expected.norm())
            except Exception as error:  # whatever a compiler, a driver or a card has against it
                if is_out_of_memory(error):
                    raise
                logger.warning("%s in Triton does not run on %s, and SDXL is slower: %s", name, device, _said(error))
                return False
            if not far < _FAR:
                logger.warning("%s in Triton is wrong by %.3g on %s and is left out; SDXL is slower", name, far, device)
                return False
        return True

    picture = numbers(2, 64, 16, 16).contiguous(memory_format=torch.channels_last)
    products = [
        (numbers(rows, depth), numbers(512, depth) * depth**-0.5, numbers(512))
        for rows, depth in ((256, 64), (300, 640))
    ]
    norms = [(numbers(32, columns), *numbers(3, columns).unbind(), 1e-5) for columns in (640, 1280)]
    norm = GroupNorm(32, 64, device=device, dtype=dtype)
    found: dict[str, Callable[..., Tensor]] = {}
    if runs("layer_norm", kernels.layer_norm, *norms):
        found["layer_norm"] = kernels.layer_norm
    if runs("geglu", kernels.geglu, *products):
        found["geglu"] = kernels.geglu
        is_hopper = dtype is torch.bfloat16 and torch.cuda.get_device_capability(device)[0] == _HOPPER
        if is_hopper and runs("geglu of tiles", _geglu_of_tiles, *products):
            found["geglu"] = _by_width(_geglu_of_tiles, kernels.geglu)
    looks = [(numbers(2, 200, 256), numbers(2, words, 512), 4) for words in (77, 154)]
    if runs("look_at", kernels.look_at, *looks):
        found["look_at"] = _by_words(kernels.look_at, kernels.LOOK_TOKENS, kernels.LOOK_CHANNELS)
    large = numbers(1, 64, 256, 257).contiguous(memory_format=torch.channels_last)
    two = numbers(2, 48, 16, 16), numbers(2, 16, 16, 16)
    pictures = ((picture,), None, False), ((large,), numbers(1, 64), True), (two, numbers(2, 64), True)
    if runs("group_norm", kernels.group_norm, *[(given, added, norm, gated) for given, added, gated in pictures]):
        found["group_norm"] = kernels.group_norm
    if runs("add_up", kernels.add_up, (picture.clone(), picture, numbers(64))):
        found["add_up"] = kernels.add_up
    if runs("softmax", kernels.softmax, (numbers(8, 16384).float() * 9, 0.5, dtype)):
        found["softmax"] = _by_columns(kernels.softmax, kernels.SOFTMAX_COLUMNS)
    if runs("weave", kernels.weave, (picture, numbers(16))):
        found["weave"] = kernels.weave
    return evolve(torchs, **found)


def _geglu_of_tiles(given: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    from ourvidz_sdxl import gated_product  # here, for other versions of Triton may not have what it is made of

    return gated_product.geglu(given, weight, bias)


def _by_width(of_tiles: Callable[..., Tensor], of_any: Callable[..., Tensor]) -> Callable[..., Tensor]:
    def geglu(given: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        is_whole = weight.shape[0] % (2 * _TILE_COLUMNS) == 0 and given.shape[-1] % 8 == 0
        return (of_tiles if is_whole else of_any)(given, weight, bias)

    return geglu


def _by_words(of_few: Callable[..., Tensor], most: int, channels: tuple[int, ...]) -> Callable[..., Tensor]:
    def look_at(query: Tensor, text: Tensor, heads: int) -> Tensor:
        is_usual = text.shape[1] <= most and query.shape[-1] // heads in channels
        return (of_few if is_usual else _look_at)(query, text, heads)

    return look_at


def _by_columns(of_few: Callable[..., Tensor], most: int) -> Callable[..., Tensor]:
    def softmax(scores: Tensor, scale: float, dtype: torch.dtype) -> Tensor:
        return (of_few if scores.shape[-1] <= most else _softmax)(scores, scale, dtype)

    return softmax


def _said(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
