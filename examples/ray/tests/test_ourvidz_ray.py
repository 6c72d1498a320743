"""Workers on a Ray cluster of two nodes do all jobs, although one node dies with the jobs that it has."""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType

import psutil
import pytest
import redis

from ourvidz_core.delivery.board import RedisBoard
from ourvidz_core.delivery.embedded import EmbeddedRedis
from ourvidz_core.delivery.redis_queue import RedisQueue
from ourvidz_core.testing.distributions import make_distribution
from ourvidz_core.testing.servers import Bucket, SupabaseServer

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]
QUEUE, TYPE, JOBS = "ray_queue", "ray_image", 60
PLUGIN = """
import time
from PIL import Image
from ourvidz_core import Artifact, Generation, JobType, hookimpl

@hookimpl
def register_job_types():
    yield JobType(name="ray_image", queue="ray_queue", content_type="image", timeout_seconds=30)

@hookimpl
def generate(job, context):
    for step in range(10):
        context.progress(step, 10)
        time.sleep(0.1)
    path = context.output_path("png")
    Image.linear_gradient("L").resize((16, 16)).save(path)
    return Generation(artifacts=(Artifact(path=path, media_type="image/png"),))
"""


def load_example() -> ModuleType:
    path = Path(__file__).parent.parent / "ourvidz_ray.py"
    specification = importlib.util.spec_from_file_location("ourvidz_ray", path)
    assert specification is not None
    assert specification.loader is not None
    module = importlib.util.module_from_spec(specification)
    sys.modules["ourvidz_ray"] = module  # the actors of a module that Ray can import are sent by name
    specification.loader.exec_module(module)
    return module


def wait_for(condition: Callable[[], object], seconds: float = 90.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.1)


def workers_here() -> list[psutil.Process]:
    """Orchestrators and workers of this test that live."""
    found = []
    for process in psutil.process_iter():
        try:
            is_ours = any(QUEUE in word for word in process.cmdline()) and "ourvidz_core" in process.cmdline()
            if is_ours and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
        except psutil.Error:
            continue
    return found


@pytest.fixture
def environ(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[SupabaseServer]:
    """What each node's environment says, with a real Redis, storage and endpoint behind it."""
    make_distribution(tmp_path / "site", "ray-test", PLUGIN)
    server = EmbeddedRedis(tmp_path / "redis")
    with SupabaseServer(buckets={TYPE: Bucket()}) as supabase:
        for name in [name for name in os.environ if name.startswith(("OURVIDZ_", "SUPABASE_"))]:
            monkeypatch.delenv(name)
        for name, value in {
            "PYTHONPATH": f"{Path(__file__).parent.parent}{os.pathsep}{tmp_path / 'site'}",
            "REDIS_URL": server.address,
            "SUPABASE_URL": supabase.url,
            "SUPABASE_SERVICE_KEY": supabase.key,
            "OURVIDZ_ALLOW_PLUGINS": "ray-test",
            "OURVIDZ_STATE_DIR": str(tmp_path / "state"),
            "OURVIDZ_WORK_DIR": str(tmp_path / "work"),
            "OURVIDZ_LEASE_SECONDS": "2",
            "OURVIDZ_DRAIN_SECONDS": "10",
            "OURVIDZ_CALLBACK_MIN_AGE_SECONDS": "0",
            "OURVIDZ_DEVICE": "cpu",
            "RAY_USAGE_STATS_ENABLED": "0",
        }.items():
            monkeypatch.setenv(name, value)
        yield supabase
    server.close()


def test_a_node_that_dies_loses_no_job_and_its_workers_go_on_elsewhere(environ: SupabaseServer) -> None:
    ray = pytest.importorskip("ray")
    from ray.cluster_utils import Cluster

    example = load_example()
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 3})
    doomed = cluster.add_node(num_cpus=3)
    ray.init(address=cluster.address, log_to_driver=False)
    try:
        # Three workers on six places, so that those of a dead node find room on the other. A CPU stands for a GPU.
        workers = example.start(3, ["--no-checks", "--queues", QUEUE], num_cpus=1)
        nodes = Counter(ray.get([worker.node.remote() for worker in workers]))
        assert len(nodes) == 2, "all workers are on one node"
        with redis.Redis.from_url(os.environ["REDIS_URL"]) as client:
            queue = RedisQueue(client)
            for number in range(JOBS):
                client.lpush(QUEUE, json.dumps({"id": f"job-{number}", "type": TYPE, "prompt": "", "user_id": "u"}))
            wait_for(lambda: queue.depth(QUEUE).in_flight >= 3)
            wait_for(lambda: queue.depth(QUEUE).waiting < JOBS * 2 // 3)

            cluster.remove_node(doomed, allow_graceful=False)

            def books() -> int:
                depth = queue.depth(QUEUE)
                return depth.waiting + depth.in_flight + depth.retrying + depth.callbacks

            wait_for(lambda: not books())
        bodies = [request.json() for request in environ.callbacks]
        ended = Counter(body["job_id"] for body in bodies if body["status"] != "processing")
        assert ended == {f"job-{number}": 1 for number in range(JOBS)}
        assert [body for body in bodies if body["status"] not in ("processing", "completed")] == []
        survivor = next(node["NodeID"] for node in ray.nodes() if node["Alive"])
        assert ray.get([worker.node.remote() for worker in workers], timeout=60) == [survivor] * 3
        with contextlib.closing(RedisBoard.connect(os.environ["REDIS_URL"])) as board:
            wait_for(lambda: len([one for one in board.workers() if psutil.pid_exists(one.pid)]) == 3)
        assert len(workers_here()) == 6  # the dead node's are gone, although nobody told them
        assert example.stop(workers, 10.0) == [0, 0, 0]
    finally:
        ray.shutdown()
        cluster.shutdown()
    wait_for(lambda: not workers_here(), 20.0)
