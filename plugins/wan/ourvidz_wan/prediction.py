"""Ask the transformer for its predictions: the seam between the loop over the steps and the device, or devices."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any, Protocol

import torch

from ourvidz_core.engine.graphs import GraphedCall
from ourvidz_core.engine.pacing import StepPacer

#: Predicts for each branch of a job, of the model's input ``[1, channels, frames, height, width]`` and
#: the timestep ``[1]``. A prediction lasts until the next call.
Predict = Callable[[torch.Tensor, torch.Tensor], Sequence[torch.Tensor]]
#: The transformer's arguments that stay the same in all steps: a prompt's, or those of what shall not be seen.
Branch = Mapping[str, torch.Tensor]
#: Up to so many tokens the host launches kernels more slowly than an H200 works them off: all branches
#: then go through the transformer as one batch, and their launches are replayed as one CUDA graph.
LAUNCH_BOUND_TOKENS = 8192


class Predictor(Protocol):
    """Whatever holds a transformer."""

    @property
    def facts(self) -> Mapping[str, Any]:
        """What a job's facts say of how the last one was predicted."""

    def job(self, branches: Sequence[Branch]) -> AbstractContextManager[Predict]:
        """A function that predicts for each of ``branches``, for the steps of one job."""

    def forget_graphs(self) -> None:
        """Free what was recorded on weights where they lie; they are about to leave."""


class LocalPredictor:
    """A transformer on one device."""

    def __init__(self, transformer: Any, device: torch.device, *, is_offloaded: bool = False) -> None:
        """What ``is_offloaded`` finds its weights elsewhere in each job, and is not replayed."""
        self._transformer = transformer
        self._device = device
        self._patch_size: tuple[int, int, int] = transformer.config.patch_size
        self._replayed = GraphedCall(self._forward, name="the WAN transformer", module=transformer)
        self._may_replay = device.type == "cuda" and not is_offloaded

    @property
    def facts(self) -> Mapping[str, Any]:
        """Nothing that is not usual."""
        return {}

    @contextmanager
    def job(self, branches: Sequence[Branch]) -> Iterator[Predict]:
        """See :class:`Predictor`."""
        pacer = StepPacer(str(self._device))
        batched = {name: torch.cat([branch[name] for branch in branches]) for name in branches[0]}

        def predict(hidden_states: torch.Tensor, timestep: torch.Tensor) -> Sequence[torch.Tensor]:
            predictions: Sequence[torch.Tensor]
            if self._device.type == "cuda" and self._tokens(hidden_states) <= LAUNCH_BOUND_TOKENS:
                forward = self._replayed if self._may_replay else self._forward
                rows = len(branches)
                together = forward(hidden_states.expand(rows, -1, -1, -1, -1), timestep.expand(rows), **batched)
                predictions = together.chunk(rows)
            else:
                predictions = [self._forward(hidden_states, timestep, **branch) for branch in branches]
            pacer.step()
            return predictions

        yield predict

    def forget_graphs(self) -> None:
        """See :class:`Predictor`."""
        self._replayed.forget()

    def _forward(self, hidden_states: torch.Tensor, timestep: torch.Tensor, **branch: torch.Tensor) -> torch.Tensor:
        prediction: torch.Tensor = self._transformer(
            hidden_states=hidden_states, timestep=timestep, **branch, return_dict=False
        )[0]
        return prediction

    def _tokens(self, hidden_states: torch.Tensor) -> int:
        return math.prod(side // patch for side, patch in zip(hidden_states.shape[2:], self._patch_size, strict=True))
