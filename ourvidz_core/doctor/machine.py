"""What the doctor sees of this machine: its disks and its GPUs."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

from ourvidz_core.doctor.gpus import GpuReport, measure_gpus
from ourvidz_core.settings import Settings
from ourvidz_core.wire.findings import Check, Finding
from ourvidz_core.wire.job_types import JobType

#: Below this multiple of what stops a worker, somebody should know.
_SOON = 4.0


def disk_check(settings: Settings) -> Check:
    """Room where jobs work, where outcomes wait and where assets lie."""
    places = {
        "OURVIDZ_WORK_DIR": settings.work_dir,
        "OURVIDZ_STATE_DIR": settings.state_dir,
        **({"OURVIDZ_STORAGE_DIR": settings.storage_dir} if settings.storage_dir is not None else {}),
    }
    return Check(name="disk", run=lambda: _look_at_disks(places, settings.min_free_disk_mb))


def _look_at_disks(places: Mapping[str, Path], least_mb: float) -> Iterator[Finding]:
    for variable, path in places.items():
        there = next(parent for parent in (path, *path.absolute().parents) if parent.exists())
        free_mb = shutil.disk_usage(there).free / 1e6
        said = f"{free_mb:,.0f} MB are free in {path}"
        if free_mb < least_mb:
            yield Finding.red(
                f"{said}, and workers take no jobs below {least_mb:,.0f} MB",
                cure=f"free some space, put {variable} on another disk, or lower OURVIDZ_MIN_FREE_DISK_MB",
            )
        elif free_mb < _SOON * least_mb:
            yield Finding.yellow(
                f"{said}; below {least_mb:,.0f} MB workers take no jobs",
                cure=f"free some space, or put {variable} on another disk",
            )
        else:
            yield Finding.green(said)


def gpu_check(
    settings: Settings, job_types: Sequence[JobType], measure: Callable[[], GpuReport] = measure_gpus
) -> Check:
    """The devices that jobs would run on. ``measure`` looks at them, in a process of its own."""
    return Check(name="gpu", run=lambda: _look_at_gpus(settings.device, job_types, measure), timeout_seconds=90.0)


def _look_at_gpus(device: str, job_types: Sequence[JobType], measure: Callable[[], GpuReport]) -> Iterator[Finding]:
    if device == "cpu":
        yield Finding.green("OURVIDZ_DEVICE is cpu: no device is asked for")
        return
    report = measure()
    wanted = [job_type.name for job_type in job_types if job_type.vram_gb > 0]
    if not report.gpus:
        if device.startswith("cuda"):
            yield Finding.red(
                f"OURVIDZ_DEVICE is {device} and there is no CUDA device: {report.trouble}",
                cure="see that nvidia-smi lists the GPU here (containers: --gpus all), and that torch was built for it",
                job_types=wanted,
            )
        else:
            yield Finding.yellow(
                f"there is no CUDA device ({report.trouble}); jobs run on the CPU, which only small models bear",
                cure="run on a machine with a GPU, or set OURVIDZ_DEVICE=cpu where that is meant",
            )
        return
    yield Finding.green(f"driver {report.driver}, CUDA {report.cuda}, torch {report.torch}")
    largest = max(job_types, key=lambda job_type: job_type.vram_gb, default=None)
    for gpu in report.gpus:
        said = (
            f"GPU {gpu.index}: {gpu.name}, compute capability {gpu.capability}, {gpu.free_gb:.1f} of {gpu.total_gb:.1f}"
            " GiB free"
        )
        if largest is not None and gpu.total_gb < largest.vram_gb:
            yield Finding.yellow(
                f"{said}; {largest.name} needs {largest.vram_gb:g} GiB",
                cure="use a larger GPU for it, or what its plugin offers for small ones (OURVIDZ_WAN_OFFLOAD_MODEL)",
            )
        elif largest is not None and gpu.free_gb < largest.vram_gb:
            yield Finding.yellow(
                f"{said}; {largest.name} needs {largest.vram_gb:g} GiB, and other processes hold the rest",
                cure="see with nvidia-smi who holds it; workers that share a GPU belong under one ourvidz up",
            )
        else:
            yield Finding.green(said)
    there = ", ".join(f"{name} {version}".strip() for name, version in report.kernels.items()) or "none"
    yield Finding.green(f"attention kernels: {there}")
