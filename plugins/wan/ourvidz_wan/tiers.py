"""Which steps of a job are taken: all of them, or in the fast tier fewer. Imports nothing heavy."""

from __future__ import annotations

from ourvidz_core.engine.tiers import FastSteps, Tier

#: It leaves nothing out of a job of no more steps than this.
LEAST_STEPS = 8
#: The first ones one after the other, for there it is decided what will be seen; the others evenly to the last.
FAST = FastSteps(share=0.44, least=LEAST_STEPS, beginning=0.16)


def steps_taken(tier: Tier, steps: int) -> list[int]:
    """The places in a schedule of ``steps`` steps at which the model is asked.

    >>> steps_taken(Tier.FAST, 25)
    [0, 1, 2, 3, 6, 9, 12, 15, 18, 21, 24]
    """
    return FAST.places(steps) if tier is Tier.FAST else list(range(steps))
