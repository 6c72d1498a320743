"""A worker with --preload has its models warm before it takes its first job, and serves whatever fails to warm."""

from __future__ import annotations

import re
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from ourvidz_core.delivery.board import RedisBoard
from ourvidz_core.delivery.embedded import EmbeddedRedis
from ourvidz_core.testing.distributions import make_distribution
from ourvidz_core.testing.servers import Bucket, SupabaseServer
from ourvidz_core.wire.states import EngineState, WorkerState
from tests.deployment import Fleet

QUEUE = "acme_queue"
#: A model that takes until somebody lets it, and a plugin whose model is broken.
PLUGIN = """
import logging, os, time
from ourvidz_core import Artifact, Generation, JobType, hookimpl

@hookimpl
def register_job_types():
    yield JobType(name="{name}", queue="acme_queue", content_type="image", timeout_seconds=30)
    yield JobType(name="{name}_elsewhere", queue="other_queue", content_type="image")

def load():
    if "{name}" == "acme_broken":
        raise RuntimeError("the acme is broken")
    logging.getLogger("acme").info("reading the acme's weights")
    while not os.path.exists(os.environ["ACME_GO"]):
        time.sleep(0.01)
    return {{"loaded_for": "a job"}}

@hookimpl
def warm_up(context, job_types):
    assert [job_type.name for job_type in job_types] == ["{name}"], job_types
    assert context.work_dir.is_dir()
    context.progress(1, 1)
    context.models.get("{name}", load)["loaded_for"] = "nobody yet"

@hookimpl
def generate(job, context):
    from PIL import Image
    facts = {{"loaded_for": context.models.get("{name}", lambda: {{"loaded_for": "a job"}})["loaded_for"]}}
    path = context.output_path("png")
    Image.linear_gradient("L").save(path)
    return Generation(artifacts=(Artifact(path=path, media_type="image/png"),), facts=facts)
"""


@pytest.fixture
def fleet(tmp_path: Path) -> Iterator[Fleet]:
    for name in ("acme_broken", "acme_warm"):
        make_distribution(tmp_path / "site", name.replace("_", "-"), PLUGIN.format(name=name))
    server = EmbeddedRedis(tmp_path / "redis")
    buckets = {"acme_broken": Bucket(), "acme_warm": Bucket()}
    with SupabaseServer(buckets=buckets) as supabase, Fleet.on(server, tmp_path, QUEUE, supabase) as fleet:
        fleet.environ |= {
            "PYTHONPATH": str(tmp_path / "site"),
            "OURVIDZ_ALLOW_PLUGINS": "acme-broken,acme-warm",
            "OURVIDZ_LOG_LEVEL": "info",
            "ACME_GO": str(tmp_path / "go"),
        }
        yield fleet
    server.close()


def test_the_first_job_finds_its_model_loaded_and_a_broken_one_stops_nothing(fleet: Fleet, tmp_path: Path) -> None:
    board = RedisBoard(fleet.client)
    for name in ("acme_warm", "acme_broken"):
        fleet.push_message({"id": f"job-{name}", "type": name, "prompt": ""})
    worker = fleet.start("--queues", QUEUE, "--preload", "--drain")

    fleet.wait_for(lambda: [status.engine for status in board.workers()] == [EngineState.WARMING])
    assert [status.state for status in board.workers()] == [WorkerState.STARTING]
    fleet.wait_for(lambda: [status.engine_doing for status in board.workers()] == ["reading the acme's weights"])
    assert fleet.queue.depth(QUEUE).waiting == 2  # for whoever is ready sooner
    (tmp_path / "go").touch()

    assert worker.wait(timeout=60) == 0, fleet.log.read_text()
    assert fleet.last("job-acme_warm")["metadata"]["loaded_for"] == "nobody yet"
    assert fleet.last("job-acme_broken")["metadata"]["loaded_for"] == "a job"
    log = fleet.log.read_text()
    assert "acme-warm makes ready what acme_warm need" in log
    assert re.search(r"acme-warm, \d+\.\d\d s: reading the acme's weights", log)
    assert "acme-warm is warm after" in log
    assert "acme-broken could not make ready what acme_broken need" in log
    assert "RuntimeError: the acme is broken" in log
    assert log.index("acme-warm is warm after") < log.index("takes jobs from")


def test_a_worker_that_is_stopped_while_it_warms_ends_with_its_engine(fleet: Fleet) -> None:
    worker = fleet.start("--queues", QUEUE, OURVIDZ_PRELOAD="true")
    fleet.wait_for(lambda: fleet.log.exists() and "acme-warm makes ready" in fleet.log.read_text())
    fleet.wait_for(lambda: fleet.engine_of(worker))
    engine = fleet.engine_of(worker)

    worker.send_signal(signal.SIGTERM)

    assert worker.wait(timeout=20) == 0, fleet.log.read_text()
    assert not engine.is_running()
