"""One fresh set-up from Redis to storage, for tests that push the producer's own messages."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path

import redis
from attrs import frozen
from PIL import Image

from ourvidz_core.delivery.embedded import EmbeddedRedis
from ourvidz_core.delivery.redis_queue import RedisQueue
from ourvidz_core.testing.servers import FileServer, StoredObject, SupabaseServer

ROOT = Path(__file__).parent.parent
PAYLOADS = ROOT / "examples/payloads"
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
        kept = {name: value for name, value in os.environ.items() if not name.startswith(("OURVIDZ_", "SUPABASE_"))}
        done = subprocess.run(
            [sys.executable, "-m", "ourvidz_core", "worker", "--queues", queue_name, "--drain"],
            env={
                **kept,
                "OMP_NUM_THREADS": "1",  # two threads of one small model wait for each other more than they work
                "REDIS_URL": embedded.address,
                "SUPABASE_URL": supabase.url,
                "SUPABASE_SERVICE_KEY": supabase.key,
                "OURVIDZ_REFERENCE_ALLOWED_HOSTS": server.host,
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
