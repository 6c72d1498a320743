"""Measure the GPUs in a short-lived child process: what looks takes memory there itself, and may hang.

Run as a program it prints what it saw as JSON; :func:`measure_gpus` is the parent's side.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterable, Mapping
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from attrs import field, frozen

from ourvidz_core.wire.findings import Finding
from ourvidz_core.wire.payloads import structure

#: A first contact with a driver that is not kept loaded takes its time.
_TIMEOUT_SECONDS = 60.0
#: Distributions that bring faster attention than torch's own, by what they are called in the report.
_KERNELS = {"flash-attn": "flash-attn", "FA3": "fa3-fwd", "sage": "sageattention", "xformers": "xformers"}


@frozen(kw_only=True)
class Gpu:
    """One device, numbered as ``CUDA_VISIBLE_DEVICES`` numbers it. Memory in GiB, all processes counted."""

    index: int
    name: str
    free_gb: float
    total_gb: float
    capability: str


@frozen(kw_only=True)
class GpuReport:
    """What a look at the devices showed."""

    gpus: tuple[Gpu, ...] = ()
    #: Why there are none.
    trouble: str = ""
    torch: str = ""
    cuda: str = ""
    driver: str = ""
    #: Versions of attention kernels that are installed.
    kernels: Mapping[str, str] = field(factory=dict)


def measure_gpus(environ: Mapping[str, str] = os.environ, *, timeout_seconds: float = _TIMEOUT_SECONDS) -> GpuReport:
    """What is free on each GPU now. Never raises: what went wrong is the report's ``trouble``."""
    try:
        done = subprocess.run(
            [sys.executable, "-m", __name__],
            # Without an order of its own CUDA puts the fastest device first, and so would the workers.
            env=dict(environ),
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=timeout_seconds,
            check=False,
        )
    except subprocess.TimeoutExpired:
        return GpuReport(trouble=f"the driver did not answer within {timeout_seconds:g} s; see dmesg")
    lines = done.stdout.splitlines()
    if done.returncode != 0 or not lines:
        said = done.stderr.strip().splitlines()
        return GpuReport(trouble=said[-1] if said else f"the look at it ended with {done.returncode}")
    return structure(json.loads(lines[-1]), GpuReport)


def too_few(report: GpuReport, *, asked: int, needed: int, variable: str, job_types: Iterable[str]) -> Finding | None:
    """What to say where ``needed`` GPUs cannot be seen, of the ``asked`` that the setting ``variable`` asks for."""
    if len(report.gpus) >= needed:
        return None
    reason = f" ({report.trouble})" if report.trouble else ""
    return Finding.red(
        f"{variable} is {asked} and {len(report.gpus)} can be seen{reason}",
        cure=f"give the worker {needed} GPUs (CUDA_VISIBLE_DEVICES), or lower {variable}",
        job_types=job_types,
    )


def _look() -> dict[str, Any]:
    try:
        import torch
    except ImportError as error:
        return {"trouble": f"torch cannot be imported: {error}"}
    if not torch.cuda.is_available():
        built = f"built for CUDA {torch.version.cuda}" if torch.version.cuda else "built without CUDA"
        return {"trouble": f"torch {torch.__version__} ({built}) finds none", "torch": torch.__version__}
    gpus = []
    for index in range(torch.cuda.device_count()):
        free, total = torch.cuda.mem_get_info(index)
        gpus.append(
            {
                "index": index,
                "name": torch.cuda.get_device_name(index),
                "free_gb": round(free / 2**30, 2),
                "total_gb": round(total / 2**30, 2),
                "capability": ".".join(map(str, torch.cuda.get_device_capability(index))),
            }
        )
    return {
        "gpus": gpus,
        "torch": torch.__version__,
        "cuda": torch.version.cuda or "",
        "driver": _driver(),
        "kernels": _kernels(torch.backends.cudnn.version()),
    }


def _driver() -> str:
    try:
        done = subprocess.run(
            ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"],  # noqa: S607 - where it lies differs
            capture_output=True,
            text=True,
            timeout=20,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired):
        return "unknown"
    return done.stdout.strip().splitlines()[0] if done.returncode == 0 and done.stdout.strip() else "unknown"


def _kernels(cudnn: int | None) -> dict[str, str]:
    found = {"cuDNN": str(cudnn)} if cudnn else {}
    for name, distribution in _KERNELS.items():
        try:
            found[name] = version(distribution)
        except PackageNotFoundError:
            continue
    return found


if __name__ == "__main__":
    sys.stdout.write(json.dumps(_look()) + "\n")
