"""The tiers of a job: all steps of its schedule, or fewer of them. Imports nothing heavy.

A step that is left out costs nothing and is reported as not taken. The noise levels of those that
are taken are the whole schedule's, and the solver goes from each to the next, so nothing is kept
between steps, nothing new is compiled or captured, and the number of steps is known beforehand.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from enum import StrEnum
from typing import TYPE_CHECKING, Any

from attrs import frozen

if TYPE_CHECKING:
    import torch

    Scheduler: Any
else:
    Scheduler = object


class Tier(StrEnum):
    """How much of a job's work is done."""

    #: Every step, as plain diffusers would.
    EXACT = "exact"
    #: Not all steps: sooner, and nearly the same.
    FAST = "fast"


@frozen(kw_only=True)
class FastSteps:
    """Which steps of a schedule a fast tier takes."""

    #: Part of the steps that it takes, rounded up.
    share: float
    #: It leaves nothing out of a job of no more steps than this.
    least: int
    #: Part of the steps that it takes one after the other at the beginning; the first one in any case.
    beginning: float = 0.0

    def places(self, steps: int, skipped: int = 0) -> list[int]:
        """The places in a schedule of ``steps`` steps that are taken.

        Behind those of the beginning they are even, to the last one. The first ``skipped`` places are not part
        of the job and stay.
        """
        of_job = steps - skipped
        count = max(math.ceil(of_job * self.share), self.least)
        if count >= of_job:
            return list(range(steps))
        first = max(1, math.ceil(of_job * self.beginning))
        rest, stride = count - first, (of_job - first) / (count - first)
        others = [first - 1 + round(stride * number) for number in range(1, rest + 1)]
        return [*range(skipped + first), *(skipped + place for place in others)]


class TieredScheduler(Scheduler):  # type: ignore[misc]
    """A scheduler, in front of one of diffusers', that takes some steps of its schedule.

    For solvers that work from ``sigmas`` and know unequal steps.
    """

    #: The places that are taken of a schedule of so many steps; None is all of them.
    places: Callable[[int], Sequence[int]] | None = None
    sigmas: torch.Tensor
    timesteps: torch.Tensor

    def set_timesteps(self, num_inference_steps: int, device: Any = None, **options: Any) -> None:
        """See diffusers; ``num_inference_steps`` are those of the whole schedule."""
        import torch

        super().set_timesteps(num_inference_steps, device=device, **options)
        if self.places is not None:
            places = self.places(num_inference_steps)
            self.sigmas = self.sigmas[[*places, num_inference_steps]]
            # Place by place: a list of places would be sent to the device.
            self.timesteps = torch.stack([self.timesteps[place] for place in places])
            self.num_inference_steps = len(places)
