"""One real worker process, watched from outside while it does a job: board, pages, records and log."""

from __future__ import annotations

import io
import json
import urllib.request
from collections.abc import Iterator
from typing import Any

import pytest
from attrs import define
from PIL import Image
from prometheus_client.parser import text_string_to_metric_families

from ourvidz_core.delivery.board import FinishedJob, RedisBoard, WorkerStatus
from ourvidz_core.delivery.embedded import EmbeddedRedis
from ourvidz_core.testing.distributions import make_distribution
from ourvidz_core.testing.servers import Answer, Bucket, FileServer, SupabaseServer
from ourvidz_core.wire.states import EngineState, WorkerState
from tests import toy
from tests.deployment import USER, Fleet

QUEUE = "toy_queue"
PROMPT = "CANARY-prompt of a red fox, in deep snow"
SECRETS = {
    "SUPABASE_SERVICE_KEY": "CANARY-service-key",
    "OURVIDZ_CALLBACK_SECRET": "CANARY-callback-secret",
    "OURVIDZ_METRICS_KEY": "CANARY-metrics-key",
}


@define
class Story:
    """What was seen of one worker that completed a job and failed another."""

    during: WorkerStatus
    preview: bytes | None
    ready: dict[str, Any]
    after: WorkerStatus
    recent: list[FinishedJob]
    pages: dict[str, str]
    records: list[dict[str, Any]]
    left: list[WorkerStatus]
    log: str


@pytest.fixture(scope="module")
def story(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Story]:
    root = tmp_path_factory.mktemp("watched")
    make_distribution(root / "site", "ourvidz-toy", toy.SOURCE)
    (root / "marks").mkdir()
    server = EmbeddedRedis(root / "redis")
    board = RedisBoard.connect(server.address)
    with (
        SupabaseServer(
            key=SECRETS["SUPABASE_SERVICE_KEY"], buckets={"toy_image": Bucket(), "toy_brief": Bucket()}
        ) as supabase,
        FileServer({"/metrics": Answer()}) as endpoint,
        Fleet.on(server, root, QUEUE, supabase) as fleet,
    ):
        fleet.environ |= SECRETS | {
            "PYTHONPATH": str(root / "site"),
            "TOY_MARKS": str(root / "marks"),
            "OURVIDZ_ALLOW_PLUGINS": "ourvidz-toy",
            "OURVIDZ_HEALTH_ADDRESS": "127.0.0.1:0",
            "OURVIDZ_METRICS_URL": f"{endpoint.url}/metrics",
            "OURVIDZ_WORKER_NAME": "gpu-1",
            "OURVIDZ_LOG_FORMAT": "json",
            "OURVIDZ_LOG_LEVEL": "debug",
            "OURVIDZ_PREVIEWS": "true",
        }
        job = {"type": "toy_image", "prompt": PROMPT}
        fleet.push_message({"id": "good", **job, "config": {"what": "sleep", "seconds": 1.5, "seed": 1}})
        fleet.push_message({"id": "bad", **job, "config": {"what": "raise"}})
        process = fleet.start()
        fleet.wait_for(lambda: any(job.previewed_at for status in board.workers() for job in status.jobs))
        (during,) = board.workers()
        preview = board.preview("good")

        def page(path: str) -> str:
            with urllib.request.urlopen(f"http://{during.health_address}{path}", timeout=10) as answer:
                return answer.read().decode()

        ready = json.loads(page("/readyz"))
        fleet.wait_for(lambda: len(board.recent()) == 2 and len(endpoint.requests) == 3)
        fleet.wait_for(lambda: board.workers()[0].failed == 1 and not board.workers()[0].jobs)
        (after,) = board.workers()
        fleet.wait_for(lambda: 'delivered",status="failed"' in page("/metrics"))
        pages = {path: page(path) for path in ("/healthz", "/readyz", "/metrics")}
        process.terminate()
        assert process.wait(timeout=20) == 0
        yield Story(
            during=during,
            preview=preview,
            ready=ready,
            after=after,
            recent=board.recent(),
            pages=pages,
            records=[request.json() for request in endpoint.requests],
            left=board.workers(),
            log=fleet.log.read_text(),
        )
    board.close()
    server.close()


def test_the_board_shows_a_job_while_it_runs(story: Story) -> None:
    assert (story.during.name, story.during.state, story.during.engine) == (
        "gpu-1",
        WorkerState.WORKING,
        EngineState.READY,
    )
    running = {job.id: job for job in story.during.jobs}
    good = running["good"]
    assert (good.type, good.attempt, good.stage, good.total) == ("toy_image", 1, "sleep", 30)
    assert good.claimed_at <= good.started_at <= story.during.published_at
    assert story.ready["checks"] == {"worker": "ok", "redis": "ok", "engine": "ok", "storage": "ok"}


def test_the_board_has_a_preview_of_the_job_that_runs(story: Story) -> None:
    picture = Image.open(io.BytesIO(story.preview))
    assert (picture.format, picture.size) == ("JPEG", (256, 128))
    assert picture.getpixel((9, 9)) == pytest.approx((255, 0, 0), abs=6)
    assert [job.id for job in story.during.jobs if job.previewed_at] == ["good"]


def test_the_board_remembers_what_ended_and_forgets_the_worker_that_left(story: Story) -> None:
    bad, good = sorted(story.recent, key=lambda record: record.id)
    assert (good.id, good.status.value, good.worker) == ("good", "completed", "gpu-1")
    assert (good.assets[0].bucket, good.assets[0].path) == ("toy_image", f"{USER}/good_0.png")
    assert 1.5 <= good.seconds["generate"] <= good.seconds["total"]
    assert (bad.id, bad.error_type, bad.assets) == ("bad", "RuntimeError", ())
    assert (story.after.completed, story.after.failed, story.after.jobs) == (1, 1, ())
    assert story.left == []


def test_the_metrics_agree_with_what_happened(story: Story) -> None:
    values = {
        (sample.name, *(value for _, value in sorted(sample.labels.items()))): sample.value
        for family in text_string_to_metric_families(story.pages["/metrics"])
        for sample in family.samples
    }
    assert values["ourvidz_jobs_total", "toy_image", "completed"] == 1
    assert values["ourvidz_jobs_total", "toy_image", "failed"] == 1
    assert values["ourvidz_job_errors_total", "other", "toy_image"] == 1
    assert values["ourvidz_callbacks_total", "delivered", "completed"] == 1
    assert values["ourvidz_engine_busy_seconds_total",] >= 1.5
    assert values["ourvidz_queue_up",] == 1
    assert json.loads(story.pages["/healthz"])["status"] == "ok"


def test_the_endpoint_of_usage_got_a_record_of_each_job_and_one_of_the_completed(story: Story) -> None:
    completions = [record for record in story.records if "job_id" in record]
    outcomes = [(record["worker_id"], record["success"]) for record in story.records if "worker_id" in record]
    assert [(record["job_id"], record["assets_generated"]) for record in completions] == [("good", 1)]
    assert sorted(outcomes) == [("gpu-1", False), ("gpu-1", True)]


def test_every_line_of_the_log_is_an_object_and_those_of_jobs_name_them(story: Story) -> None:
    lines = [json.loads(line) for line in story.log.splitlines()]
    told = {(line.get("event"), line["job_id"], line["job_type"]) for line in lines}
    for job_id, names in {"good": ("JobStarted", "JobCompleted", "CallbackDelivered"), "bad": ("JobFailed",)}.items():
        assert {(name, job_id, "toy_image") for name in names} <= told


def test_what_a_plugin_prints_is_in_the_log_with_the_job_that_it_worked_on(story: Story) -> None:
    lines = [json.loads(line) for line in story.log.splitlines()]
    printed = [line["job_id"] for line in lines if line["message"].endswith("a plugin prints to standard output")]
    assert printed == ["good", "bad"]


def test_nothing_that_can_be_read_holds_a_secret_or_a_prompt(story: Story) -> None:
    for seen in (story.log, str(story.pages), str(story.recent), str(story.during), str(story.records)):
        assert "CANARY" not in seen
        assert "deep snow" not in seen
