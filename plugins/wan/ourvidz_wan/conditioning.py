"""Make a text-to-video model keep reference frames, without other weights and without extra steps.

Stands between guidance and the scheduler's step: the clean latents that the model predicts
are moved toward what is known of them, and the step then goes on from there. The sample
itself is never touched: UniPC's corrector restarts from the sample before the last step,
so whatever is written into the sample is gone one step later.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from attrs import field, frozen

#: Correlation of neighbouring latent frames that the propagation assumes. Assuming more than
#: a video has makes it still, assuming less makes it jump away from its pinned frame.
FRAME_CORRELATION = 0.9
#: Share of a latent's variance that all frames have in common: a background, a light.
STATIC_SHARE = 0.3
#: The same, where only the end is known. With more, a video may be drawn to its end from the start on, and stand still.
END_STATIC_SHARE = 0.0
#: Variance of the doubt about a single reference at strength 0.5.
SINGLE_DOUBT = 0.25
#: Some noise is left to remove however strong a reference image is, so that a step always runs.
LEAST_IMAGE_NOISE = 0.05


@frozen(kw_only=True)
class FrameConditioner:
    """What is known of some latent frames, and how far that knowledge reaches.

    The latents of a video are taken for a Gaussian process over its frames with the
    covariance K. At noise level sigma the model's prediction has the error covariance
    C(sigma) = (K^-1 + ((1 - sigma) / sigma)^2 I)^-1, so observing the frames S with the error
    variance R moves all frames by C[:, S] (C[S, S] + R I)^-1 times the residual at S, as
    a Kalman update does. Neighbours move by the *error* of the pinned frame and not
    toward its picture, so predicted motion stays; the reach shrinks by itself as the
    noise falls.
    """

    #: Latent frames that are known; negative ones count from the end.
    frames: tuple[int, ...]
    #: Their normalised latents, ``[batch, channels, len(frames), height, width]``.
    latents: torch.Tensor = field(repr=False)
    #: Variance of the doubt about ``latents`` (R). At 0 they are met exactly.
    doubt: float = 0.0
    frame_correlation: float = FRAME_CORRELATION
    static_share: float = STATIC_SHARE
    #: Gains that lie where the latents do, by noise level and number of frames.
    _gains: dict[tuple[float, int], torch.Tensor] = field(factory=dict, init=False, repr=False)

    def make_ready(self, sigmas: Sequence[float], sample: torch.Tensor) -> None:
        """Bring the gains of a whole schedule to where ``sample`` is, so that no step waits for its own."""
        count = sample.shape[2]
        gains = torch.stack([self.gain(sigma, count) for sigma in sigmas]).to(sample)
        self._gains.update({(sigma, count): gain for sigma, gain in zip(sigmas, gains, strict=True)})

    def gain(self, sigma: float, count: int) -> torch.Tensor:
        """How much each of ``count`` latent frames follows each known frame's residual, ``[count, known]``."""
        place = torch.arange(count, dtype=torch.float64)
        distance = (place[:, None] - place[None, :]).abs()
        prior = self.static_share + (1.0 - self.static_share) * self.frame_correlation**distance
        precision = ((1.0 - sigma) / sigma) ** 2
        # K (I + p K)^-1 equals (K^-1 + p I)^-1 and needs no inverse of K.
        error = torch.linalg.solve(torch.eye(count, dtype=torch.float64) + precision * prior, prior)
        known = self._places(count)
        observed = error[known][:, known] + self.doubt * torch.eye(len(known), dtype=torch.float64)
        gain: torch.Tensor = torch.linalg.solve(observed, error[known]).T
        return gain

    def __call__(self, predicted: torch.Tensor, sigma: float) -> torch.Tensor:
        """``predicted`` clean latents ``[batch, channels, frames, height, width]``, moved toward what is known."""
        count = predicted.shape[2]
        if (sigma, count) not in self._gains:
            self.make_ready([sigma], predicted)
        known = self._places(count)
        latents = self.latents.to(predicted)
        # Place by place: a list of places would be sent to the device.
        residual = latents - torch.stack([predicted[:, :, place] for place in known], dim=2)
        moved = predicted + torch.einsum("fs,bcshw->bcfhw", self._gains[sigma, count], residual)
        if self.doubt == 0.0:
            for index, place in enumerate(known):
                moved[:, :, place] = latents[:, :, index]
        return moved

    def _places(self, count: int) -> list[int]:
        return [frame % count for frame in self.frames]


def pinned(*, start: torch.Tensor | None = None, end: torch.Tensor | None = None) -> FrameConditioner:
    """Keep the first latent frame, the last one, or both, exactly."""
    ends = [(0, start), (-1, end)]
    known = [(frame, latent) for frame, latent in ends if latent is not None]
    return FrameConditioner(
        frames=tuple(frame for frame, _ in known),
        latents=torch.cat([latent for _, latent in known], dim=2),
        static_share=STATIC_SHARE if start is not None else END_STATIC_SHARE,
    )


def resembling(latent: torch.Tensor, strength: float) -> FrameConditioner:
    """Let the video begin like ``latent``: at strength 1 exactly there, below it with a growing doubt."""
    return FrameConditioner(
        frames=(0,),
        latents=latent,
        doubt=SINGLE_DOUBT * ((1.0 - strength) / strength) ** 2,
    )


def image_start_sigma(strength: float) -> float:
    """Noise level at which an image made from a reference starts: higher strength, closer to the reference."""
    return max(1.0 - strength, LEAST_IMAGE_NOISE)


def noised(latents: torch.Tensor, noise: torch.Tensor, sigma: float) -> torch.Tensor:
    """Clean ``latents`` at noise level ``sigma`` of the flow."""
    return (1.0 - sigma) * latents + sigma * noise


class ConditionedScheduler:
    """A flow scheduler whose steps start from conditioned predictions.

    A scheduler is handed the guided model output and the sample, which is the one place where
    conditioning belongs; so this wraps the scheduler, and whoever drives it is left as it is.
    Everything but ``step`` and ``set_timesteps`` is the scheduler's own.
    """

    def __init__(
        self, scheduler: Any, *, conditioner: FrameConditioner | None = None, start_sigma: float | None = None
    ) -> None:
        """``start_sigma`` begins the schedule there, with the same number of steps."""
        self._scheduler = scheduler
        self._conditioner = conditioner
        self._start_sigma = start_sigma
        self._step = 0

    def __getattr__(self, name: str) -> Any:
        return getattr(self._scheduler, name)

    def set_timesteps(self, num_inference_steps: int, device: Any = None) -> None:
        self._scheduler.set_timesteps(num_inference_steps, device=device)
        self._step = 0
        if self._start_sigma is not None:
            shift = self._scheduler.config.flow_shift
            sigmas = schedule_from(self._scheduler.sigmas, self._start_sigma, shift)
            training_steps = self._scheduler.config.num_train_timesteps
            self._scheduler.sigmas = sigmas
            self._scheduler.timesteps = (sigmas[:-1].double() * training_steps).to(device=device, dtype=torch.int64)

    def step(self, model_output: torch.Tensor, timestep: Any, sample: torch.Tensor, **options: Any) -> Any:
        sigma = float(self._scheduler.sigmas[self._step])
        if self._conditioner is not None and self._step == 0:
            self._conditioner.make_ready([float(level) for level in self._scheduler.sigmas[:-1]], sample)
        self._step += 1
        if self._conditioner is not None:
            predicted = sample - sigma * model_output
            model_output = (sample - self._conditioner(predicted, sigma)) / sigma
        return self._scheduler.step(model_output, timestep, sample, **options)


def schedule_from(sigmas: torch.Tensor, start_sigma: float, shift: float) -> torch.Tensor:
    """The shifted schedule ``sigmas`` squeezed to begin at ``start_sigma``, the final 0 included.

    Squeezed in the schedule's own time, before the shift, so that it keeps its shape.
    """

    def unshifted(sigma: torch.Tensor) -> torch.Tensor:
        return sigma / (shift - (shift - 1.0) * sigma)

    time = unshifted(sigmas.double())
    start = unshifted(torch.tensor(start_sigma, dtype=torch.float64))
    time = time * (start / time[0])
    return (shift * time / (1.0 + (shift - 1.0) * time)).float()
