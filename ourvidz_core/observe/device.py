"""Memory of the GPU, asked of the driver: without a context of our own, which would take memory itself."""

from __future__ import annotations

import threading
from collections.abc import Mapping
from typing import Any

from ourvidz_core.delivery.board import DeviceMemory


class DeviceMonitor:
    """The memory of one NVIDIA device, all processes on it counted. Nothing where there is none. Thread-safe."""

    def __init__(self, device: str, environ: Mapping[str, str]) -> None:
        self._lock = threading.Lock()
        self._nvml: Any = None
        self._handle: Any = None
        if device != "cpu":
            self._open(visible_name(device, environ))

    def memory(self) -> DeviceMemory | None:
        """What is in use now; None where nothing can be asked."""
        if self._handle is None:
            return None
        with self._lock:
            try:
                memory = self._nvml.nvmlDeviceGetMemoryInfo(self._handle)
            except self._nvml.NVMLError:
                return None
        return DeviceMemory(used_gb=round(memory.used / 2**30, 3), total_gb=round(memory.total / 2**30, 3))

    def close(self) -> None:
        """Let go of the driver."""
        if self._handle is not None:
            self._handle = None
            self._nvml.nvmlShutdown()

    def _open(self, name: str) -> None:
        try:
            import pynvml
        except ImportError:
            return
        try:
            pynvml.nvmlInit()
            by_uuid = name.startswith(("GPU-", "MIG-"))
            self._handle = (
                pynvml.nvmlDeviceGetHandleByUUID(name) if by_uuid else pynvml.nvmlDeviceGetHandleByIndex(int(name))
            )
            self._nvml = pynvml
        except (pynvml.NVMLError, ValueError):
            self._handle = None


def visible_name(device: str, environ: Mapping[str, str]) -> str:
    """The driver's index or UUID of ``cuda:N``: CUDA counts only the devices that it is shown."""
    index = device.partition(":")[2] or "0"
    shown = [name.strip() for name in environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if name.strip()]
    if shown and index.isdecimal():
        return shown[int(index)] if int(index) < len(shown) else "none"
    return index
