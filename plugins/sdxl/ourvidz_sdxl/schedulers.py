"""The sampling methods: the checkpoint's own scheduler, or another one built from its configuration."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import diffusers

from ourvidz_core.engine.solvers import HostDPMSolver, HostUniPC
from ourvidz_sdxl.config import Solver


class UniPCMultistepScheduler(HostUniPC, diffusers.UniPCMultistepScheduler):  # type: ignore[misc]
    """diffusers' UniPC, without its waits for the device. The results are the same, and so is the name."""


class DPMSolverMultistepScheduler(HostDPMSolver, diffusers.DPMSolverMultistepScheduler):  # type: ignore[misc]
    """diffusers' DPM-Solver++, without its waits for the device. The results are the same, and so is the name."""


SCHEDULERS: Mapping[Solver, Any] = {
    Solver.UNIPC: UniPCMultistepScheduler,
    Solver.DPM: DPMSolverMultistepScheduler,
}


def scheduler_for(solver: Solver | None, own: Any) -> Any:
    """A fresh scheduler with the noise schedule of ``own``, the one a checkpoint came with."""
    cls = type(own) if solver is None else SCHEDULERS[solver]
    return cls.from_config(own.config)
