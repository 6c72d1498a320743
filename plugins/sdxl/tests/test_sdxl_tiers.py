"""The fast tier asks the UNet in about half of the steps, says so, and changes nothing of the exact one."""

from __future__ import annotations

import itertools
import logging
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from attrs import frozen
from diffusers import (
    DPMSolverMultistepScheduler,
    EulerAncestralDiscreteScheduler,
    EulerDiscreteScheduler,
    HeunDiscreteScheduler,
)
from hypothesis import given
from hypothesis import strategies as st
from ourvidz_sdxl.config import Solver
from ourvidz_sdxl.parallel.messages import read_request, say_request
from ourvidz_sdxl.pipeline import ImageRequest
from ourvidz_sdxl.references import steps_for_strength
from ourvidz_sdxl.schedulers import in_fewer_steps, scheduler_for, steps_taken
from ourvidz_sdxl.settings import SdxlSettings
from ourvidz_sdxl.tiers import FAST
from ourvidz_sdxl.warm import warm_pipeline
from sdxl_support import job, made, parsed, payload, pixels

from ourvidz_core.engine.models import ModelCache
from ourvidz_core.engine.pictures import read_facts
from ourvidz_core.engine.tiers import Tier
from ourvidz_core.engine.variants import find_model
from ourvidz_core.errors import PayloadError, SettingsError
from ourvidz_core.settings import variable_of
from ourvidz_core.testing.doubles import RecordingContext
from ourvidz_core.wire.artifacts import Generation
from ourvidz_core.wire.jobs import Job

#: SDXL's own noise schedule; as it was published it is "leading", with predictions of the noise.
SDXL = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "steps_offset": 1}


@given(steps=st.integers(1, 100), strength=st.floats(0.1, 1.0))
def test_about_half_of_the_steps_are_taken_and_never_fewer_than_eight(steps: int, strength: float) -> None:
    for of_job in (steps, steps_for_strength(steps, strength)):
        taken = len(FAST.places(steps, steps - of_job)) - (steps - of_job)
        assert taken == min(of_job, max(8, math.ceil(of_job / 2)))


@pytest.mark.parametrize(("steps", "computed"), [(1, 1), (8, 8), (15, 8), (25, 13), (50, 25), (100, 50)])
def test_a_job_of_so_many_steps_computes_so_many(steps: int, computed: int) -> None:
    assert len(FAST.places(steps)) == computed


@pytest.mark.parametrize("spacing", ["leading", "trailing"])
@pytest.mark.parametrize("skipped", [0, 10])
def test_the_noise_levels_are_those_of_the_whole_schedule(spacing: str, skipped: int) -> None:
    exact = scheduler_for(Solver.UNIPC, EulerDiscreteScheduler(**SDXL, timestep_spacing=spacing))
    fast = in_fewer_steps(exact, 30, skipped=skipped)
    fast.set_timesteps(30)
    exact.set_timesteps(30)
    places = FAST.places(30, skipped)
    assert steps_taken(fast, 30) == len(places) < 30
    assert torch.equal(fast.sigmas, exact.sigmas[[*places, 30]])
    assert torch.equal(fast.timesteps, exact.timesteps[places])


def sampled(scheduler: Any, steps: int) -> torch.Tensor:
    """What a perfect model of two kinds of pictures, each with a little of its own, makes of some noise."""
    scheduler.set_timesteps(steps)
    x = torch.randn(64, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    x = x * scheduler.init_noise_sigma
    kinds = torch.tensor([[1.0, -0.5, 0.3, 0.0], [-1.0, 0.5, 0.3, 0.6]], dtype=torch.float64)
    signal = scheduler.alphas_cumprod.double()
    for timestep in scheduler.timesteps:
        level = float(((1 - signal) / signal).sqrt()[int(timestep)])
        noisy = scheduler.scale_model_input(x, timestep) * math.sqrt(level**2 + 1)
        spread = 0.2**2 + level**2
        shares = (-((noisy[:, None] - kinds) ** 2).sum(-1) / (2 * spread)).softmax(-1)
        noise = level * (noisy - shares @ kinds) / spread
        x = scheduler.step(noise, timestep, x, return_dict=False)[0].double()
    return x


@pytest.mark.parametrize("spacing", ["leading", "trailing"])
@pytest.mark.parametrize("solver", [None, *Solver])
def test_on_sdxls_own_schedule_it_comes_near_for_it_keeps_the_last_step(spacing: str, solver: Solver | None) -> None:
    own = EulerDiscreteScheduler(**SDXL, timestep_spacing=spacing)
    exact = sampled(scheduler_for(solver, own), 25)
    fast = in_fewer_steps(scheduler_for(solver, own), 25)
    distance = float((sampled(fast, 25) - exact).norm() / exact.norm())
    assert 0 < distance < 0.05
    fast.places = lambda steps: [round(steps * place / 13) for place in range(13)]
    assert distance < 0.8 * float((sampled(fast, 25) - exact).norm() / exact.norm())


@pytest.mark.parametrize(
    "own",
    [
        EulerAncestralDiscreteScheduler(**SDXL),
        HeunDiscreteScheduler(**{name: value for name, value in SDXL.items() if name != "steps_offset"}),
        DPMSolverMultistepScheduler(**SDXL, algorithm_type="sde-dpmsolver++"),
    ],
    ids=lambda own: type(own).__name__,
)
def test_a_scheduler_that_goes_another_way_takes_all_its_steps(own: Any, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        assert in_fewer_steps(own, 25) is own
    assert steps_taken(own, 25) == 25
    assert f"leaves out no steps of a checkpoint with {type(own).__name__}" in caplog.text


@given(
    tier=st.sampled_from(Tier),
    solver=st.none() | st.sampled_from(Solver),
    seeds=st.lists(st.integers(0, 2**32), min_size=1, max_size=6),
)
def test_other_gpus_hear_of_the_tier(tier: Tier, solver: Solver | None, seeds: list[int]) -> None:
    request = ImageRequest(
        prompt="a cat",
        negative_prompt="",
        seeds=tuple(seeds),
        width=64,
        height=64,
        num_inference_steps=9,
        guidance_scale=2.0,
        solver=solver,
        tier=tier,
    )
    assert read_request(say_request(request)) == request


@frozen(kw_only=True)
class Drawn:
    """What became of a job."""

    generation: Generation
    #: As its progress was reported.
    steps: list[tuple[str, int, int]]
    #: How noisy what the UNet was asked about was.
    asked: list[float]


@pytest.fixture(scope="module")
def demo() -> ModelCache:
    pytest.importorskip("ourvidz_demo_models", reason="ourvidz-demo-models is not installed")
    return ModelCache()


@pytest.fixture
def draw(tmp_path: Path, demo: ModelCache) -> Callable[..., Drawn]:
    """Draws with the demo model; keywords are settings of the plugin."""
    numbers = itertools.count()

    def draw(a_job: Job, **settings: str) -> Drawn:
        work_dir = tmp_path / str(next(numbers))
        work_dir.mkdir()
        environ = {variable_of(name, "sdxl"): value for name, value in {"model": "demo", **settings}.items()}
        context = RecordingContext(work_dir, environ=environ, models=demo)
        path = find_model(Path("demo"), "sdxl")
        unet = warm_pipeline(demo, path, context.settings(SdxlSettings), "cpu").base.unet
        asked: list[float] = []
        hook = unet.register_forward_pre_hook(lambda _module, given: asked.append(float(given[1])))
        try:
            return Drawn(generation=made(a_job, context), steps=context.steps, asked=asked)
        finally:
            hook.remove()

    return draw


def decibels(one: Generation, other: Generation) -> float:
    """How alike two pictures are, by the peak over the mean error."""
    error = np.mean((pixels(one.artifacts[0]) - pixels(other.artifacts[0])) ** 2.0)
    return float(10 * np.log10(255**2 / max(error, 1e-9)))


@pytest.mark.parametrize("strength", [None, pytest.param(0.2, marks=pytest.mark.slow)])
def test_fast_draws_nearly_the_same_in_fewer_steps(
    draw: Callable[..., Drawn], reference_png: Path, strength: float | None
) -> None:
    config = {"seed": 1, "num_inference_steps": 15, "num_images": 1}
    steps, reference = 15, None
    if strength is not None:
        steps, reference = 12, reference_png
        config |= {"reference_image_url": "https://a.test/r.png", "reference_strength": strength}
    a_job = job(prompt="a yellow circle", config=config, reference=reference)
    exact, fast = draw(a_job), draw(a_job, tier="fast")
    assert (len(exact.asked), len(fast.asked)) == (steps, 8)
    assert set(fast.asked) < set(exact.asked)
    assert fast.asked[0] == exact.asked[0]
    assert fast.steps == [("denoise", step, 8) for step in range(1, 9)]
    assert 32 < decibels(fast.generation, exact.generation) < 60
    facts = fast.generation.facts
    assert (facts["tier"], facts["steps"], facts["steps_computed"]) == ("fast", steps, 8)
    assert facts["scheduler"] == "UniPCMultistepScheduler"
    assert (exact.generation.facts["tier"], exact.generation.facts["steps"]) == ("exact", steps)
    assert "steps_computed" not in exact.generation.facts
    assert exact.generation.facts["scheduler"] == "EulerDiscreteScheduler"
    said = read_facts(fast.generation.artifacts[0].path)
    assert (said["tier"], said["steps"], said["steps_computed"]) == ("fast", str(steps), "8")


def test_a_job_of_few_steps_is_the_same_in_both_tiers(draw: Callable[..., Drawn]) -> None:
    a_job = job(config={"seed": 3, "num_inference_steps": 2})
    exact, fast = draw(a_job).generation, draw(a_job, tier="fast").generation
    assert np.array_equal(pixels(exact.artifacts[0]), pixels(fast.artifacts[0]))
    assert fast.facts["scheduler"] == exact.facts["scheduler"]
    assert (fast.facts["tier"], fast.facts["steps_computed"]) == ("fast", 2)


@pytest.mark.parametrize(
    ("setting", "asked", "tier"), [("exact", {"tier": "fast"}, "fast"), ("fast", {"tier": "exact"}, "exact")]
)
def test_the_tier_is_the_jobs_own_before_that_of_the_setting(
    draw: Callable[..., Drawn], setting: str, asked: dict[str, str], tier: str
) -> None:
    a_job = job(config={"num_inference_steps": 1, **asked})
    assert a_job.ignored_config == {}
    assert draw(a_job, tier=setting).generation.facts["tier"] == tier


def test_another_tier_is_refused_by_name(draw: Callable[..., Drawn]) -> None:
    with pytest.raises(PayloadError, match=r"\$\.config\.tier: expected one of exact, fast, got 'quick'"):
        parsed(payload(config={"tier": "quick"}))
    with pytest.raises(SettingsError, match="OURVIDZ_SDXL_TIER"):
        draw(job(), tier="quick")
