"""The solvers of WAN's flow: diffusers' own to the bit, without their waits for the device.

For a job in the fast tier they leave steps out.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import diffusers

from ourvidz_core.engine.solvers import HostDPMSolver, HostUniPC
from ourvidz_core.engine.tiers import TieredScheduler
from ourvidz_wan.config import Solver


class UniPCMultistepScheduler(TieredScheduler, HostUniPC, diffusers.UniPCMultistepScheduler):  # type: ignore[misc]
    """UniPC; its configuration is that of diffusers' class of the same name."""


class DPMSolverMultistepScheduler(TieredScheduler, HostDPMSolver, diffusers.DPMSolverMultistepScheduler):  # type: ignore[misc]
    """DPM-Solver++; its configuration is that of diffusers' class of the same name."""


SCHEDULERS: Mapping[Solver, Any] = {Solver.UNIPC: UniPCMultistepScheduler, Solver.DPM: DPMSolverMultistepScheduler}
