"""Whole jobs through real worker processes: a real Redis, real engines, real HTTP servers, and kills."""

from __future__ import annotations

import contextlib
import io
import json
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
import redis
from PIL import Image

from ourvidz_core.delivery.embedded import EmbeddedRedis
from ourvidz_core.testing.distributions import make_distribution
from ourvidz_core.testing.servers import Bucket, SupabaseServer
from tests import toy
from tests.deployment import USER, Fleet

QUEUE = "toy_queue"
KEY = "service-key-canary"


class ToyFleet(Fleet):
    """With the toy's messages."""

    def push(self, job_id: str, *, what: str = "draw", **config: object) -> None:
        self.push_message({"id": job_id, "config": {"what": what, "seed": 7, **config}})

    def push_message(self, message: dict[str, object]) -> None:
        super().push_message({"type": "toy_image", "prompt": "a toy", **message})


@pytest.fixture
def fleet(tmp_path: Path, redis_server: EmbeddedRedis) -> Iterator[ToyFleet]:
    make_distribution(tmp_path / "site", "ourvidz-toy", toy.SOURCE)
    (tmp_path / "marks").mkdir()
    buckets = {"toy_image": Bucket(), "toy_brief": Bucket()}
    with (
        SupabaseServer(key=KEY, buckets=buckets) as supabase,
        ToyFleet.on(redis_server, tmp_path, QUEUE, supabase) as fleet,
    ):
        fleet.environ |= {
            "PYTHONPATH": str(tmp_path / "site"),
            "TOY_MARKS": str(tmp_path / "marks"),
            "OURVIDZ_ALLOW_PLUGINS": "ourvidz-toy",
        }
        yield fleet


def is_gone(process: psutil.Process) -> bool:
    with contextlib.suppress(psutil.NoSuchProcess):
        return process.status() == psutil.STATUS_ZOMBIE
    return True


def test_a_job_becomes_a_stored_image_and_one_terminal_callback(fleet: ToyFleet) -> None:
    fleet.push("job-1")
    fleet.drain()
    assert [body["status"] for body in fleet.callbacks("job-1")] == ["processing", "completed"]
    body = fleet.last("job-1")
    assert body["assets"] == [f"{USER}/job-1_0.png"]
    stored = fleet.supabase.objects["toy_image", f"{USER}/job-1_0.png"]
    assert stored.media_type == "image/png"
    with Image.open(io.BytesIO(stored.body)) as image:
        assert image.size == (16, 16)
        assert image.getpixel((0, 0)) == (7, 0, 0)
    assert body["metadata"]["seed"] == 7
    assert body["metadata"]["num_images"] == 1
    assert body["metadata"]["generation_time"] > 0
    assert fleet.queue.depth(QUEUE).in_flight == 0
    assert not list(fleet.work_dir.glob("worker-*"))


#: A message, the error that its callback names (None: nobody can be told), and the reason.
BAD_MESSAGES = {
    "not json": (b"{", None, "not JSON"),
    "no id": (b'{"type": "toy_image"}', None, "$.id"),
    "no user": (b'{"id": "x1", "type": "toy_image"}', "PayloadError", "$.user_id"),
    "unknown type": (
        b'{"id": "x2", "type": "nope", "prompt": "", "user_id": "u"}',
        "UnknownJobType",
        "toy_brief, toy_image",
    ),
    "wrong field": (
        b'{"id": "x3", "type": "toy_image", "prompt": 3, "user_id": "u", "config": {"width": "wide"}}',
        "PayloadError",
        "$.prompt: expected a string, got 3",
    ),
    "id is a path": (b'{"id": "../x4", "type": "toy_image", "prompt": "", "user_id": "u"}', None, "$.id"),
    "user is a path": (
        b'{"id": "x5", "type": "toy_image", "prompt": "", "user_id": "../u"}',
        "PayloadError",
        "$.user_id",
    ),
}


def test_bad_messages_are_reported_and_kept_and_the_next_job_completes(fleet: ToyFleet) -> None:
    for raw, _, _ in BAD_MESSAGES.values():
        fleet.client.lpush(QUEUE, raw)
    fleet.push("good")
    fleet.drain()
    assert fleet.last("good")["status"] == "completed"
    letters = {letter.raw: letter.reason for letter in fleet.queue.dead_letters(QUEUE)}
    assert letters.keys() == {raw for raw, _, _ in BAD_MESSAGES.values()}
    for raw, error_type, says in BAD_MESSAGES.values():
        assert says in letters[raw]
        if error_type is not None:
            body = fleet.last(json.loads(raw)["id"])
            assert (body["status"], body["metadata"]["error_type"]) == ("failed", error_type)
            assert says in body["error_message"]
    reported = {request.json()["job_id"] for request in fleet.supabase.callbacks}
    assert reported == {"x1", "x2", "x3", "x5", "good"}


BAD_GENERATIONS = {
    "raise": "RuntimeError",
    "exit": "HookFailed",
    "nonsense": "HookFailed",
    "nothing": "HookFailed",
    "empty": "ArtifactError",
    "elsewhere": "ArtifactError",
    "segfault": "EngineCrashed",
    "os_exit": "EngineCrashed",
    "sticky": "EngineUnusable",
    "torch_oom": "OutOfMemory",
}


def test_whatever_a_generation_does_the_job_is_reported_and_the_next_completes(fleet: ToyFleet) -> None:
    for what in BAD_GENERATIONS:
        fleet.push(f"bad-{what}", what=what)
        fleet.push(f"after-{what}")
    fleet.drain(OURVIDZ_MAX_ATTEMPTS="2")
    told = {what: fleet.last(f"bad-{what}") for what in BAD_GENERATIONS}
    assert {what: body["metadata"]["error_type"] for what, body in told.items()} == BAD_GENERATIONS
    assert {body["status"] for body in told.values()} == {"failed"}
    assert {fleet.last(f"after-{what}")["status"] for what in BAD_GENERATIONS} == {"completed"}


def test_any_number_of_errors_in_a_row_ends_no_worker(fleet: Fleet) -> None:
    for number in range(12):
        fleet.push(f"bad-{number}", what="raise")
    fleet.push("good")
    fleet.drain()
    assert [fleet.last(f"bad-{number}")["status"] for number in range(12)] == ["failed"] * 12
    assert fleet.last("good")["status"] == "completed"


def test_a_job_that_hangs_is_stopped_at_its_deadline(fleet: ToyFleet) -> None:
    fleet.push_message({"id": "hung", "type": "toy_brief", "config": {"what": "hang"}})
    fleet.push("good")
    fleet.drain()
    assert fleet.last("hung")["metadata"]["error_type"] == "JobTimeout"
    assert fleet.last("good")["status"] == "completed"


def test_a_job_that_stops_counting_its_steps_is_stopped_before_its_deadline(fleet: Fleet) -> None:
    fleet.push("stalled", what="stall")
    fleet.drain(OURVIDZ_STALL_SECONDS="0.5", OURVIDZ_MAX_ATTEMPTS="2")
    body = fleet.last("stalled")
    assert (body["metadata"]["error_type"], body["metadata"]["attempts"]) == ("EngineStalled", 2)


def test_a_cancelled_job_that_listens_to_nobody_is_off_the_engine_within_two_seconds(fleet: Fleet) -> None:
    fleet.push("deaf", what="hang")
    fleet.push("next")
    worker = fleet.start()
    fleet.wait_for(lambda: fleet.is_generating(worker))
    time.sleep(0.5)
    engine = fleet.engine_of(worker)
    fleet.client.sadd("{toy_queue}:cancel", "deaf")
    asked_at = time.monotonic()
    fleet.wait_for(lambda: is_gone(engine))
    assert time.monotonic() - asked_at < 2.0
    fleet.wait_for(lambda: len(fleet.callbacks("deaf")) == 2 and len(fleet.callbacks("next")) == 2)
    assert fleet.last("deaf")["metadata"]["error_type"] == "JobCancelled"
    assert fleet.last("next")["status"] == "completed"
    assert worker.poll() is None


def test_a_worker_ends_in_its_grace_time_although_redis_is_gone_and_the_next_tells_what_it_made(
    fleet: Fleet, tmp_path: Path
) -> None:
    server = EmbeddedRedis(tmp_path / "own-redis")
    with redis.Redis.from_url(server.address) as client:
        message = {"id": "a", "type": "toy_image", "prompt": "", "user_id": "u"}
        client.lpush(QUEUE, json.dumps({**message, "config": {"what": "sleep", "seconds": 1.0}}))
        worker = fleet.start(REDIS_URL=server.address, OURVIDZ_DRAIN_SECONDS="2", OURVIDZ_LEASE_SECONDS="60")
        fleet.wait_for(lambda: fleet.is_generating(worker))
        server.close()
        fleet.wait_for(lambda: fleet.supabase.objects)
        worker.terminate()
        assert worker.wait(timeout=15) == 0
        again = EmbeddedRedis(tmp_path / "own-redis")
        fleet.drain(REDIS_URL=again.address)
        assert [body["status"] for body in fleet.callbacks("a")] == ["processing", "completed"]
        assert fleet.last("a")["metadata"]["attempts"] == 1
        again.close()


def test_an_engine_killed_in_mid_generation_costs_a_retry_and_nothing_more(fleet: ToyFleet) -> None:
    fleet.push("long", what="sleep", seconds=2.0)
    fleet.push("next")
    worker = fleet.start()
    fleet.wait_for(lambda: fleet.is_generating(worker))
    time.sleep(0.3)
    killed = fleet.engine_of(worker)
    killed.kill()
    fleet.wait_for(lambda: len(fleet.callbacks("long")) == 2 and len(fleet.callbacks("next")) == 2)
    body = fleet.last("long")
    assert body["status"] == "completed"
    assert body["metadata"]["attempts"] == 2
    assert "SIGKILL" in body["metadata"]["attempt_reasons"][0]
    assert fleet.last("next")["status"] == "completed"
    assert worker.poll() is None


def test_a_worker_killed_in_mid_generation_loses_nothing(fleet: ToyFleet) -> None:
    fleet.push("long", what="sleep", seconds=1.0)
    first = fleet.start()
    fleet.wait_for(lambda: fleet.is_generating(first))
    engine = fleet.engine_of(first)
    first.kill()
    first.wait()
    fleet.wait_for(lambda: not engine.is_running() or engine.status() == psutil.STATUS_ZOMBIE, 5.0)
    fleet.start()
    fleet.wait_for(lambda: len(fleet.callbacks("long")) == 2)
    assert [body["status"] for body in fleet.callbacks("long")] == ["processing", "completed"]
    assert fleet.last("long")["metadata"]["attempts"] == 2
    assert len(list(fleet.work_dir.glob("worker-*"))) == 1  # the dead one's was removed


def test_a_job_that_kills_every_engine_fails_for_good(fleet: ToyFleet) -> None:
    fleet.push("poison", what="segfault")
    fleet.drain()
    body = fleet.last("poison")
    assert (body["status"], body["metadata"]["attempts"]) == ("failed", 3)
    assert len(body["metadata"]["attempt_reasons"]) == 2
    assert fleet.queue.dead_letters(QUEUE)[0].job_id == "poison"


def test_sigterm_lets_the_running_job_finish(fleet: ToyFleet) -> None:
    fleet.push("long", what="sleep", seconds=1.0)
    fleet.push("waiting")
    worker = fleet.start()
    fleet.wait_for(lambda: fleet.is_generating(worker))
    worker.send_signal(signal.SIGTERM)
    assert worker.wait(timeout=10) == 0
    fleet.drain()
    assert fleet.last("long")["metadata"]["attempts"] == 1
    assert [body["status"] for body in fleet.callbacks("waiting")] == ["processing", "completed"]


def test_a_second_sigterm_hands_the_job_back_at_once(fleet: ToyFleet) -> None:
    fleet.push("long", what="sleep", seconds=3.0)
    worker = fleet.start()
    fleet.wait_for(lambda: fleet.is_generating(worker))
    worker.send_signal(signal.SIGTERM)
    time.sleep(0.3)
    worker.send_signal(signal.SIGTERM)
    assert worker.wait(timeout=4) == 0
    assert fleet.queue.depth(QUEUE).retrying == 1
    fleet.drain()
    assert fleet.last("long")["metadata"]["attempts"] == 1


def test_redis_gone_for_a_while_loses_nothing(fleet: ToyFleet, tmp_path: Path) -> None:
    server = EmbeddedRedis(tmp_path / "own-redis")
    with redis.Redis.from_url(server.address) as client:
        client.lpush(
            QUEUE,
            json.dumps(
                {
                    "id": "a",
                    "type": "toy_image",
                    "prompt": "",
                    "user_id": "u",
                    "config": {"what": "sleep", "seconds": 1.0},
                }
            ),
        )
        worker = fleet.start(REDIS_URL=server.address)
        fleet.wait_for(lambda: fleet.is_generating(worker))
        server.close()
        time.sleep(1.5)
        again = EmbeddedRedis(tmp_path / "own-redis")
        fleet.wait_for(lambda: any(body["status"] == "completed" for body in fleet.callbacks("a")))
        client.lpush(QUEUE, json.dumps({"id": "b", "type": "toy_image", "prompt": "", "user_id": "u"}))
        fleet.wait_for(lambda: any(body["status"] == "completed" for body in fleet.callbacks("b")), 25.0)
        again.close()


def test_an_endpoint_that_refuses_for_a_while_gets_the_same_body_again(fleet: ToyFleet) -> None:
    fleet.supabase.fail_next("callback", status=400, times=3)
    fleet.push("job-1")
    fleet.start()
    fleet.wait_for(lambda: fleet.callbacks("job-1") and fleet.last("job-1")["status"] == "completed")
    tried = fleet.tried_callbacks("completed")
    assert len(tried) >= 2
    assert len({request.body for request in tried}) == 1


def test_a_callback_that_can_never_be_accepted_is_kept_with_the_reason(fleet: ToyFleet) -> None:
    fleet.supabase.fail_next("callback", status=400, times=9, body=b'{"error":"violates check constraint"}')
    fleet.push("job-1")
    fleet.drain()
    (kept,) = fleet.queue.undelivered(QUEUE)
    assert json.loads(kept.body)["status"] == "completed"
    assert "violates check constraint" in kept.reason


@pytest.mark.parametrize(
    ("status", "attempts"), [(500, 1), (413, 1)], ids=["server error is retried", "too large is final"]
)
def test_storage_errors(fleet: ToyFleet, status: int, attempts: int) -> None:
    fleet.supabase.fail_next("storage", status=status, times=1)
    fleet.push("job-1")
    fleet.drain()
    body = fleet.last("job-1")
    assert body["status"] == ("completed" if status == 500 else "failed")
    assert body["metadata"]["attempts"] == attempts
    if status == 413:
        assert body["metadata"]["error_type"] == "AssetRejected"


def test_a_full_disk_stops_claiming_and_says_so(fleet: ToyFleet) -> None:
    fleet.push("job-1")
    worker = fleet.start(OURVIDZ_MIN_FREE_DISK_MB="1e12")
    fleet.wait_for(lambda: "OURVIDZ_MIN_FREE_DISK_MB" in fleet.log.read_text())
    assert fleet.queue.depth(QUEUE).waiting == 1
    worker.terminate()
    assert worker.wait(timeout=10) == 0


def test_a_terminal_callback_waits_until_the_clients_rows_are_linked(fleet: ToyFleet) -> None:
    from datetime import UTC, datetime

    created = datetime.now(UTC)
    fleet.push_message({"id": "young", "created_at": created.isoformat(), "config": {"width": 0}})
    fleet.drain(OURVIDZ_CALLBACK_MIN_AGE_SECONDS="2")
    (terminal,) = fleet.tried_callbacks("failed")
    assert terminal.received_at - created.timestamp() >= 2.0


def test_the_engine_sees_no_secret(fleet: ToyFleet) -> None:
    fleet.push("long", what="sleep", seconds=1.0)
    worker = fleet.start()
    fleet.wait_for(lambda: fleet.is_generating(worker))
    environ = fleet.engine_of(worker).environ()
    assert not any(KEY in value for value in environ.values())
    assert "REDIS_URL" not in environ


def test_one_job_and_no_more_with_once(fleet: ToyFleet) -> None:
    fleet.push("first")
    fleet.push("second")
    assert fleet.start("--once").wait(timeout=30) == 0
    assert fleet.last("first")["status"] == "completed"
    assert fleet.queue.depth(QUEUE).waiting == 1
