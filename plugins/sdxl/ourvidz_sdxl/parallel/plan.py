"""Say which GPU draws which images of a job. Imports nothing heavy."""

from __future__ import annotations

from collections.abc import Iterable

#: The setting that says how many GPUs a job's images are dealt out to.
GPUS_VARIABLE = "OURVIDZ_SDXL_GPUS"


def deal(images: int, gpus: int) -> tuple[range, ...]:
    """The images of each GPU that has any: neighbours, in parts of nearly one size, the larger ones first.

    >>> deal(6, 4)
    (range(0, 2), range(2, 4), range(4, 5), range(5, 6))
    >>> deal(1, 4)
    (range(0, 1),)
    """
    if images < 1 or gpus < 1:
        raise ValueError(f"{images} images cannot be dealt out to {gpus} GPUs")
    size, larger = divmod(images, min(images, gpus))
    parts: list[range] = []
    while (first := parts[-1].stop if parts else 0) < images:
        parts.append(range(first, first + size + (len(parts) < larger)))
    return tuple(parts)


def part_sizes(counts: Iterable[int], gpus: int) -> tuple[int, ...]:
    """How many images a GPU may be dealt of jobs with so many, the most first.

    >>> part_sizes((1, 3, 6), 2)
    (3, 2, 1)
    >>> part_sizes((1, 3, 6), 1)
    (6, 3, 1)
    """
    return tuple(sorted({len(part) for count in counts for part in deal(count, gpus)}, reverse=True))
