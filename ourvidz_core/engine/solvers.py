"""Steps of diffusers' solvers that never wait for the device.

diffusers works out the coefficients of a UniPC step with scalars on the device and a linear
solver there, and looks up its first step in the device's timesteps: some sixty launches
and several waits a step, while the device runs dry. A coefficient depends on the noise
schedule alone, and that lies in main memory. So the classes here work them out there, once
for each schedule in a process, and a step is what is left: sums of tensors times plain numbers.

The arithmetic is diffusers' own, in its precision and order, so that on a CPU its results
are met to the bit. Nothing of diffusers is imported here; a plugin puts one of these in
front of the scheduler that it already needs::

    class UniPCMultistepScheduler(HostUniPC, diffusers.UniPCMultistepScheduler):
        ...
"""

from __future__ import annotations

import math
from functools import lru_cache
from typing import TYPE_CHECKING, Any

from attrs import frozen

if TYPE_CHECKING:
    import torch

    Scheduler: Any
else:
    Scheduler = object

#: Steps whose coefficients are kept: some dozens of schedules of 50 steps, predictor and corrector.
_CACHED_STEPS = 8192


@frozen(kw_only=True)
class Residuals:
    """How far a UniPC step departs from the straight line, from the clean predictions it knows."""

    #: Of the whole sum.
    scale: float
    #: For each earlier prediction: its distance in time and its share.
    distances: tuple[float, ...]
    shares: tuple[float, ...]
    #: Of the newest prediction, which only the corrector knows.
    newest_share: float


@frozen(kw_only=True)
class Coefficients:
    """The plain numbers of one step: ``sample_share * sample - output_share * newest output``, and more."""

    sample_share: float
    output_share: float
    residuals: Residuals | None = None
    #: DPM-Solver++ 2: of the last two predictions' difference, which is divided by ``distance`` first.
    distance: float = 0.0
    difference_share: float = 0.0


class _KnowsItsStart(Scheduler):  # type: ignore[misc]
    """A scheduler whose trajectory begins at its first timestep unless a pipeline says otherwise."""

    def set_timesteps(self, *arguments: Any, **options: Any) -> None:
        """See diffusers. What begins later says so by ``set_begin_index``, as all its pipelines do.

        Without this the first step reads the timesteps back from the device; and where a
        steep schedule has its first timestep twice, it would begin at the second.
        """
        super().set_timesteps(*arguments, **options)
        self.set_begin_index(0)


class HostUniPC(_KnowsItsStart):
    """UniPC, in front of diffusers' ``UniPCMultistepScheduler``."""

    def multistep_uni_p_bh_update(
        self, model_output: torch.Tensor, *, sample: torch.Tensor, order: int
    ) -> torch.Tensor:
        """The predictor: from the newest clean prediction to the next sample."""
        if self.solver_p:
            stepped: torch.Tensor = super().multistep_uni_p_bh_update(model_output, sample=sample, order=order)
            return stepped
        index = self.step_index
        step = self._coefficients(index + 1, index, tuple(index - i for i in range(1, order)), is_corrector=False)
        return self._moved(step, sample, None).to(sample.dtype)

    def multistep_uni_c_bh_update(
        self, this_model_output: torch.Tensor, *, last_sample: torch.Tensor, this_sample: torch.Tensor, order: int
    ) -> torch.Tensor:
        """The corrector: the last step once more, now that its end has been seen."""
        index = self.step_index
        earlier = tuple(index - i - 1 for i in range(1, order))
        step = self._coefficients(index, index - 1, earlier, is_corrector=True)
        return self._moved(step, last_sample, this_model_output).to(this_sample.dtype)

    def _coefficients(self, to: int, start: int, earlier: tuple[int, ...], *, is_corrector: bool) -> Coefficients:
        sigmas = self.sigmas
        return unipc_coefficients(
            sigma=float(sigmas[to]),
            start=float(sigmas[start]),
            earlier=tuple(float(sigmas[index]) for index in earlier),
            is_flow=bool(self.config.use_flow_sigmas),
            predicts_clean=bool(self.predict_x0),
            solver_type=self.config.solver_type,
            is_corrector=is_corrector,
        )

    def _moved(self, step: Coefficients, sample: torch.Tensor, newest: torch.Tensor | None) -> torch.Tensor:
        outputs = self.model_outputs
        last = outputs[-1]
        moved = step.sample_share * sample - step.output_share * last
        if step.residuals is None:
            return moved
        departure: Any = 0
        residuals = step.residuals
        for place, (distance, share) in enumerate(zip(residuals.distances, residuals.shares, strict=True)):
            departure = departure + share * ((outputs[-2 - place] - last) / distance)
        if newest is not None:
            departure = departure + residuals.newest_share * (newest - last)
        return moved - residuals.scale * departure


class HostDPMSolver(_KnowsItsStart):
    """DPM-Solver++ of first and second order, in front of diffusers' ``DPMSolverMultistepScheduler``.

    Its other algorithms and its third order are diffusers' own.
    """

    def dpm_solver_first_order_update(
        self, model_output: torch.Tensor, *, sample: torch.Tensor, noise: torch.Tensor | None = None
    ) -> torch.Tensor:
        """The first step, and the last."""
        if self.config.algorithm_type != "dpmsolver++":
            stepped: torch.Tensor = super().dpm_solver_first_order_update(model_output, sample=sample, noise=noise)
            return stepped
        step = self._coefficients(None)
        return step.sample_share * sample - step.output_share * model_output

    def multistep_dpm_solver_second_order_update(
        self, model_output_list: list[torch.Tensor], *, sample: torch.Tensor, noise: torch.Tensor | None = None
    ) -> torch.Tensor:
        """All steps between."""
        if self.config.algorithm_type != "dpmsolver++":
            stepped: torch.Tensor = super().multistep_dpm_solver_second_order_update(
                model_output_list, sample=sample, noise=noise
            )
            return stepped
        last, before = model_output_list[-1], model_output_list[-2]
        step = self._coefficients(float(self.sigmas[self.step_index - 1]))
        difference = step.distance * (last - before)
        straight = step.sample_share * sample - step.output_share * last
        return straight + step.difference_share * difference

    def _coefficients(self, earlier: float | None) -> Coefficients:
        return dpm_coefficients(
            sigma=float(self.sigmas[self.step_index + 1]),
            start=float(self.sigmas[self.step_index]),
            earlier=earlier,
            is_flow=bool(self.config.use_flow_sigmas),
            solver_type=self.config.solver_type,
        )


@lru_cache(maxsize=_CACHED_STEPS)
def unipc_coefficients(
    *,
    sigma: float,
    start: float,
    earlier: tuple[float, ...],
    is_flow: bool,
    predicts_clean: bool,
    solver_type: str,
    is_corrector: bool,
) -> Coefficients:
    """The numbers of a UniPC step from noise level ``start`` to ``sigma``; ``earlier`` come before, newest first."""
    import torch

    alpha_t, sigma_t, lambda_t = _levels(sigma, is_flow)
    alpha_s, sigma_s, lambda_s = _levels(start, is_flow)
    h = lambda_t - lambda_s
    hh = -h if predicts_clean else h
    distances = [(_levels(level, is_flow)[2] - lambda_s) / h for level in earlier]
    phi = torch.expm1(hh)
    width = hh if solver_type == "bh1" else torch.expm1(hh)
    if predicts_clean:
        sample_share, output_share, scale = sigma_t / sigma_s, alpha_t * phi, alpha_t * width
    else:
        sample_share, output_share, scale = alpha_t / alpha_s, sigma_t * phi, sigma_t * width
    order = len(earlier) + 1
    residuals = None
    if is_corrector or order > 1:
        shares = _unipc_shares(hh, phi, width, torch.stack([*distances, torch.ones(())]), is_corrector=is_corrector)
        residuals = Residuals(
            scale=float(scale),
            distances=tuple(float(distance) for distance in distances),
            shares=tuple(shares[: order - 1]),
            newest_share=shares[-1] if is_corrector else math.nan,
        )
    return Coefficients(sample_share=float(sample_share), output_share=float(output_share), residuals=residuals)


def _unipc_shares(
    hh: torch.Tensor, phi: torch.Tensor, width: torch.Tensor, distances: torch.Tensor, *, is_corrector: bool
) -> list[float]:
    import torch

    order = len(distances)
    # The lowest order of each has a fixed share, as in the method's own implementation.
    if order == (1 if is_corrector else 2):
        return [0.5]
    rows, right = [], []
    phi_k, factorial = phi / hh - 1, 1
    for k in range(1, order + 1):
        rows.append(torch.pow(distances, k - 1))
        right.append(phi_k * factorial / width)
        factorial *= k + 1
        phi_k = phi_k / hh - 1 / factorial
    left, wanted = torch.stack(rows), torch.stack(right)
    if not is_corrector:
        left, wanted = left[:-1, :-1], wanted[:-1]
    solved: list[float] = torch.linalg.solve(left, wanted).tolist()
    return solved


@lru_cache(maxsize=_CACHED_STEPS)
def dpm_coefficients(
    *, sigma: float, start: float, earlier: float | None, is_flow: bool, solver_type: str
) -> Coefficients:
    """The numbers of a DPM-Solver++ step from ``start`` to ``sigma``; without ``earlier`` of first order."""
    import torch

    alpha_t, sigma_t, lambda_t = _levels(sigma, is_flow)
    _, sigma_s, lambda_s = _levels(start, is_flow)
    h = lambda_t - lambda_s
    share = alpha_t * (torch.exp(-h) - 1.0)
    straight = Coefficients(sample_share=float(sigma_t / sigma_s), output_share=float(share))
    if earlier is None:
        return straight
    distance = (lambda_s - _levels(earlier, is_flow)[2]) / h
    difference = alpha_t * ((torch.exp(-h) - 1.0) / h + 1.0) if solver_type == "heun" else -(0.5 * share)
    return Coefficients(
        sample_share=straight.sample_share,
        output_share=straight.output_share,
        distance=float(1.0 / distance),
        difference_share=float(difference),
    )


def _levels(sigma: float, is_flow: bool) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Signal, noise and half the logarithm of their ratio, as scalars in main memory."""
    import torch

    level = torch.tensor(sigma, dtype=torch.float32, device="cpu")
    if is_flow:
        alpha, noise = 1 - level, level
    else:
        alpha = 1 / ((level**2 + 1) ** 0.5)
        noise = level * alpha
    return alpha, noise, torch.log(alpha) - torch.log(noise)
