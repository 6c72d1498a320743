"""The solvers step exactly as diffusers' do, and ask the device for nothing."""

from __future__ import annotations

from typing import Any

import diffusers
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from ourvidz_core.engine.solvers import HostDPMSolver, HostUniPC


class UniPC(HostUniPC, diffusers.UniPCMultistepScheduler):
    pass


class DPMSolver(HostDPMSolver, diffusers.DPMSolverMultistepScheduler):
    pass


PAIRS = {
    "unipc": (UniPC, diffusers.UniPCMultistepScheduler),
    "dpm++": (DPMSolver, diffusers.DPMSolverMultistepScheduler),
}
FLOW = {"use_flow_sigmas": True, "prediction_type": "flow_prediction"}
#: SDXL's noise schedule.
SDXL = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012, "timestep_spacing": "leading"}
#: The steps of the job types, and few enough to meet every order's beginning and end.
STEPS = st.sampled_from([1, 2, 3, 4, 15, 25, 50])


def trajectory(scheduler: Any, steps: int, *, seed: int = 0, start_sigma: float | None = None) -> torch.Tensor:
    """All samples on the way, with a model whose output is no straight line."""
    scheduler.set_timesteps(steps)
    if start_sigma is not None:
        scheduler.sigmas = scheduler.sigmas * (start_sigma / float(scheduler.sigmas[0]))
        scheduler.timesteps = (scheduler.sigmas[:-1] * 1000).to(torch.int64)
        # The first two may be the same whole number, and diffusers would begin at the second and fail at the end.
        scheduler.set_begin_index(0)
    generator = torch.Generator().manual_seed(seed)
    sample, bend = torch.randn(2, 1, 4, 2, 4, 4, generator=generator)
    seen = []
    for timestep in scheduler.timesteps:
        output = torch.tanh(1.3 * sample + bend) - 0.2 * sample
        sample = scheduler.step(output, timestep, sample, return_dict=False)[0]
        seen.append(sample)
    return torch.stack(seen)


@pytest.mark.parametrize("solver", PAIRS)
@settings(max_examples=25, deadline=None)
@given(
    steps=STEPS,
    shift=st.floats(3.0, 8.0),
    start_sigma=st.none() | st.floats(0.05, 0.95),
    seed=st.integers(0, 2**32),
)
def test_the_flow_of_wan_is_solved_to_the_bit(solver, steps, shift, start_sigma, seed):
    ours, theirs = (
        trajectory(cls(**FLOW, flow_shift=shift), steps, seed=seed, start_sigma=start_sigma) for cls in PAIRS[solver]
    )
    assert torch.isfinite(ours).all()
    assert torch.equal(ours, theirs)


@pytest.mark.parametrize("solver", PAIRS)
@settings(max_examples=15, deadline=None)
@given(
    steps=STEPS,
    prediction=st.sampled_from(["epsilon", "v_prediction", "sample"]),
    is_karras=st.booleans(),
    order=st.sampled_from([1, 2, 3]),
)
def test_what_an_sdxl_checkpoint_may_be_configured_as_is_solved_to_the_bit(solver, steps, prediction, is_karras, order):
    config = {**SDXL, "prediction_type": prediction, "use_karras_sigmas": is_karras, "solver_order": order}
    ours, theirs = (trajectory(cls(**config), steps) for cls in PAIRS[solver])
    assert torch.isfinite(ours).all()
    # The third order adds two residuals, and diffusers leaves to a matrix product in which order.
    torch.testing.assert_close(ours, theirs, rtol=0, atol=0 if order < 3 else 1e-5)


@pytest.mark.parametrize(
    ("solver", "config"),
    [
        # The first two end in values that are no numbers where the noise ends at zero, in diffusers.
        ("unipc", {"solver_type": "bh1", "final_sigmas_type": "sigma_min"}),
        ("unipc", {"predict_x0": False, "final_sigmas_type": "sigma_min"}),
        ("unipc", {"disable_corrector": [0, 1]}),
        ("unipc", {"lower_order_final": False, "final_sigmas_type": "sigma_min"}),
        ("dpm++", {"solver_type": "heun"}),
        ("dpm++", {"algorithm_type": "dpmsolver", "final_sigmas_type": "sigma_min"}),
        ("dpm++", {"euler_at_final": True}),
    ],
)
def test_rare_configurations_are_solved_to_the_bit(solver, config):
    ours, theirs = (trajectory(cls(**SDXL, **config), 15) for cls in PAIRS[solver])
    assert torch.isfinite(ours).all()
    assert torch.equal(ours, theirs)


@pytest.mark.parametrize("solver", PAIRS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_stays_as_near_to_the_truth(solver, dtype):
    def last(cls: Any, of: torch.dtype) -> torch.Tensor:
        scheduler = cls(**SDXL)
        scheduler.set_timesteps(25)
        sample = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(1)).to(of)
        for timestep in scheduler.timesteps:
            sample = scheduler.step(torch.tanh(sample), timestep, sample, return_dict=False)[0]
        assert sample.dtype is of
        return sample.float()

    truth = last(PAIRS[solver][1], torch.float32)
    ours, theirs = ((last(cls, dtype) - truth).norm() for cls in PAIRS[solver])
    assert ours <= 1.5 * theirs


class Operations(TorchDispatchMode):
    """Counts operations, and tells those that carry something between main memory and the device."""

    def __init__(self) -> None:
        super().__init__()
        self.on_device = 0
        self.crossings: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        tensors = [value for value in (*args, result) if isinstance(value, torch.Tensor)]
        # A scalar in main memory is handed to a kernel as a number.
        devices = {tensor.device.type for tensor in tensors if tensor.dim() or tensor.device.type == "meta"}
        if "meta" in devices:
            self.on_device += 1
        if len(devices) > 1 or "copy" in str(func):
            self.crossings.append(str(func))
        return result


@pytest.mark.parametrize("solver", PAIRS)
def test_no_step_asks_the_device_for_anything(solver):
    """On the meta device, which has no values: whatever reads one raises, as diffusers' own first step does."""
    ours, theirs = PAIRS[solver]
    reading = theirs(**FLOW, flow_shift=5.0)
    reading.set_timesteps(25, device="meta")
    with pytest.raises(NotImplementedError):
        reading.step(torch.empty(1, device="meta"), reading.timesteps[0], torch.empty(1, device="meta"))

    scheduler = ours(**FLOW, flow_shift=5.0)
    scheduler.set_timesteps(25, device="meta")
    sample = torch.empty(1, 4, 2, 4, 4, device="meta")
    operations = Operations()
    with operations:
        for timestep in scheduler.timesteps:
            sample = scheduler.step(sample, timestep, sample, return_dict=False)[0]
    assert operations.crossings == []
    assert operations.on_device <= 25 * 22


def test_a_steep_schedule_begins_at_its_first_step():
    """Its first two timesteps are the same whole number: diffusers would begin at the second and fail at the end."""
    scheduler = UniPC(**FLOW, flow_shift=20.0)
    scheduler.set_timesteps(100)
    assert scheduler.timesteps[0] == scheduler.timesteps[1]
    sample = trajectory(scheduler, 100)[-1]
    assert torch.isfinite(sample).all()
    assert scheduler.step_index == 100
