"""Say what a picture or a video shows by measuring its pixels: colour, shape, motion, background.

No network and nothing learned, so that it cannot share a model's mistakes. It is made for
:mod:`scenes`, and for the slightly soft pictures that a small VAE makes of them.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import numpy as np
from attrs import frozen
from numpy.typing import NDArray
from scipy import ndimage  # type: ignore[import-untyped]

from examples.models.scenes import BACKGROUNDS, COLOURS, SHAPES, Scene, render

Pixels = NDArray[Any]
#: The part of a picture that the smallest shape covers, and some less.
_LEAST_AREA = 0.006
_GRID = 40
#: Parts of the shorter side, or of the first area.
_LEAST_WAY = 0.13
_LEAST_GROWTH = 1.5


@frozen(kw_only=True)
class Seen:
    """What was measured; None where no shape was found."""

    colour: str | None = None
    shape: str | None = None
    background: str | None = None
    #: A name of ``scenes.MOTIONS``; None for a picture.
    motion: str | None = None
    second_colour: str | None = None
    #: The middle of the shape from 0 to 1, across and down; in a video where it starts.
    centre: tuple[float, float] | None = None
    #: Part of the picture that it covers.
    area: float = 0.0


def see_picture(pixels: Pixels) -> Seen:
    """What the picture ``[height, width, 3]`` of 0 to 255 shows."""
    colour, mask = _find(pixels)
    background = _background(pixels, mask)
    if colour is None:
        return Seen(background=background)
    exact = _outline(pixels, mask)
    height, width = exact.shape
    y, x = (float(value) for value in ndimage.center_of_mass(exact))
    return Seen(
        colour=colour,
        shape=_shape(exact),
        background=background,
        centre=((x + 0.5) / width, (y + 0.5) / height),
        area=float(exact.mean()),
    )


def see_video(frames: Pixels) -> Seen:
    """What the video ``[frame, height, width, 3]`` of 0 to 255 shows, from its first frame to its last."""
    chosen = np.unique(np.linspace(0, len(frames) - 1, 11).round().astype(int))
    seen = [see_picture(frames[index]) for index in chosen]
    found = [one for one in seen if one.centre is not None]
    if len(found) < 3:
        return Seen(background=seen[0].background)
    first, last = found[0], found[-1]
    assert first.centre is not None
    assert last.centre is not None
    side = min(frames.shape[1:3])
    across = (last.centre[0] - first.centre[0]) * frames.shape[2] / side
    down = (last.centre[1] - first.centre[1]) * frames.shape[1] / side
    growth = last.area / first.area
    passed = _passed(frames) / side
    shapes = [one.shape for one in found]
    motion = _motion(across, down, growth, passed, turned=first.colour != last.colour)
    return Seen(
        colour=first.colour,
        shape=max(set(shapes), key=shapes.count),
        background=first.background,
        motion=motion,
        second_colour=last.colour if motion == "turns" else None,
        centre=first.centre,
        area=first.area,
    )


def _motion(across: float, down: float, growth: float, passed: float, *, turned: bool) -> str:
    # The whole picture moved, the shape with it.
    if abs(passed) > _LEAST_WAY and passed * across >= 0:
        return "pan left" if passed > 0 else "pan right"
    if max(abs(across), abs(down)) > _LEAST_WAY:
        if abs(across) > abs(down):
            return "right" if across > 0 else "left"
        return "down" if down > 0 else "up"
    if turned:
        return "turns"
    if growth > _LEAST_GROWTH:
        return "grows"
    return "shrinks" if growth < 1 / _LEAST_GROWTH else "still"


def _find(pixels: Pixels) -> tuple[str | None, NDArray[np.bool_]]:
    """The colour that covers most of what no background explains, and its largest piece."""
    names, palette = _palette()
    lab = _lab(pixels)
    nearest = np.argmin(((lab[:, :, None] - palette[None, None]) ** 2).sum(-1), axis=-1)
    best: tuple[float, str | None, NDArray[np.bool_]] = (0.0, None, np.zeros(nearest.shape, bool))
    for index, name in enumerate(names):
        if name in COLOURS:
            piece = _largest_piece(nearest == index)
            if piece.sum() > best[0]:
                best = (float(piece.sum()), name, piece)
    if best[0] < _LEAST_AREA * nearest.size:
        return None, np.zeros(nearest.shape, bool)
    return best[1], best[2]


def _outline(pixels: Pixels, mask: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """``mask`` with its edge where the shape's own colour is nearer than its surroundings'."""
    lab = _lab(pixels)
    ink = np.median(lab[mask], axis=0)
    near = ndimage.binary_dilation(mask, iterations=2)
    around = ndimage.binary_dilation(near, iterations=4) & ~near
    if not around.any():
        return mask
    tones = lab[around]
    order = np.argsort(tones[:, 0])
    half = len(order) // 2
    papers = [np.median(tones[part], axis=0) for part in (order[: half + 1], order[half:])]
    to_paper = np.min([((lab - paper) ** 2).sum(-1) for paper in papers], axis=0)
    return _largest_piece((((lab - ink) ** 2).sum(-1) < to_paper) & near)


def _shape(mask: NDArray[np.bool_]) -> str:
    ours = _normalised(mask)
    overlaps = {}
    for name, template in _templates().items():
        overlaps[name] = np.minimum(ours, template).sum() / np.maximum(ours, template).sum()
    return max(overlaps, key=lambda name: float(overlaps[name]))


def _normalised(mask: NDArray[np.bool_]) -> NDArray[np.float64]:
    """The shape in the middle of a small grid, at a size that depends on its spread and not on its area."""
    y, x = np.nonzero(mask)
    centre_y, centre_x = (y.min() + y.max()) / 2, (x.min() + x.max()) / 2
    half = max(y.max() - y.min() + 1, x.max() - x.min() + 1) / 2
    at = (np.arange(_GRID) + 0.5) / _GRID * 2 - 1
    rows, columns = np.meshgrid(centre_y + at * half * 1.05, centre_x + at * half * 1.05, indexing="ij")
    sampled: NDArray[np.float64] = ndimage.map_coordinates(mask.astype(np.float64), [rows, columns], order=1)
    return sampled


@lru_cache(maxsize=1)
def _templates() -> dict[str, NDArray[np.float64]]:
    pictures = render([Scene(shape=shape, colour="red", size="large") for shape in SHAPES], 256, 256)
    red = (pictures[:, 0] - pictures[:, 2]).numpy() > 0.7
    return {shape: _normalised(mask) for shape, mask in zip(SHAPES, red, strict=True)}


@lru_cache(maxsize=1)
def _palette() -> tuple[list[str], Pixels]:
    named = [(name, np.array(rgb, float)) for name, rgb in COLOURS.items()]
    for name, rgb in BACKGROUNDS.items():
        tones = (1.0, 1.3, 1.6) if sum(rgb) < 240 else (0.84, 0.92, 1.0)
        named += [(name, np.clip(np.array(rgb) * tone, 0, 255)) for tone in tones]
    return [name for name, _ in named], _lab(np.array([rgb for _, rgb in named])[None])[0]


def _background(pixels: Pixels, mask: NDArray[np.bool_]) -> str:
    names, palette = _palette()
    outside = ~ndimage.binary_dilation(mask, iterations=3)
    shown = _lab(pixels)[outside if outside.any() else ~mask]
    distances = ((shown[:, None] - palette[None]) ** 2).sum(-1)
    distances[:, [name in COLOURS for name in names]] = np.inf
    votes = np.bincount(np.argmin(distances, axis=-1), minlength=len(names))
    totals: dict[str, int] = {}
    for name, count in zip(names, votes, strict=True):
        totals[name] = totals.get(name, 0) + int(count)
    return max(totals, key=lambda name: totals[name])


def _passed(frames: Pixels) -> float:
    """How many pixels the background went to the right, by the change of brightness over its slope."""
    grey = frames.astype(np.float64).mean(-1)
    total = 0.0
    shape = np.zeros(grey.shape[1:], bool)
    for index in range(0, len(frames) - 2, 2):
        if index % 8 == 0:
            later = min(index + 8, len(frames) - 1)
            shape = ndimage.binary_dilation(_find(frames[index])[1] | _find(frames[later])[1], iterations=4)
        pair = ndimage.gaussian_filter(grey[index : index + 3 : 2], (0, 1.0, 1.0))
        slope = np.gradient((pair[0] + pair[1]) / 2, axis=1)
        strength = (slope[~shape] ** 2).mean() if (~shape).any() else 0.0
        # A background without texture cannot be seen to move.
        if strength > 0.8:
            total -= float(((pair[1] - pair[0]) * slope)[~shape].mean() / strength)
    return total


def _largest_piece(mask: NDArray[np.bool_]) -> NDArray[np.bool_]:
    labels, count = ndimage.label(mask)
    if count == 0:
        return mask
    sizes = np.bincount(labels.ravel())
    sizes[0] = 0
    piece: NDArray[np.bool_] = labels == int(sizes.argmax())
    return piece


def _lab(pixels: Pixels) -> Pixels:
    """CIE Lab of sRGB pixels, in which distances are about those that people see."""
    rgb = np.asarray(pixels, float) / 255
    linear = np.where(rgb <= 0.04045, rgb / 12.92, ((rgb + 0.055) / 1.055) ** 2.4)
    xyz = linear @ np.array([[0.4124, 0.2126, 0.0193], [0.3576, 0.7152, 0.1192], [0.1805, 0.0722, 0.9505]])
    scaled = xyz / np.array([0.9505, 1.0, 1.089])
    f = np.where(scaled > 0.008856, np.cbrt(scaled), 7.787 * scaled + 16 / 116)
    return np.stack([116 * f[..., 1] - 16, 500 * (f[..., 0] - f[..., 1]), 200 * (f[..., 1] - f[..., 2])], axis=-1)
