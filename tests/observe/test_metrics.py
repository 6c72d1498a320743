"""Metrics: what an operator asks of a worker, counted from its events and read from its queues."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Sequence
from datetime import UTC, datetime, timedelta

import pytest
from prometheus_client.parser import text_string_to_metric_families

from ourvidz_core.delivery.board import DeviceMemory, WorkerStatus
from ourvidz_core.delivery.memory_queue import MemoryQueue
from ourvidz_core.delivery.queue import DeadLetter, QueuedCallback, QueueDepth
from ourvidz_core.errors import QueueUnavailable
from ourvidz_core.observe.catalog import SPECS
from ourvidz_core.observe.collectors import QueueCollector, StateCollector
from ourvidz_core.observe.metrics import Metrics
from ourvidz_core.wire import events
from ourvidz_core.wire.states import EngineState, WorkerState

JOB = {"job_id": "job-1", "job_type": "acme"}
WALK = (
    events.JobStarted(**JOB, attempt=1, queue="acme_queue", waited_seconds=12.0, claim_seconds=0.2),
    events.ReferencesFetched(**JOB, roles=("single",), seconds=1.0),
    events.GenerationStarted(**JOB, waited_seconds=3.0),
    events.GenerationProgressed(**JOB, stage="denoise", step=1, total=2),
    events.GenerationFinished(**JOB, artifacts=2, seconds=30.0, expected_seconds=20.0),
    events.AssetStored(**JOB, bucket="b", path="u/a_0.png", size_bytes=100, media_type="image/png", seconds=0.5),
    events.AssetStored(**JOB, bucket="b", path="u/a_1.png", size_bytes=50, media_type="image/png", seconds=0.5),
    events.JobCompleted(**JOB, assets=2, seconds=36.0),
    events.CallbackRefused(**JOB, status="completed", reason="500", seconds=0.1, is_given_up=False),
    events.CallbackDelivered(**JOB, status="completed", refusals=1, seconds=0.1),
)


def samples(metrics: Metrics) -> dict[tuple[str, ...], float]:
    """What the page says, by name and label values."""
    text = metrics.page("")[0].decode()
    return {
        (sample.name, *(value for _, value in sorted(sample.labels.items()))): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


def test_a_job_is_counted_with_its_stages() -> None:
    metrics = Metrics(["acme"])
    for event in WALK:
        metrics(event=event)
    seen = samples(metrics)
    assert seen["ourvidz_jobs_total", "acme", "completed"] == 1
    for stage, count, seconds in [
        ("claim", 1, 0.2),
        ("references", 1, 1.0),
        ("waiting", 1, 3.0),
        ("generate", 1, 30.0),
        ("store", 2, 1.0),
        ("total", 1, 36.0),
    ]:
        assert seen["ourvidz_stage_seconds_count", "acme", stage] == count
        assert seen["ourvidz_stage_seconds_sum", "acme", stage] == pytest.approx(seconds)
    assert seen["ourvidz_generation_ratio_sum", "acme"] == 1.5
    assert seen["ourvidz_job_wait_seconds_sum", "acme"] == 12.0
    assert (seen["ourvidz_assets_total", "acme"], seen["ourvidz_asset_bytes_total", "acme"]) == (2, 150)
    assert seen["ourvidz_callbacks_total", "refused", "completed"] == 1
    assert seen["ourvidz_callbacks_total", "delivered", "completed"] == 1


def test_failures_retries_and_dead_letters_are_counted() -> None:
    metrics = Metrics(["acme"])
    failure = {"error_type": "JobTimeout", "message": "too slow"}
    metrics(event=events.JobRetried(**JOB, **failure, attempt=1, delay_seconds=1.0))
    metrics(event=events.JobFailed(**JOB, **failure, attempt=2, is_dead_letter=True))
    metrics(event=events.JobReleased(**JOB, reason="handed back"))
    metrics(event=events.CallbackRefused(**JOB, status="failed", reason="404", seconds=0.1, is_given_up=True))
    seen = samples(metrics)
    assert seen["ourvidz_job_retries_total", "acme"] == 1
    assert seen["ourvidz_job_errors_total", "JobTimeout", "acme"] == 2
    assert seen["ourvidz_jobs_total", "acme", "failed"] == 1
    assert seen["ourvidz_jobs_total", "acme", "released"] == 1
    assert seen["ourvidz_dead_letters_total",] == 1
    assert seen["ourvidz_callbacks_total", "given_up", "failed"] == 1


def test_no_message_makes_a_label_of_its_own() -> None:
    metrics = Metrics(["acme"])

    def tell(number: int) -> None:
        job = {"job_id": f"id-{number}", "job_type": f"CANARY-type-{number}"}
        metrics(event=events.JobStarted(**job, attempt=1, queue=f"CANARY-{number}", claim_seconds=0))
        metrics(event=events.JobFailed(**job, error_type=f"CANARY{number}", message=f"CANARY {number}"))
        metrics(event=events.JobRetried(**job, error_type="", message="", attempt=1, delay_seconds=1))
        metrics(event=events.CallbackDelivered(**job, status=f"CANARY{number}", refusals=0, seconds=0))

    tell(0)
    known = set(samples(metrics))
    for number in range(1, 30):
        tell(number)
    assert set(samples(metrics)) == known
    assert "CANARY" not in str(known)
    assert "id-" not in str(known)
    assert samples(metrics)["ourvidz_jobs_total", "other", "failed"] == 30


# -- what is read when somebody asks


def status(**changes: object) -> WorkerStatus:
    known = {"name": "w", "host": "h", "pid": 1, "version": "1", "queues": (), "started_at": 0.0}
    return WorkerStatus(**{**known, "state": WorkerState.WORKING, "engine": EngineState.READY, **changes})


def with_states(metrics: Metrics, found: WorkerStatus) -> dict[tuple[str, ...], float]:
    collector = StateCollector(
        lambda: found, is_ready=lambda: True, busy_seconds=lambda: 7.5, dropped_records=lambda: 2
    )
    metrics.add(collector)
    return samples(metrics)


def test_the_page_says_what_worker_engine_and_device_are_doing() -> None:
    seen = with_states(Metrics([]), status(device=DeviceMemory(used_gb=1.0, total_gb=48.0)))
    assert (seen["ourvidz_worker_state", "working"], seen["ourvidz_worker_state", "draining"]) == (1, 0)
    assert (seen["ourvidz_engine_state", "ready"], seen["ourvidz_engine_state", "failed"]) == (1, 0)
    assert seen["ourvidz_device_memory_used_bytes",] == 2**30
    assert seen["ourvidz_device_memory_bytes",] == 48 * 2**30
    assert (seen["ourvidz_engine_busy_seconds_total",], seen["ourvidz_usage_records_dropped_total",]) == (7.5, 2)
    assert seen["ourvidz_worker_ready",] == 1


def test_without_a_device_there_are_no_numbers_of_one() -> None:
    assert not [name for name, *_ in with_states(Metrics([]), status()) if "device" in name]


QUEUE = "acme_queue"


@pytest.fixture
def queue() -> MemoryQueue:
    return MemoryQueue()


def test_the_page_says_what_the_queues_hold_and_how_old_it_is(queue: MemoryQueue) -> None:
    long_ago = (datetime.now(UTC) - timedelta(seconds=100)).isoformat()
    for job_id in ("taken", "dead", "old", "new"):
        queue.push(QUEUE, json.dumps({"id": job_id, "created_at": long_ago}).encode())
    queue.claim((QUEUE,), worker="w", lease=60)
    dead = queue.claim((QUEUE,), worker="w", lease=60)
    letter = DeadLetter(raw=dead.raw, job_id="dead", error_type="E", reason="", buried_at="", worker="w")
    row = QueuedCallback(queue=QUEUE, callback_id="c", job_id="dead", body=b"{}", first_tried_at=time.time() - 50)
    queue.finish(dead, is_final=True, callback=row, dead_letter=letter)
    collector = QueueCollector(queue, [QUEUE, "empty_queue"])
    metrics = Metrics([])
    metrics.add(collector)
    seen = samples(metrics)
    states = ("waiting", "in_flight", "retrying", "dead")
    assert [seen["ourvidz_queue_jobs", QUEUE, state] for state in states] == [2, 1, 0, 1]
    assert seen["ourvidz_outbox_callbacks", QUEUE, "waiting"] == 1
    assert 100 <= seen["ourvidz_queue_oldest_seconds", QUEUE] < 130
    assert 50 <= seen["ourvidz_outbox_oldest_seconds", QUEUE] < 80
    assert seen["ourvidz_lease_overdue_seconds", QUEUE] == 0
    assert seen["ourvidz_queue_oldest_seconds", "empty_queue"] == 0
    assert seen["ourvidz_queue_up",] == 1


def test_the_lease_of_a_silent_worker_is_seen_to_be_overdue() -> None:
    now = [1000.0]
    queue = MemoryQueue(clock=lambda: now[0])
    queue.push(QUEUE, b'{"id": "a"}')
    queue.claim((QUEUE,), worker="w", lease=60)
    now[0] += 200
    collector = QueueCollector(queue, [QUEUE])
    metrics = Metrics([])
    metrics.add(collector)
    seen = samples(metrics)
    assert seen["ourvidz_lease_overdue_seconds", QUEUE] == pytest.approx(140)
    assert seen["ourvidz_lease_oldest_seconds", QUEUE] == pytest.approx(200)


class MoodyQueue(MemoryQueue):
    """Answers, refuses or hangs, and counts how often it was asked."""

    def __init__(self) -> None:
        super().__init__()
        self.asked = 0
        self.is_away = False
        self.free = threading.Event()
        self.free.set()

    def depth(self, queue: str) -> QueueDepth:
        self.asked += 1
        assert self.free.wait(10)
        if self.is_away:
            raise QueueUnavailable("Redis does not answer")
        return super().depth(queue)


def scrape(collector: QueueCollector, names: Sequence[str] = ("ourvidz_queue_up", "ourvidz_queue_jobs")) -> list[float]:
    return [metric.samples[0].value for metric in collector.collect() if metric.name in names and metric.samples]


def test_many_scrapes_ask_redis_once() -> None:
    queue = MoodyQueue()
    collector = QueueCollector(queue, [QUEUE])
    for _ in range(20):
        assert scrape(collector) == [1, 0]
    assert queue.asked == 1


@pytest.mark.parametrize("hangs", [False, True], ids=["refuses", "hangs"])
def test_a_scrape_answers_in_time_although_redis_does_not(hangs: bool) -> None:
    queue = MoodyQueue()
    queue.push(QUEUE, b'{"id": "a"}')
    collector = QueueCollector(queue, [QUEUE], cache_seconds=0.0, timeout_seconds=0.05)
    assert scrape(collector) == [1, 1]
    queue.is_away = not hangs
    if hangs:
        queue.free.clear()
    started = time.monotonic()
    assert [scrape(collector) for _ in range(4)] == [[0, 1]] * 4
    assert time.monotonic() - started < 2.0
    if hangs:
        assert queue.asked == 2, "a question was put beside one that hangs"
    queue.is_away = False
    queue.free.set()
    deadline = time.monotonic() + 5
    while scrape(collector)[0] != 1:
        assert time.monotonic() < deadline


def test_every_metric_of_the_catalog_is_served_and_nothing_else() -> None:
    metrics = Metrics(["acme"])
    collector = QueueCollector(MemoryQueue(), [QUEUE])
    metrics.add(collector)
    with_states(metrics, status(device=DeviceMemory(used_gb=1.0, total_gb=2.0)))
    kinds = {family.name: family.type for family in text_string_to_metric_families(metrics.page("")[0].decode())}
    del kinds["ourvidz_worker_info"]  # the version
    kinds = {name: kind for name, kind in kinds.items() if not name.endswith("_created")}
    assert kinds == {spec.name: spec.kind.value for spec in SPECS}
