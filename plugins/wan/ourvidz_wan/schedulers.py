"""The solvers of WAN's flow: diffusers' own to the bit, without their waits for the device.

For a job in the fast tier they leave steps out.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import diffusers
import torch

from ourvidz_core.engine.solvers import HostDPMSolver, HostUniPC
from ourvidz_wan.config import Solver, Tier
from ourvidz_wan.tiers import steps_taken

if TYPE_CHECKING:
    Scheduler: Any
else:
    Scheduler = object


class _Tiered(Scheduler):  # type: ignore[misc]
    """A scheduler of the steps that its tier takes."""

    tier: Tier = Tier.EXACT
    sigmas: torch.Tensor
    timesteps: torch.Tensor

    def set_timesteps(self, num_inference_steps: int, device: Any = None, **options: Any) -> None:
        """See diffusers; ``num_inference_steps`` are those of the exact tier."""
        super().set_timesteps(num_inference_steps, device=device, **options)
        if self.tier is not Tier.EXACT:
            places = steps_taken(self.tier, num_inference_steps)
            self.sigmas = self.sigmas[[*places, num_inference_steps]]
            # Place by place: a list of places would be sent to the device.
            self.timesteps = torch.stack([self.timesteps[place] for place in places])
            self.num_inference_steps = len(places)


class UniPCMultistepScheduler(_Tiered, HostUniPC, diffusers.UniPCMultistepScheduler):  # type: ignore[misc]
    """UniPC; its configuration is that of diffusers' class of the same name."""


class DPMSolverMultistepScheduler(_Tiered, HostDPMSolver, diffusers.DPMSolverMultistepScheduler):  # type: ignore[misc]
    """DPM-Solver++; its configuration is that of diffusers' class of the same name."""


SCHEDULERS: Mapping[Solver, Any] = {Solver.UNIPC: UniPCMultistepScheduler, Solver.DPM: DPMSolverMultistepScheduler}
