"""Keep the host near the device, so that reported steps are done and a cancelled job stops soon."""

from __future__ import annotations

from collections import deque
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


class StepPacer:
    """Lets the host be ``ahead`` steps before the device and no more. Without CUDA it does nothing.

    The device always has a step to go on with, so it loses no time.
    """

    def __init__(self, device: str, *, ahead: int = 2) -> None:
        self._device = device
        self._ahead = ahead
        self._waiting: deque[torch.cuda.Event] = deque()

    def step(self) -> None:
        """Say that a step has been launched; waits for the one that came ``ahead`` steps before it."""
        if not self._device.startswith("cuda"):
            return
        import torch

        # The host sleeps meanwhile, and leaves its core to those who write the last job's files.
        event = torch.cuda.Event(blocking=True)
        event.record(torch.cuda.current_stream(self._device))
        self._waiting.append(event)
        if len(self._waiting) > self._ahead:
            self._waiting.popleft().synchronize()
