"""What an operator does to a queue from the command line, on a real Redis."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import attrs
import pytest
import redis

from ourvidz_core.cli.main import main
from ourvidz_core.delivery.embedded import EmbeddedRedis
from ourvidz_core.delivery.queue import Claim, DeadLetter, QueuedCallback
from ourvidz_core.delivery.redis_queue import RedisQueue

QUEUE = "acme_queue"
Ask = Callable[..., Any]


@pytest.fixture
def queue(redis_server: EmbeddedRedis) -> Iterator[RedisQueue]:
    with redis.Redis.from_url(redis_server.address) as client:
        client.flushall()
    made = RedisQueue.connect(redis_server.address)
    yield made
    made.close()


@pytest.fixture
def ask(redis_server: EmbeddedRedis, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Ask:
    """Runs a command on the queue and answers its JSON, or its text where the command prints that."""
    monkeypatch.setenv("REDIS_URL", redis_server.address)

    def run(*arguments: str, code: int = 0, as_json: bool = True) -> Any:
        assert main([*arguments, "--queue", QUEUE, *(["--json"] if as_json else [])]) == code
        printed = capsys.readouterr()
        return (json.loads(printed.out) if as_json else printed.out) if code < 2 else printed.err

    return run


def push(queue: RedisQueue, job_id: str, **more: object) -> bytes:
    raw = json.dumps({"id": job_id, "type": "acme_image", **more}).encode()
    queue.push(QUEUE, raw)
    return raw


def claim(queue: RedisQueue) -> Claim:
    taken = queue.claim((QUEUE,), worker="w7", lease=60)
    assert taken is not None
    return taken


def bury(queue: RedisQueue, job_id: str | None, raw: bytes) -> None:
    queue.push(QUEUE, raw)
    letter = DeadLetter(
        raw=raw,
        job_id=job_id,
        error_type="PayloadError",
        reason="why",
        buried_at="2026-01-01T00:00:00+00:00",
        worker="w",
    )
    queue.finish(claim(queue), is_final=False, dead_letter=letter)


def refuse(queue: RedisQueue, job_id: str, *, is_given_up: bool) -> None:
    push(queue, job_id)
    callback = QueuedCallback(queue=QUEUE, callback_id=f"{job_id}-1", job_id=job_id, body=b'{"status":"completed"}')
    queue.finish(claim(queue), is_final=True, callback=callback)
    (taken,), _ = queue.take_callbacks((QUEUE,), limit=9, hold=60)
    taken = attrs.evolve(taken, failures=3, reason="HTTP 500", first_tried_at=1.0)
    if is_given_up:
        queue.callback_given_up(taken)
    else:
        queue.callback_postponed(taken, delay=60)


def test_status_counts_and_says_who_has_what(queue: RedisQueue, ask: Ask) -> None:
    push(queue, "running")
    claim(queue)
    push(queue, "waiting")
    answer = ask("queue", "status")[QUEUE]
    assert (answer["waiting"], answer["in_flight"], answer["dead"]) == (1, 1, 0)
    (job,) = answer["jobs"]
    assert (job["key"], job["worker"], job["attempt"]) == ("running", "w7", 1)
    text = ask("queue", "status", as_json=False)
    assert "acme_queue  1" in text
    assert "w7" in text


def test_peek_shows_the_next_and_takes_nothing(queue: RedisQueue, ask: Ask) -> None:
    push(queue, "first", prompt="secret of the user")
    push(queue, "second")
    assert [row["message"]["id"] for row in ask("queue", "peek", "--limit", "1")] == ["first"]
    text = ask("queue", "peek", as_json=False)
    assert "second" in text
    assert "secret" not in text
    assert queue.depth(QUEUE).waiting == 2


def test_a_dead_message_runs_again_when_it_is_requeued(queue: RedisQueue, ask: Ask) -> None:
    bury(queue, "a", b'{"id": "a", "type": 3}')
    bury(queue, None, b"{")
    broken, letter = ask("queue", "dead", "list")
    assert (letter["id"], letter["message"]["type"], letter["reason"]) == ("a", 3, "why")
    assert broken["id"].startswith("sha1:")
    assert ask("queue", "dead", "requeue", "a") == [{"id": "a", "queue": QUEUE, "answer": "done"}]
    assert claim(queue).raw == b'{"id": "a", "type": 3}'
    assert ask("queue", "dead", "drop", "--all")[0]["answer"] == "done"
    assert ask("queue", "dead", "list") == []


@pytest.mark.parametrize("arguments", [(), ("a", "--all"), ("never",)], ids=["nothing", "both", "unknown"])
def test_what_is_not_there_is_not_put_right(queue: RedisQueue, ask: Ask, arguments: tuple[str, ...]) -> None:
    bury(queue, "a", b'{"id": "a"}')
    assert ask("queue", "dead", "drop", *arguments, code=2)
    assert queue.depth(QUEUE).dead == 1


def test_callbacks_are_listed_and_sent_again(queue: RedisQueue, ask: Ask) -> None:
    refuse(queue, "waits", is_given_up=False)
    refuse(queue, "lost", is_given_up=True)
    waits, lost = ask("queue", "outbox", "list")
    assert (waits["is_given_up"], lost["is_given_up"], lost["failures"], lost["reason"]) == (False, True, 3, "HTTP 500")
    assert lost["body"] == {"status": "completed"}
    assert "given up" in ask("queue", "outbox", "list", as_json=False)
    assert ask("queue", "outbox", "replay", "lost-1", "waits")[0]["answer"] == "done"
    taken, _ = queue.take_callbacks((QUEUE,), limit=9, hold=60)
    assert {callback.callback_id for callback in taken} == {"lost-1", "waits-1"}


def test_a_queued_job_is_cancelled_and_its_report_waits_for_a_worker(queue: RedisQueue, ask: Ask) -> None:
    push(queue, "a")
    assert ask("cancel", "a")[0]["answer"] == "taken out of the queue"
    assert queue.depth(QUEUE).waiting == queue.depth(QUEUE).in_flight == 0
    (callback,) = queue.waiting_callbacks(QUEUE)
    body = json.loads(callback.body)
    assert (body["status"], body["metadata"]["error_type"]) == ("failed", "JobCancelled")


def test_a_running_job_is_left_to_its_worker_and_one_that_is_nowhere_ends_with_one(queue: RedisQueue, ask: Ask) -> None:
    push(queue, "a")
    running = claim(queue)
    assert ask("cancel", "a")[0]["answer"] == "a worker stops it"
    assert queue.cancel_requests((QUEUE,), [running]).running == (running,)
    assert ask("cancel", "never", code=1)[0]["answer"] == "absent"


def test_a_server_that_does_not_answer_is_exit_code_3(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.setenv("REDIS_URL", f"unix://{tmp_path}/nowhere.sock")
    assert main(["queue", "status", "--queue", QUEUE]) == 3
    assert "does not answer" in capsys.readouterr().err
