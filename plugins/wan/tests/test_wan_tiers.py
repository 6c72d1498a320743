"""The fast tier asks the model less often, says so, and changes nothing of the exact one."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from ourvidz_wan.arguments import UsageError
from ourvidz_wan.checkpoints import make_scheduler
from ourvidz_wan.conditioning import ConditionedScheduler
from ourvidz_wan.config import Solver
from ourvidz_wan.sampling import sample
from ourvidz_wan.tiers import LEAST_STEPS, steps_taken

from ourvidz_core.engine.tiers import Tier


def quietly(step: int, total: int) -> None:
    """For runs that nobody watches."""


@pytest.fixture
def forwards(models):
    """The timesteps that the transformer was asked about, one entry a forward."""
    seen: list[int] = []
    hook = models.pipeline.transformer.register_forward_pre_hook(
        lambda _module, _args, options: seen.extend(options["timestep"].tolist()), with_kwargs=True
    )
    yield seen
    hook.remove()


@given(st.integers(min_value=1, max_value=1000))
def test_steps_are_left_out_between_the_beginning_and_the_end(steps):
    taken = steps_taken(Tier.FAST, steps)
    assert taken == sorted(set(taken))
    assert taken[0] == 0
    assert taken[-1] == steps - 1
    assert len(taken) <= max(LEAST_STEPS, -(-steps * 44 // 100))
    assert np.diff(taken).max(initial=0) <= 4
    assert steps_taken(Tier.EXACT, steps) == list(range(steps))


@pytest.mark.parametrize(("steps", "computed"), [(1, 1), (8, 8), (15, 8), (25, 11), (50, 22), (100, 44)])
def test_a_job_of_so_many_steps_computes_under_half_but_not_too_few(steps, computed):
    assert len(steps_taken(Tier.FAST, steps)) == computed


@pytest.mark.parametrize("solver", Solver)
@pytest.mark.parametrize("start_sigma", [None, 0.6])
def test_the_noise_levels_are_those_of_the_exact_schedule(solver, start_sigma):
    sigmas, timesteps = [], []
    for tier in Tier:
        scheduler = ConditionedScheduler(make_scheduler(solver, 5.0, tier), start_sigma=start_sigma)
        scheduler.set_timesteps(25)
        sigmas.append(scheduler.sigmas)
        timesteps.append(scheduler.timesteps)
    taken = steps_taken(Tier.FAST, 25)
    torch.testing.assert_close(sigmas[1], sigmas[0][[*taken, 25]])
    assert torch.equal(timesteps[1], timesteps[0][taken])


@pytest.mark.parametrize("solver", Solver)
@pytest.mark.parametrize("frames", [1, 5])
def test_fast_asks_less_often_and_makes_nearly_the_same(solver, frames, models, asking, forwards):
    options = {"frame_num": frames, "sample_steps": 25, "sample_solver": solver.value}
    exact = sample(asking(**options, tier="exact"), models, quietly)
    asked = forwards.copy()
    forwards.clear()
    steps: list[tuple[int, int]] = []
    fast = sample(asking(**options, tier="fast"), models, lambda step, total: steps.append((step, total)))
    assert len(asked) == 2 * 25
    assert len(forwards) == 2 * fast.facts["steps_computed"] == 22
    assert set(forwards) < set(asked)
    assert steps == [(step, 11) for step in range(1, 12)]
    distance = float((fast.latents - exact.latents).norm() / exact.latents.norm())
    assert 0 < distance < 0.08
    assert (fast.facts["tier"], exact.facts["tier"]) == ("fast", "exact")
    assert (fast.facts["steps"], exact.facts["steps"]) == (25, 25)
    assert "steps_computed" not in exact.facts


def test_a_job_of_few_steps_is_the_same_in_both_tiers(models, asking):
    options = {"frame_num": 5, "sample_steps": LEAST_STEPS}
    exact = sample(asking(**options), models, quietly)
    fast = sample(asking(**options, tier="fast"), models, quietly)
    assert torch.equal(fast.latents, exact.latents)
    assert fast.facts["steps_computed"] == LEAST_STEPS


def test_references_are_met_in_the_fast_tier_too(models, asking, pictures):
    options = {"frame_num": 9, "sample_steps": 25, "first_frame": pictures["lake"], "last_frame": pictures["fire"]}
    exact = sample(asking(**options), models, quietly)
    fast = sample(asking(**options, tier="fast"), models, quietly)
    torch.testing.assert_close(fast.latents[:, :, [0, -1]], exact.latents[:, :, [0, -1]], rtol=1e-4, atol=1e-4)
    assert fast.facts["reference_method"] == "pinned_frames"


def test_another_tier_is_refused_by_name(asking):
    with pytest.raises(UsageError, match=r"--tier: invalid choice: 'quick'.*exact.*fast"):
        asking(tier="quick")
