"""The sampling methods: the checkpoint's own scheduler, or another one built from its configuration.

For a job in the fast tier they leave steps out.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from functools import partial
from typing import Any

import diffusers

from ourvidz_core.engine.solvers import HostDPMSolver, HostUniPC
from ourvidz_core.engine.tiers import TieredScheduler
from ourvidz_sdxl.config import Solver
from ourvidz_sdxl.tiers import FAST

logger = logging.getLogger(__name__)


class UniPCMultistepScheduler(TieredScheduler, HostUniPC, diffusers.UniPCMultistepScheduler):  # type: ignore[misc]
    """diffusers' UniPC, without its waits for the device. The results are the same, and so is the name."""


class DPMSolverMultistepScheduler(TieredScheduler, HostDPMSolver, diffusers.DPMSolverMultistepScheduler):  # type: ignore[misc]
    """diffusers' DPM-Solver++, without its waits for the device. The results are the same, and so is the name."""


SCHEDULERS: Mapping[Solver, Any] = {
    Solver.UNIPC: UniPCMultistepScheduler,
    Solver.DPM: DPMSolverMultistepScheduler,
}
#: Of a checkpoint's own schedulers those that go the way on which UniPC goes, one noise level a step.
_SAME_WAY = (
    diffusers.EulerDiscreteScheduler,
    diffusers.DPMSolverMultistepScheduler,
    diffusers.UniPCMultistepScheduler,
)


def scheduler_for(solver: Solver | None, own: Any) -> Any:
    """A fresh scheduler with the noise schedule of ``own``, the one a checkpoint came with."""
    cls = type(own) if solver is None else SCHEDULERS[solver]
    return cls.from_config(own.config)


def in_fewer_steps(exact: Any, steps: int, *, skipped: int = 0) -> Any:
    """A scheduler that comes to nearly the same as ``steps`` steps of ``exact``, and takes fewer of them.

    The first ``skipped`` steps are not part of the job. It is UniPC, whatever ``exact`` is: Euler's method is lost
    in longer steps. ``exact`` itself where no step can be left out.
    """
    if len(FAST.places(steps, skipped)) == steps:
        return exact
    if not isinstance(exact, _SAME_WAY) or "sde" in exact.config.get("algorithm_type", ""):
        logger.warning("the fast tier leaves out no steps of a checkpoint with %s", type(exact).__name__)
        return exact
    fast = UniPCMultistepScheduler.from_config(exact.config)
    fast.places = partial(FAST.places, skipped=skipped)
    return fast


def steps_taken(scheduler: Any, steps: int) -> int:
    """How many of ``steps`` steps a scheduler takes."""
    places = scheduler.places if isinstance(scheduler, TieredScheduler) else None
    return steps if places is None else len(places(steps))
