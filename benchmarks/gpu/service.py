"""Rows of a whole worker: Redis, the worker's process and its engine's, storage and callbacks over HTTP.

How busy the GPU is comes from NVML: the share of time in which a kernel ran, by samples that the driver takes;
and beside it the worker's own account of how long jobs had the device.
On a processor it is the engine's processor time, so that the small run has a figure, too.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import re
import socket
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator, Mapping
from datetime import datetime
from pathlib import Path
from typing import Any, Self

import psutil
import redis
from attrs import define, field, frozen
from prometheus_client.parser import text_string_to_metric_families

from benchmarks.gpu.models import Models, payload
from benchmarks.gpu.report import gpu_handles, gpus
from benchmarks.gpu.rows import Measured, Scale, Skipped
from ourvidz_core.delivery.embedded import EmbeddedRedis
from ourvidz_core.observe.catalog import BUSY
from ourvidz_core.testing.servers import SupabaseServer

SAMPLE_SECONDS = 0.02
#: How many images users ask for, and how often.
COUNTS, SHARES = (1, 3, 6), (6, 3, 1)
START_SECONDS = 300.0
#: Steps of a video that only warms up.
WARM_STEPS = 2
#: A line of a worker's log: when, and what it says.
_LINE = re.compile(r"^(\d{4}-\d\d-\d\d \d\d:\d\d:\d\d,\d{3}) [A-Z]+ \S+: (.*)$", re.MULTILINE)
#: Settings of this shell that a worker gets; others could lead it to somebody's storage.
OF_SPEED = ("OURVIDZ_COMPILE", "OURVIDZ_KERNELS_DIR", "OURVIDZ_VRAM_BUDGET_GB")


class Service:
    """The SDXL rows: the start of a worker, and a mixture of jobs. The second start's worker does the jobs."""

    def __init__(self, scale: Scale, models: Models, out: Path) -> None:
        self._scale = scale
        self._environ = {"OURVIDZ_SDXL_MODEL": str(models.sdxl()), "OURVIDZ_SDXL_UNKNOWN_VARIANT": "default"}
        self._out = out
        self._open = contextlib.ExitStack()
        self._worker: RunningWorker | None = None

    def measure(self, row: str) -> Measured:
        """The row of this name."""
        return self._start() if row == "start" else self._mixed()

    def close(self) -> None:
        """End what still runs."""
        self._open.close()

    def _start(self) -> Measured:
        # The first compiles for all numbers of images and fills the caches on disk.
        with self._opened() as (_, cold):
            pass
        worker, warm = self._open.enter_context(self._opened())
        self._worker = worker
        facts = {"cold_seconds": cold, "timeline": worker.timeline(worker.ended() - warm)}
        return Measured(ours=warm, peak=_used_gib(), facts=facts)

    @contextlib.contextmanager
    def _opened(self) -> Iterator[tuple[RunningWorker, float]]:
        """A worker that had one job waiting, and the seconds to its image."""
        with RunningWorker.opened(self._out / "service", self._scale, "sdxl_queue", self._environ) as worker:
            started = time.time()
            worker.push("sdxl_image_high", config={"num_images": 1, "num_inference_steps": self._scale.steps})
            worker.start("--preload")
            worker.wait_for(1, START_SECONDS)
            yield worker, worker.ended() - started

    def _mixed(self) -> Measured:
        if self._worker is None:
            self._worker, _ = self._open.enter_context(self._opened())
        worker, chance = self._worker, random.Random(7)
        counts = [min(count, self._scale.images) for count in COUNTS]
        for count in counts:
            worker.push("sdxl_image_fast", config={"num_images": count})
        before = 1 + len(counts)
        worker.wait_for(before, START_SECONDS)
        held = worker.held_seconds()
        with Sampler(worker.engine_seconds) as sampler:
            images = 0
            for _ in range(self._scale.jobs):
                (count,) = chance.choices(counts, SHARES)
                images += count
                worker.push(chance.choice(["sdxl_image_fast", "sdxl_image_high"]), config={"num_images": count})
            worker.wait_for(before + self._scale.jobs, 150.0)
        began, ended = worker.began(before), worker.ended()
        held = worker.held_seconds() - held
        return Measured(
            ours=100 * sampler.busy(began, ended),
            peak=sampler.peak_gib,
            facts={
                "measured_by": sampler.source,
                "held_by_jobs_percent": 100 * held / (ended - began),
                "jobs": self._scale.jobs,
                "images": images,
                "wall_seconds": ended - began,
            },
        )


@frozen(kw_only=True)
class _SharedJob:
    """A job that several GPUs can do together, and the shorter one that warms a worker up for it."""

    job_type: str
    queue: str
    environ: Mapping[str, str]
    #: The setting that says how many GPUs.
    setting: str
    config: Mapping[str, int]
    warm_config: Mapping[str, int]
    options: tuple[str, ...] = ()
    repeats: int = 1


def shared_video(scale: Scale, models: Models, out: Path) -> SeveralGpus:
    """One video on several GPUs."""
    job = _SharedJob(
        job_type="video_fast",
        queue="wan_queue",
        environ={"OURVIDZ_WAN_CKPT_DIR": str(models.wan())},
        setting="OURVIDZ_WAN_GPUS",
        config={"sample_steps": scale.steps, "frame_num": scale.frames},
        warm_config={"sample_steps": WARM_STEPS, "frame_num": scale.frames},
    )
    return SeveralGpus(job, scale, out)


def shared_images(scale: Scale, models: Models, out: Path) -> SeveralGpus:
    """The images of one job on several GPUs."""
    job = _SharedJob(
        job_type="sdxl_image_high",
        queue="sdxl_queue",
        environ={"OURVIDZ_SDXL_MODEL": str(models.sdxl()), "OURVIDZ_SDXL_UNKNOWN_VARIANT": "default"},
        setting="OURVIDZ_SDXL_GPUS",
        config={"num_images": scale.images, "num_inference_steps": scale.steps},
        warm_config={"num_images": 1, "num_inference_steps": WARM_STEPS},
        options=("--preload",),
        repeats=scale.repeats,
    )
    return SeveralGpus(job, scale, out)


class SeveralGpus:
    """The same job on one GPU and on several, each by a worker of its own that has warmed up."""

    def __init__(self, job: _SharedJob, scale: Scale, out: Path) -> None:
        self._job = job
        self._scale = scale
        # Where the rows of one worker have compiled already.
        self._directory = out / "service"
        self._alone: tuple[float, float, float] | None = None

    def measure(self, row: str) -> Measured:
        """How many times as fast."""
        count = _wanted_gpus(row, self._scale)
        if self._alone is None:
            self._alone = self._seconds(1)
        together = self._seconds(count)
        names = ("seconds", "generation_seconds", "start_seconds")
        facts = {
            f"{who}_{name}": value
            for who, values in (("alone", self._alone), ("together", together))
            for name, value in zip(names, values, strict=True)
        }
        return Measured(ours=self._alone[0] / together[0], facts=facts)

    def _seconds(self, count: int) -> tuple[float, float, float]:
        """The fastest warm job, from its start to its end; what of that was generation; and the worker's start."""
        job = self._job
        environ = {**job.environ, job.setting: str(count)}
        with RunningWorker.opened(self._directory, self._scale, job.queue, environ) as worker:
            began = time.time()
            worker.push(job.job_type, config=dict(job.warm_config))
            worker.start(*job.options)
            worker.wait_for(1, START_SECONDS)
            started = worker.ended() - began
            taken = []
            for done in range(1, job.repeats + 1):
                worker.push(job.job_type, config=dict(job.config))
                worker.wait_for(done + 1, START_SECONDS)
                taken.append((worker.ended() - worker.began(done), float(worker.facts()["generation_time"])))
            worker.check_gpus(count)
            return *min(taken), started


def _wanted_gpus(row: str, scale: Scale) -> int:
    """How many GPUs a row is about.

    :raises Skipped: there are not so many.
    """
    count = int(row.rpartition("gpus")[2])
    if not scale.is_small and len(gpus()) < count:
        raise Skipped(f"this machine has {len(gpus())} GPUs")
    return count


@define(kw_only=True)
class RunningWorker:
    """A worker process with all that it talks to."""

    queue: str
    client: redis.Redis
    supabase: SupabaseServer
    environ: dict[str, str]
    log: Path
    process: subprocess.Popen[bytes] | None = None
    _pushed: int = field(default=0, init=False)

    @classmethod
    @contextlib.contextmanager
    def opened(cls, directory: Path, scale: Scale, queue: str, environ: dict[str, str]) -> Iterator[Self]:
        """Redis and storage for a worker whose caches are in ``directory``; nothing runs after the block."""
        directory.mkdir(parents=True, exist_ok=True)
        with SupabaseServer() as supabase, tempfile.TemporaryDirectory(prefix="ourvidz-gpu-") as name:
            server = EmbeddedRedis(Path(name))
            client = redis.Redis.from_url(server.address)
            ours = ("OURVIDZ_", "SUPABASE_", "REDIS_", "UPSTASH_")
            kept = {key: value for key, value in os.environ.items() if not key.startswith(ours)}
            if kept.pop("PYTHONDONTWRITEBYTECODE", None):
                # An installed worker has its bytecode; to compile libraries again would be half of its start.
                kept["PYTHONPYCACHEPREFIX"] = str(directory / "bytecode")
            chosen = {key: value for key, value in os.environ.items() if key in OF_SPEED}
            worker = cls(
                queue=queue,
                client=client,
                supabase=supabase,
                log=directory / "worker.log",
                environ={
                    **kept,
                    **chosen,
                    "REDIS_URL": server.address,
                    "SUPABASE_URL": supabase.url,
                    "SUPABASE_SERVICE_KEY": supabase.key,
                    "OURVIDZ_STATE_DIR": str(directory / "state"),
                    "OURVIDZ_WORK_DIR": str(directory / "work"),
                    "OURVIDZ_DEVICE": scale.device,
                    "OURVIDZ_HEALTH_ADDRESS": f"127.0.0.1:{_free_port()}",
                    **environ,
                },
            )
            try:
                yield worker
            finally:
                worker.stop()
                client.close()
                server.close()

    def start(self, *options: str) -> None:
        """Start the process with these options of ``ourvidz worker``."""
        with self.log.open("wb") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "ourvidz_core", "worker", f"--queues={self.queue}", "--no-checks", *options],
                env=self.environ,
                stdout=log,
                stderr=log,
            )

    def stop(self) -> None:
        """End the process and its engine."""
        if self.process is None:
            return
        with contextlib.suppress(psutil.NoSuchProcess):
            children = psutil.Process(self.process.pid).children(recursive=True)
            self.process.terminate()
            try:
                self.process.wait(15)
            except subprocess.TimeoutExpired:
                self.process.kill()
                self.process.wait()
            for child in children:
                with contextlib.suppress(psutil.NoSuchProcess):
                    child.kill()

    def push(self, job_type: str, *, config: dict[str, Any]) -> None:
        """Queue a job with a prompt of its own."""
        self._pushed += 1
        prompt = f"a lighthouse on a rocky coast, wave number {self._pushed}"
        message = payload(job_type, id=f"job-{self._pushed}", prompt=prompt, config={**config, "seed": self._pushed})
        self.client.lpush(self.queue, json.dumps(message))

    def wait_for(self, count: int, seconds: float) -> None:
        """Until ``count`` jobs have ended.

        :raises RuntimeError: one failed, the worker ended or it takes too long; with the end of the log.
        """
        deadline = time.monotonic() + seconds
        while len(self.outcomes()) < count:
            assert self.process is not None
            if self.process.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError(f"{len(self.outcomes())} of {count} jobs ended; the log ends: {self._log_end()}")
            time.sleep(0.05)
        failed = [body for body, _ in self.outcomes().values() if body["status"] != "completed"]
        if failed:
            raise RuntimeError(f"a job failed: {json.dumps(failed[0])[:600]}")

    def outcomes(self) -> dict[str, tuple[dict[str, Any], float]]:
        """What was said last of each job that ended, and when."""
        return {body["job_id"]: (body, at) for body, at in self._callbacks() if body["status"] != "processing"}

    def facts(self) -> dict[str, Any]:
        """What the callback says of the job that ended last."""
        body, _ = max(self.outcomes().values(), key=lambda outcome: outcome[1])
        return dict(body["metadata"])

    def check_gpus(self, count: int) -> None:
        """See that the last job used ``count`` GPUs.

        :raises RuntimeError: it did not.
        """
        used = self.facts().get("gpus", 1)
        if used != count:
            raise RuntimeError(f"the job used {used} GPUs and not {count}")

    def began(self, skipped: int) -> float:
        """When the first job after ``skipped`` others began, in seconds since the epoch."""
        began: dict[str, float] = {
            body["job_id"]: at for body, at in reversed(self._callbacks()) if body["status"] == "processing"
        }
        return sorted(began.values())[skipped]

    def ended(self) -> float:
        """When the last job's end was reported."""
        return max(at for _, at in self.outcomes().values())

    def held_seconds(self) -> float:
        """How long jobs have had the device so far, by the worker's own account."""
        with urllib.request.urlopen(f"http://{self.environ['OURVIDZ_HEALTH_ADDRESS']}/metrics", timeout=5) as answer:
            page = answer.read().decode()
        samples = [sample for family in text_string_to_metric_families(page) for sample in family.samples]
        return next(sample.value for sample in samples if sample.name.startswith(BUSY.name))

    def timeline(self, began: float) -> list[tuple[float, str]]:
        """What the worker logged and what storage and callbacks heard, each with its seconds after ``began``."""
        said = [(datetime.fromisoformat(at).timestamp(), text) for at, text in _LINE.findall(self._log_text())]
        heard = [(one.received_at, f"{one.method} {one.path}") for one in list(self.supabase.requests)]
        return [(at - began, text) for at, text in sorted(said + heard) if at <= self.ended()]

    def engine_seconds(self) -> float:
        """Processor time of the engine so far."""
        total = 0.0
        with contextlib.suppress(psutil.Error):
            for child in psutil.Process(self.process.pid if self.process else None).children(recursive=True):
                times = child.cpu_times()
                total += times.user + times.system
        return total

    def _callbacks(self) -> list[tuple[dict[str, Any], float]]:
        return [(request.json(), request.received_at) for request in list(self.supabase.callbacks)]

    def _log_end(self) -> str:
        return self._log_text()[-1500:]

    def _log_text(self) -> str:
        return self.log.read_text("utf-8", "replace") if self.log.exists() else ""


class Sampler:
    """Looks at the first GPU while a block runs, or at the processor where there is none."""

    def __init__(self, processor_seconds: Callable[[], float]) -> None:
        self._processor_seconds = processor_seconds
        #: When, and what share of the last moments was busy; without a GPU: the processor time so far.
        self._samples: list[tuple[float, float]] = []
        self._is_over = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="sampler")
        self._device: Any = None
        self.peak_gib: float | None = None

    @property
    def source(self) -> str:
        """Where the figure comes from."""
        return "NVML utilisation" if self._device is not None else "the engine's processor time"

    def busy(self, began: float, ended: float) -> float:
        """The share of the time between two moments, in seconds since the epoch."""
        within = [(at, value) for at, value in self._samples if began <= at <= ended]
        if len(within) < 2:
            raise RuntimeError("too few samples; the jobs ended at once")
        if self._device is None:
            return (within[-1][1] - within[0][1]) / (within[-1][0] - within[0][0])
        return sum(value for _, value in within) / len(within)

    def __enter__(self) -> Self:
        self._device = _first_gpu()
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._is_over.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._is_over.wait(SAMPLE_SECONDS):
            if self._device is None:
                self._samples.append((time.time(), self._processor_seconds()))
                continue
            import pynvml

            busy = pynvml.nvmlDeviceGetUtilizationRates(self._device).gpu
            self._samples.append((time.time(), busy / 100))
            self.peak_gib = max(self.peak_gib or 0.0, _used_gib() or 0.0)


def _free_port() -> int:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        return int(taken.getsockname()[1])


def _first_gpu() -> Any:
    return next(iter(gpu_handles()), None)


def _used_gib() -> float | None:
    """Memory in use on the first GPU, by whomever."""
    import pynvml

    device = _first_gpu()
    return None if device is None else float(pynvml.nvmlDeviceGetMemoryInfo(device).used / 2**30)
