"""Which steps of a job are taken: all of them, or in the fast tier fewer. Imports nothing heavy."""

from __future__ import annotations

import math

from ourvidz_wan.config import Tier

#: Share of the steps that the fast tier takes.
FAST_SHARE = 0.44
#: It leaves nothing out of a job of no more steps than this.
LEAST_STEPS = 8
#: Share of the steps that it takes one after the other at the beginning, where it is decided what will be seen.
BEGINNING = 0.16


def steps_taken(tier: Tier, steps: int) -> list[int]:
    """The places in a schedule of ``steps`` steps at which the model is asked.

    The noise levels are those of the whole schedule, and the solver goes from each to the next one
    that is left. The first ones stay together, the others are spread evenly, and the last one stays.

    >>> steps_taken(Tier.FAST, 25)
    [0, 1, 2, 3, 6, 9, 12, 15, 18, 21, 24]
    """
    count = max(math.ceil(steps * FAST_SHARE), LEAST_STEPS)
    if tier is Tier.EXACT or count >= steps:
        return list(range(steps))
    first = math.ceil(steps * BEGINNING)
    rest, stride = count - first, (steps - first) / (count - first)
    return [*range(first), *(first - 1 + round(stride * number) for number in range(1, rest + 1))]
