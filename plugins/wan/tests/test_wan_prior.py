"""A pin must carry its neighbours along: shown on a video prior whose exact model is known."""

from __future__ import annotations

import pytest
import torch
from diffusers import DPMSolverMultistepScheduler, UniPCMultistepScheduler
from ourvidz_wan.conditioning import ConditionedScheduler, FrameConditioner, pinned

FRAMES = 21
CORRELATION = 0.95
#: Variance of the difference of neighbouring frames under the prior.
NATURAL_JUMP = 2.0 * (1.0 - CORRELATION)
STEPS = 25


class PlainPin(FrameConditioner):
    """What inpainting by replacement does: the known frames are set, the others are left alone."""

    def __call__(self, predicted: torch.Tensor, sigma: float) -> torch.Tensor:
        replaced = predicted.clone()
        replaced[:, :, [frame % predicted.shape[2] for frame in self.frames]] = self.latents
        return replaced


def scheduler_of(solver: str):
    flow = {"prediction_type": "flow_prediction", "use_flow_sigmas": True, "flow_shift": 5.0}
    return {"unipc": UniPCMultistepScheduler, "dpm++": DPMSolverMultistepScheduler}[solver](**flow)


def sample_from_prior(conditioner: FrameConditioner, solver: str = "unipc") -> torch.Tensor:
    """Videos of the AR(1) prior, sampled with its exact flow model, as ``[frames, samples]``."""
    place = torch.arange(FRAMES, dtype=torch.float64)
    covariance = CORRELATION ** (place[:, None] - place[None, :]).abs()
    scheduler = ConditionedScheduler(scheduler_of(solver), conditioner=conditioner)
    scheduler.set_timesteps(STEPS)
    shape = (1, conditioner.latents.shape[1], FRAMES, 1, 1)
    sample = torch.randn(shape, generator=torch.Generator().manual_seed(7), dtype=torch.float64)
    identity = torch.eye(FRAMES, dtype=torch.float64)
    for timestep, sigma in zip(scheduler.timesteps, scheduler.sigmas.double(), strict=False):
        noisy = (1 - sigma) ** 2 * covariance + sigma**2 * identity
        expected = (1 - sigma) * torch.linalg.solve(noisy, covariance).T
        clean = torch.einsum("fg,bcghw->bcfhw", expected, sample)
        sample = scheduler.step((sample - clean) / sigma, timestep, sample, return_dict=False)[0]
    return sample[0, :, :, 0, 0].T


def pins(seed: int, samples: int = 6_000) -> torch.Tensor:
    return torch.randn((1, samples, 1, 1, 1), generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def regression(neighbour: torch.Tensor, pin: torch.Tensor) -> float:
    return float((neighbour * pin).mean() / (pin * pin).mean())


def jump(neighbour: torch.Tensor, pin: torch.Tensor) -> float:
    return float((neighbour - pin).var() / NATURAL_JUMP)


CASES = {
    "start": {"start": pins(1)},
    "end": {"end": pins(2)},
    "both": {"start": pins(1), "end": pins(2)},
}


@pytest.mark.parametrize("solver", ["unipc", "dpm++"])
@pytest.mark.parametrize("mode", CASES)
def test_neighbours_of_a_pinned_frame_follow_it(mode: str, solver: str, record_property):
    known = CASES[mode]
    video = sample_from_prior(pinned(**known), solver)
    plain = pinned(**known)
    plain_video = sample_from_prior(PlainPin(frames=plain.frames, latents=plain.latents), solver)
    for end, (frame, neighbour) in {"start": (0, 1), "end": (-1, -2)}.items():
        if end not in known:
            continue
        pin = known[end].flatten()
        figures = regression(video[neighbour], pin), jump(video[neighbour], pin)
        plain_figures = regression(plain_video[neighbour], pin), jump(plain_video[neighbour], pin)
        record_property(f"{end} regression, jump", (figures, plain_figures))
        torch.testing.assert_close(video[frame], pin, rtol=1e-4, atol=1e-5)
        assert figures[0] >= 0.85
        assert figures[1] <= 1.5
        # Given the same pins and the same noise, plain pinning leaves a jump cut.
        assert plain_figures[0] < 0.6
        assert plain_figures[1] > 4.0
