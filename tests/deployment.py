"""Fresh set-ups from Redis to storage: one drained by one worker, and one whose workers come and go."""

from __future__ import annotations

import contextlib
import io
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Self

import psutil
import redis
from attrs import define, field, frozen
from PIL import Image

from ourvidz_core.delivery.embedded import EmbeddedRedis
from ourvidz_core.delivery.redis_queue import RedisQueue
from ourvidz_core.testing.servers import FileServer, ReceivedRequest, StoredObject, SupabaseServer

ROOT = Path(__file__).parent.parent
PAYLOADS = ROOT / "examples/payloads"
USER = "11111111-1111-4111-8111-111111111111"
EXAMPLE_HOST = b"https://storage.example.test"


@frozen
class Run:
    """What one fresh set-up made of its messages."""

    callbacks: Mapping[str, list[dict]]
    objects: Mapping[tuple[str, str], StoredObject]

    def all(self, name: str) -> list[dict]:
        return self.callbacks[payload(name)["id"]]

    def last(self, name: str) -> dict:
        return self.all(name)[-1]

    def stored(self, name: str) -> list[StoredObject]:
        body = self.last(name)
        return [self.objects[body["metadata"]["bucket"], asset] for asset in body["assets"]]

    def pictures(self, name: str) -> list[Image.Image]:
        return [Image.open(io.BytesIO(stored.body)) for stored in self.stored(name)]


def payload(name: str) -> dict:
    """A message of the producer, decoded."""
    return json.loads((PAYLOADS / f"{name}.json").read_text("utf-8"))


def names(pattern: str) -> list[str]:
    """The messages whose file names match ``pattern``."""
    return [path.stem for path in sorted(PAYLOADS.glob(pattern))]


def run_payloads(directory: Path, chosen: Iterable[str], queue_name: str, server: FileServer, **environ: str) -> Run:
    """Push messages onto an empty Redis, byte for byte, and drain it with one worker process."""
    embedded = EmbeddedRedis(directory / "redis")
    with SupabaseServer() as supabase, redis.Redis.from_url(embedded.address) as client:
        for name in chosen:
            # The one change: the example host does not exist, so its paths are served from here.
            raw = (PAYLOADS / f"{name}.json").read_bytes()
            client.lpush(queue_name, raw.replace(EXAMPLE_HOST, server.url.encode()))
        done = subprocess.run(
            [sys.executable, "-m", "ourvidz_core", "worker", "--queues", queue_name, "--drain"],
            env={
                **environment_without_settings(),
                "OMP_NUM_THREADS": "1",  # two threads of one small model wait for each other more than they work
                "REDIS_URL": embedded.address,
                "SUPABASE_URL": supabase.url,
                "SUPABASE_SERVICE_KEY": supabase.key,
                "OURVIDZ_REFERENCE_ALLOWED_HOSTS": server.host,
                "OURVIDZ_HEALTH_ADDRESS": "off",
                "OURVIDZ_STATE_DIR": str(directory / "state"),
                "OURVIDZ_WORK_DIR": str(directory / "work"),
                **environ,
            },
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        callbacks: dict[str, list[dict]] = {}
        for request in supabase.callbacks:
            callbacks.setdefault(request.json()["job_id"], []).append(request.json())
        depth = RedisQueue(client).depth(queue_name)
        assert (depth.waiting, depth.in_flight, depth.retrying, depth.callbacks) == (0, 0, 0, 0)
    embedded.close()
    assert not list((directory / "work").glob("worker-*")), "something was left on the disk"
    return Run(callbacks, dict(supabase.objects))


@define
class Fleet:
    """Workers on one Redis, one storage and one callback endpoint, each a process of its own."""

    environ: dict[str, str]
    queue_name: str
    queue: RedisQueue
    client: redis.Redis
    supabase: SupabaseServer
    work_dir: Path
    log: Path
    processes: list[subprocess.Popen[bytes]] = field(factory=list)

    @classmethod
    @contextlib.contextmanager
    def on(
        cls, redis_server: EmbeddedRedis, directory: Path, queue_name: str, supabase: SupabaseServer
    ) -> Iterator[Self]:
        """A fleet on an emptied Redis, impatient wherever patience is a setting; its workers end with the block."""
        with redis.Redis.from_url(redis_server.address) as client:
            client.flushall()
            fleet = cls(
                environ={
                    **environment_without_settings(),
                    "REDIS_URL": redis_server.address,
                    "SUPABASE_URL": supabase.url,
                    "SUPABASE_SERVICE_KEY": supabase.key,
                    "OURVIDZ_WORK_DIR": str(directory / "work"),
                    "OURVIDZ_STATE_DIR": str(directory / "state"),
                    "OURVIDZ_LEASE_SECONDS": "1.5",
                    "OURVIDZ_RETRY_DELAY_SECONDS": "0.05",
                    "OURVIDZ_CALLBACK_RETRY_SECONDS": "0.05",
                    "OURVIDZ_CALLBACK_MIN_AGE_SECONDS": "0",
                    "OURVIDZ_DRAIN_SECONDS": "10",
                    "OURVIDZ_HEALTH_ADDRESS": "off",
                },
                queue_name=queue_name,
                queue=RedisQueue(client),
                client=client,
                supabase=supabase,
                work_dir=directory / "work",
                log=directory / "worker.log",
            )
            try:
                yield fleet
            finally:
                for process in fleet.processes:
                    process.kill()
                    process.wait()

    def push_message(self, message: Mapping[str, object]) -> None:
        whole = {"user_id": USER, "created_at": "2025-07-19T19:00:00Z", **message}
        self.client.lpush(self.queue_name, json.dumps(whole))

    def start(self, *arguments: str, **environ: str) -> subprocess.Popen[bytes]:
        process = subprocess.Popen(
            [sys.executable, "-m", "ourvidz_core", "worker", *arguments],
            env={**self.environ, **environ},
            stderr=self.log.open("ab"),
        )
        self.processes.append(process)
        return process

    def drain(self, **environ: str) -> None:
        assert self.start("--drain", **environ).wait(timeout=60) == 0, self.log.read_text()

    def callbacks(self, job_id: str) -> list[dict]:
        bodies = [request.json() for request in self.supabase.callbacks]
        return [body for body in bodies if body["job_id"] == job_id]

    def tried_callbacks(self, status: str) -> list[ReceivedRequest]:
        tried = [request for request in self.supabase.requests if request.path.endswith("/job-callback")]
        return [request for request in tried if request.json()["status"] == status]

    def last(self, job_id: str) -> dict:
        return self.callbacks(job_id)[-1]

    def wait_for(self, condition: Callable[[], object], seconds: float = 20.0) -> None:
        deadline = time.monotonic() + seconds
        while not condition():
            assert all(process.returncode in (None, 0, -9) for process in self.processes), self.log.read_text()
            assert time.monotonic() < deadline, self.log.read_text()[-4000:]
            time.sleep(0.02)

    def engine_of(self, process: subprocess.Popen[bytes]) -> psutil.Process | None:
        with contextlib.suppress(psutil.NoSuchProcess):
            for child in psutil.Process(process.pid).children():
                with contextlib.suppress(psutil.NoSuchProcess):
                    if "ourvidz_core.engine.server" in child.cmdline():
                        return child
        return None

    def is_generating(self, process: subprocess.Popen[bytes]) -> bool:
        return bool(self.engine_of(process) and list(self.work_dir.glob("worker-*/job-*")))


def environment_without_settings() -> dict[str, str]:
    """The environment of this process without anything that is a setting of ours."""
    return {name: value for name, value in os.environ.items() if not name.startswith(("OURVIDZ_", "SUPABASE_"))}
