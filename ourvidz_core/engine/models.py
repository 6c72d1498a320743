"""Warm models within a memory budget: what is used stays, what was used longest ago leaves."""

from __future__ import annotations

import gc
import logging
import sys
from collections import OrderedDict
from collections.abc import Callable
from typing import Any, TypeVar, cast

from attrs import frozen

logger = logging.getLogger(__name__)

Model = TypeVar("Model")


@frozen
class _Resident:
    model: Any
    vram_gb: float


class ModelCache:
    """Models by key, least recently used first. Used by one job at a time."""

    def __init__(self, budget_gb: float | None = None) -> None:
        self._budget_gb = budget_gb
        self._resident: OrderedDict[str, _Resident] = OrderedDict()

    @property
    def keys(self) -> tuple[str, ...]:
        """What is warm, least recently used first."""
        return tuple(self._resident)

    def get(self, key: str, load: Callable[[], Model], *, vram_gb: float = 0.0) -> Model:
        """The model under ``key``, loaded now if it is not there; see ``Models.get``."""
        if key in self._resident:
            self._resident.move_to_end(key)
            return cast(Model, self._resident[key].model)
        self._make_room(vram_gb)
        model = load()
        self._resident[key] = _Resident(model, vram_gb)
        return model

    def drop(self, key: str) -> None:
        """Forget the model under ``key``, if it is there, and free its memory."""
        if self._resident.pop(key, None) is not None:
            _free_memory()

    def clear(self) -> None:
        """Forget every model."""
        self._resident.clear()
        _free_memory()

    def _make_room(self, vram_gb: float) -> None:
        budget = self._budget_gb if self._budget_gb is not None else _device_budget_gb()
        if budget is None:
            return
        while sum(r.vram_gb for r in self._resident.values()) + vram_gb > budget:
            # A model that takes nothing on the device makes no room by leaving.
            key = next((key for key, resident in self._resident.items() if resident.vram_gb > 0), None)
            if key is None:
                return
            logger.info("model %s leaves: %.1f GiB are needed and the budget is %.1f GiB", key, vram_gb, budget)
            self.drop(key)  # no name here may still hold the model while its memory is freed


def _device_budget_gb() -> float | None:
    """What is free on the device with what this process holds of it. What other processes hold is theirs."""
    torch = sys.modules.get("torch")
    if torch is None or not torch.cuda.is_available():
        return None
    free, _ = torch.cuda.mem_get_info()
    return float(free + torch.cuda.memory_reserved()) / 2**30 * 0.9


def _free_memory() -> None:
    gc.collect()
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_available():
        torch.cuda.empty_cache()
