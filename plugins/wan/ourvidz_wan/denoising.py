"""The steps of a text-to-video job from noise to latents: diffusers' own, without its waits for the device."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from ourvidz_wan.prediction import Branch, Predict, Predictor


def denoise(
    latents: torch.Tensor,
    *,
    scheduler: Any,
    steps: int,
    predictor: Predictor,
    branches: Sequence[Branch],
    guidance_scale: float,
    dtype: torch.dtype,
    on_step: Callable[[int], None],
) -> torch.Tensor:
    """The clean latents at the end of ``steps`` steps from the noisy ``latents``, in float32.

    ``branches`` are the prompt's and, with guidance, the negative prompt's; ``dtype`` is the transformer's.
    ``on_step`` is called with the number of steps that were launched, and may raise to stop.
    """
    scheduler.set_timesteps(steps, device=latents.device)
    scheduler.set_begin_index(0)
    with predictor.job(branches) as predict:
        for index, timestep in enumerate(scheduler.timesteps):
            guided = predict_with_guidance(predict, latents.to(dtype), timestep.expand(1), guidance_scale)
            latents = scheduler.step(guided, timestep, latents, return_dict=False)[0]
            on_step(index + 1)
    return latents


def predict_with_guidance(
    predict: Predict, hidden_states: torch.Tensor, timestep: torch.Tensor, guidance_scale: float
) -> torch.Tensor:
    """What the model says of a noisy video, led away from the negative prompt where there is one."""
    prompted, *others = predict(hidden_states, timestep)
    if not others:
        return prompted
    (negative,) = others
    return negative + guidance_scale * (prompted - negative)
