"""The promises of a queue, kept by Redis and by the in-memory double alike."""

from __future__ import annotations

import json
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import redis
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from ourvidz_core.delivery import embedded
from ourvidz_core.delivery.embedded import EmbeddedRedis
from ourvidz_core.delivery.memory_queue import MemoryQueue
from ourvidz_core.delivery.queue import CancelState, DeadLetter, FinishAnswer, Queue, QueuedCallback, RequeueAnswer
from ourvidz_core.delivery.redis_queue import RedisQueue
from ourvidz_core.errors import PayloadError, QueueError, QueueUnavailable, QueueUnsupported
from ourvidz_core.settings import PopSide
from ourvidz_core.wire.payloads import decode_message

SDXL, WAN = "sdxl_queue", "wan_queue"
LEASE = 0.15
Wait = Callable[[float], None]


@pytest.fixture
def redis_client(redis_server: EmbeddedRedis) -> Iterator[redis.Redis]:
    with redis.Redis.from_url(redis_server.address) as client:
        client.flushall()
        yield client


@pytest.fixture(params=["redis", "memory"])
def queue(request: pytest.FixtureRequest, redis_server: EmbeddedRedis) -> Iterator[Queue]:
    if request.param == "memory":
        yield MemoryQueue()
        return
    request.getfixturevalue("redis_client")
    made = RedisQueue.connect(redis_server.address)
    yield made
    made.close()


def message(job_id: str, **more: object) -> bytes:
    return json.dumps({"id": job_id, "type": "sdxl_image_fast", **more}).encode()


def callback(callback_id: str = "cb-1", job_id: str = "a") -> QueuedCallback:
    return QueuedCallback(queue=SDXL, callback_id=callback_id, job_id=job_id, body=b'{"job_id":"\xc3\xa4"}')


def take(queue: Queue, *queues: str, worker: str = "w1", lease: float = 60.0):
    return queue.claim(queues or (SDXL,), worker=worker, lease=lease)


def recover(queue: Queue, *, max_interruptions: int = 3):
    return queue.recover((SDXL,), worker="reaper", lease=60.0, delay=0.0, max_interruptions=max_interruptions)


def test_the_oldest_job_comes_first(queue: Queue) -> None:
    for job_id in ("a", "b", "c"):
        queue.push(SDXL, message(job_id))
    assert [take(queue).key for _ in range(3)] == ["a", "b", "c"]
    assert take(queue) is None


def test_a_claimed_job_is_in_flight_with_its_raw_bytes(queue: Queue) -> None:
    raw = b'{"id": "a",  "odd": 1.0, "list": [], "big": 12345678901234567890}'
    queue.push(SDXL, raw)
    claim = take(queue)
    assert claim.raw == raw
    assert (claim.attempt, claim.reasons) == (1, ())
    depth = queue.depth(SDXL)
    assert (depth.waiting, depth.in_flight) == (0, 1)


def test_queues_are_looked_at_in_the_order_given(queue: Queue) -> None:
    queue.push(WAN, message("w"))
    queue.push(SDXL, message("s"))
    assert take(queue, SDXL, WAN).queue == SDXL
    assert take(queue, SDXL, WAN).queue == WAN


@pytest.mark.parametrize(
    "raw",
    [b"", b"\xff\xfe not text", b"{", b"[1, 2]", b"null", b'{"type": "sdxl_image_fast"}', b'{"id": 7}', b'{"id": ""}'],
    ids=["empty", "bytes", "cut", "list", "null", "no id", "number id", "empty id"],
)
def test_a_message_without_a_usable_id_is_claimed_too_and_kept_until_it_is_finished(queue: Queue, raw: bytes) -> None:
    queue.push(SDXL, raw)
    claim = take(queue, lease=LEASE)
    assert claim.raw == raw
    time.sleep(LEASE * 1.2)
    assert recover(queue).recovered == (claim.key,)
    again = take(queue)
    assert (again.raw, again.attempt) == (raw, 2)


@pytest.mark.parametrize(
    "envelope",
    [
        lambda raw: raw,
        lambda raw: json.dumps({"data": raw.decode()}).encode(),
        lambda raw: json.dumps([raw.decode()]).encode(),
    ],
    ids=["object", "data", "list"],
)
def test_the_id_is_found_in_every_envelope(queue: Queue, envelope: Callable[[bytes], bytes]) -> None:
    queue.push(SDXL, envelope(message("job-1")))
    assert take(queue).key == "job-1"


def test_a_duplicate_of_a_job_in_flight_is_dropped(queue: Queue) -> None:
    queue.push(SDXL, message("a"))
    take(queue)
    queue.push(SDXL, message("a", again=True))
    queue.push(SDXL, message("b"))
    assert take(queue).key == "b"


def test_a_duplicate_of_a_completed_job_is_dropped_and_of_a_failed_one_is_not(queue: Queue) -> None:
    queue.push(SDXL, message("good"))
    queue.finish(take(queue), is_final=True)
    queue.push(SDXL, message("bad"))
    queue.finish(take(queue), is_final=False)
    queue.push(SDXL, message("good"))
    queue.push(SDXL, message("bad"))
    assert take(queue).key == "bad"
    assert take(queue) is None


def test_a_finish_ends_the_job_and_makes_its_callback_durable(queue: Queue) -> None:
    queue.push(SDXL, message("a"))
    assert queue.finish(take(queue), is_final=True, callback=callback()) is FinishAnswer.DONE
    assert queue.depth(SDXL).in_flight == 0
    taken, _ = queue.take_callbacks((SDXL,), limit=5, hold=10)
    assert taken == [callback()]


def test_a_finish_whose_reply_was_lost_can_be_repeated(queue: Queue) -> None:
    queue.push(SDXL, message("a"))
    claim = take(queue)
    assert queue.finish(claim, is_final=True, callback=callback()) is FinishAnswer.DONE
    assert queue.finish(claim, is_final=True, callback=callback()) is FinishAnswer.ALREADY
    assert queue.depth(SDXL).callbacks == 1


def test_a_worker_that_lost_its_lease_cannot_finish_the_job_of_another(queue: Queue) -> None:
    queue.push(SDXL, message("a"))
    zombie = take(queue, lease=LEASE)
    time.sleep(LEASE * 1.2)
    recover(queue)
    other = take(queue, worker="w2")
    assert other.token > zombie.token
    assert not queue.renew(zombie, lease=60)
    assert not queue.hand_back(zombie, delay=0)
    assert queue.finish(zombie, is_final=True, callback=callback("zombie")) is FinishAnswer.FENCED
    assert queue.finish(other, is_final=True, callback=callback("other")) is FinishAnswer.DONE
    taken, _ = queue.take_callbacks((SDXL,), limit=5, hold=10)
    assert [row.callback_id for row in taken] == ["other"]


def test_a_late_finish_counts_while_nobody_else_has_the_job(queue: Queue) -> None:
    queue.push(SDXL, message("a"))
    late = take(queue, lease=LEASE)
    time.sleep(LEASE * 1.2)
    assert recover(queue).recovered == ("a",)
    assert queue.finish(late, is_final=True) is FinishAnswer.DONE
    assert take(queue) is None


def test_a_late_renewal_takes_the_job_back_while_nobody_else_has_it(queue: Queue) -> None:
    queue.push(SDXL, message("a"))
    late = take(queue, lease=LEASE)
    time.sleep(LEASE * 1.2)
    recover(queue)
    assert queue.renew(late, lease=60)
    assert take(queue) is None


def test_a_renewed_job_is_not_recovered(queue: Queue) -> None:
    queue.push(SDXL, message("a"))
    claim = take(queue, lease=LEASE)
    assert queue.renew(claim, lease=60)
    time.sleep(LEASE * 1.2)
    assert recover(queue).recovered == ()


def test_a_job_of_a_silent_worker_runs_again_and_says_why(queue: Queue) -> None:
    queue.push(SDXL, message("a"))
    take(queue, worker="silent", lease=LEASE)
    time.sleep(LEASE * 1.2)
    recover(queue)
    again = take(queue)
    assert (again.attempt, again.reasons) == (2, ("worker silent stopped responding",))


def test_a_job_that_silences_every_worker_is_given_up_to_whoever_notices(queue: Queue) -> None:
    queue.push(SDXL, message("poison"))
    for _ in range(2):
        take(queue, lease=LEASE)
        time.sleep(LEASE * 1.2)
        assert recover(queue).recovered == ("poison",)
    take(queue, lease=LEASE)
    time.sleep(LEASE * 1.2)
    recovery = recover(queue)
    assert recovery.recovered == ()
    (given_up,) = recovery.given_up
    assert (given_up.key, given_up.raw, len(given_up.reasons)) == ("poison", message("poison"), 3)
    assert take(queue) is None
    assert recover(queue).given_up == ()
    assert queue.finish(given_up, is_final=False) is FinishAnswer.DONE


def test_a_job_handed_back_waits_its_delay_and_keeps_its_reasons(queue: Queue) -> None:
    queue.push(SDXL, message("a"))
    assert queue.hand_back(take(queue), delay=LEASE, reason="storage\nwas down")
    queue.push(SDXL, message("b"))
    assert take(queue).key == "b"
    time.sleep(LEASE * 1.2)
    again = take(queue)
    assert (again.key, again.attempt) == ("a", 2)
    assert [" ".join(reason.split()) for reason in again.reasons] == ["storage was down"]


def test_a_job_handed_back_on_shutdown_has_not_used_an_attempt(queue: Queue) -> None:
    queue.push(SDXL, message("a"))
    queue.hand_back(take(queue), delay=0.0, counts_as_attempt=False)
    assert take(queue).attempt == 1


def test_a_callback_is_due_after_its_delay_and_only_one_taker_gets_it(queue: Queue) -> None:
    queue.push(SDXL, message("a"))
    queue.finish(take(queue), is_final=True, callback=callback(), callback_delay=LEASE)
    taken, soonest = queue.take_callbacks((SDXL, WAN), limit=5, hold=60)
    assert taken == []
    assert 0 < soonest <= LEASE
    time.sleep(LEASE * 1.2)
    assert len(queue.take_callbacks((SDXL,), limit=5, hold=60)[0]) == 1
    assert queue.take_callbacks((SDXL,), limit=5, hold=60)[0] == []


def test_a_callback_whose_taker_died_is_due_again(queue: Queue) -> None:
    queue.push(SDXL, message("a"))
    queue.finish(take(queue), is_final=True, callback=callback())
    queue.take_callbacks((SDXL,), limit=5, hold=LEASE)
    time.sleep(LEASE * 1.2)
    assert len(queue.take_callbacks((SDXL,), limit=5, hold=60)[0]) == 1


def test_a_refused_callback_keeps_what_is_known_of_it_until_it_is_settled(queue: Queue) -> None:
    queue.push(SDXL, message("a"))
    queue.finish(take(queue), is_final=True, callback=callback())
    (taken,), _ = queue.take_callbacks((SDXL,), limit=5, hold=60)
    refused = QueuedCallback(
        queue=SDXL, callback_id=taken.callback_id, job_id="a", body=taken.body, failures=1, reason="HTTP 400"
    )
    queue.callback_postponed(refused, delay=0.0)
    assert queue.take_callbacks((SDXL,), limit=5, hold=60)[0] == [refused]
    queue.callback_given_up(refused)
    assert queue.undelivered(SDXL) == [refused]
    assert queue.depth(SDXL).callbacks == 0
    assert queue.depth(SDXL).undelivered == 1


def test_a_delivered_callback_is_forgotten(queue: Queue) -> None:
    queue.push(SDXL, message("a"))
    queue.finish(take(queue), is_final=True, callback=callback())
    (taken,), _ = queue.take_callbacks((SDXL,), limit=5, hold=0)
    queue.callback_delivered(taken)
    assert queue.take_callbacks((SDXL,), limit=5, hold=60) == ([], None)


@pytest.mark.parametrize("raw", [b'{"id": "\xc3\xa4"}', b"\xff\x00\xfe"], ids=["text", "bytes"])
def test_a_dead_letter_keeps_the_message_byte_for_byte_with_the_reason(queue: Queue, raw: bytes) -> None:
    letter = DeadLetter(
        raw=raw, job_id=None, error_type="PayloadError", reason="not JSON", buried_at="2026-01-01T00:00:00Z", worker="w"
    )
    queue.push(SDXL, raw)
    queue.finish(take(queue), is_final=False, dead_letter=letter)
    assert queue.dead_letters(SDXL) == [letter]
    assert queue.depth(SDXL).dead == 1


def test_waiting_ends_when_a_job_arrives_and_takes_nothing(queue: Queue) -> None:
    pushed_at: list[float] = []

    def push() -> None:
        pushed_at.append(time.monotonic())
        queue.push(WAN, message("late"))

    threading.Timer(0.2, push).start()
    queue.wait((SDXL, WAN), 10.0)
    assert time.monotonic() - pushed_at[0] < 0.5
    assert queue.depth(WAN).waiting == 1


def test_waiting_ends_after_its_time(queue: Queue) -> None:
    started = time.monotonic()
    queue.wait((SDXL,), 0.2)
    assert 0.15 < time.monotonic() - started < 1.0


@pytest.mark.parametrize("worker_count", [8])
def test_no_job_is_claimed_twice_by_many_workers(queue: Queue, worker_count: int) -> None:
    ids = {f"job-{number}" for number in range(200)}
    for job_id in ids:
        queue.push(SDXL, message(job_id))
    claimed: list[str] = []

    def work(worker: str) -> None:
        while (claim := take(queue, worker=worker)) is not None:
            claimed.append(claim.key)

    threads = [threading.Thread(target=work, args=[f"w{number}"]) for number in range(worker_count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(claimed) == sorted(ids)


# -- cancelling


def cancel(queue: Queue, job_id: str):
    return queue.cancel(SDXL, job_id, worker="person", lease=60.0)


def test_a_waiting_job_that_is_cancelled_leaves_the_queue_at_once_and_belongs_to_who_cancelled_it(queue: Queue) -> None:
    for job_id in ("a", "b", "c"):
        queue.push(SDXL, message(job_id))
    cancellation = cancel(queue, "b")
    assert cancellation.state is CancelState.TAKEN
    assert (cancellation.claim.key, cancellation.claim.raw) == ("b", message("b"))
    assert [take(queue).key, take(queue).key, take(queue)] == ["a", "c", None]
    assert queue.finish(cancellation.claim, is_final=True, callback=callback()) is FinishAnswer.DONE
    queue.push(SDXL, message("b"))
    assert take(queue) is None


def test_a_job_whose_canceller_died_is_reported_by_the_next_to_take_it(queue: Queue) -> None:
    queue.push(SDXL, message("a"))
    queue.cancel(SDXL, "a", worker="person", lease=LEASE)
    time.sleep(LEASE * 1.2)
    recover(queue)
    assert take(queue).is_cancelled


def test_a_job_that_waits_for_another_try_can_be_cancelled(queue: Queue) -> None:
    queue.push(SDXL, message("a"))
    queue.hand_back(take(queue), delay=LEASE, reason="storage was down")
    cancellation = cancel(queue, "a")
    assert (cancellation.state, cancellation.claim.reasons) == (CancelState.TAKEN, ("storage was down",))
    time.sleep(LEASE * 1.2)
    assert take(queue) is None


def test_a_running_job_that_is_cancelled_is_told_to_its_worker_and_to_no_other(queue: Queue) -> None:
    for job_id in ("a", "b"):
        queue.push(SDXL, message(job_id))
    first, second = take(queue), take(queue)
    assert cancel(queue, "a").state is CancelState.RUNNING
    assert queue.cancel_requests((SDXL, WAN), [second]).running == ()
    assert queue.cancel_requests((SDXL, WAN), [first, second]).running == (first,)
    queue.finish(first, is_final=True)
    assert queue.cancel_requests((SDXL,), [first]).running == ()


def test_a_job_that_is_nowhere_cannot_be_cancelled(queue: Queue) -> None:
    queue.push(SDXL, message("over"))
    queue.finish(take(queue), is_final=True)
    assert cancel(queue, "over").state is CancelState.ABSENT
    assert cancel(queue, "never").state is CancelState.ABSENT


def test_a_producers_wish_to_cancel_is_told_once_and_counts_for_a_running_job(queue: Queue) -> None:
    queue.push(SDXL, message("a"))
    claim = take(queue)
    queue.request_cancel(SDXL, "a")
    requests = queue.cancel_requests((SDXL,), [claim])
    assert (requests.fresh, requests.running) == (((SDXL, "a"),), (claim,))
    requests = queue.cancel_requests((SDXL,), [claim])
    assert (requests.fresh, requests.running) == ((), (claim,))


@pytest.mark.parametrize("was_seen", [False, True], ids=["unseen", "seen by a worker that died"])
def test_a_job_that_was_cancelled_before_it_is_claimed_is_claimed_to_be_reported(queue: Queue, was_seen: bool) -> None:
    queue.request_cancel(SDXL, "a")
    if was_seen:
        queue.cancel_requests((SDXL,), [])
    queue.push(SDXL, message("a"))
    queue.push(SDXL, message("b"))
    claim = take(queue)
    assert (claim.key, claim.is_cancelled) == ("a", True)
    queue.finish(claim, is_final=True)
    assert not take(queue).is_cancelled


def test_a_cancelled_job_whose_worker_died_is_not_run_again(queue: Queue) -> None:
    queue.push(SDXL, message("a"))
    take(queue, lease=LEASE)
    cancel(queue, "a")
    time.sleep(LEASE * 1.2)
    recover(queue)
    assert take(queue).is_cancelled


# -- what a person looks at and puts right


def test_the_next_messages_can_be_looked_at(queue: Queue) -> None:
    for job_id in ("a", "b", "c"):
        queue.push(SDXL, message(job_id))
    assert queue.peek(SDXL, 2) == [message("a"), message("b")]
    assert queue.depth(SDXL).waiting == 3


def test_jobs_in_flight_say_who_has_them(queue: Queue) -> None:
    for job_id in ("a", "b"):
        queue.push(SDXL, message(job_id))
    take(queue, worker="w7", lease=60)
    queue.hand_back(take(queue, worker="w8"), delay=60)
    running, waiting = sorted(queue.in_flight(SDXL), key=lambda job: job.key)
    assert (running.key, running.worker, running.attempt) == ("a", "w7", 1)
    assert 55 < running.lease_left_seconds <= 60
    assert 0 <= running.age_seconds < 5
    assert (waiting.key, waiting.lease_left_seconds, waiting.age_seconds) == ("b", None, None)


def buried(queue: Queue, job_id: str) -> DeadLetter:
    letter = DeadLetter(
        raw=message(job_id), job_id=job_id, error_type="EngineCrashed", reason="it died", buried_at="", worker="w"
    )
    queue.push(SDXL, letter.raw)
    queue.finish(take(queue), is_final=True, dead_letter=letter)
    return letter


def test_a_dead_letter_that_is_requeued_runs_although_its_id_had_ended(queue: Queue) -> None:
    first, second = buried(queue, "a"), buried(queue, "b")
    queue.request_cancel(SDXL, "a")
    assert queue.requeue(SDXL, first) is RequeueAnswer.DONE
    assert queue.requeue(SDXL, first) is RequeueAnswer.ABSENT
    assert queue.dead_letters(SDXL) == [second]
    claim = take(queue)
    assert (claim.key, claim.attempt, claim.is_cancelled) == ("a", 1, False)


def test_a_dead_letter_of_a_job_that_runs_again_already_is_left_alone(queue: Queue) -> None:
    letter = DeadLetter(raw=message("a"), job_id="a", error_type="E", reason="", buried_at="", worker="w")
    queue.push(SDXL, letter.raw)
    queue.finish(take(queue), is_final=False, dead_letter=letter)
    queue.push(SDXL, letter.raw)
    take(queue)
    assert queue.requeue(SDXL, letter) is RequeueAnswer.IN_FLIGHT
    assert queue.dead_letters(SDXL) == [letter]


def test_a_dead_letter_can_be_thrown_away(queue: Queue) -> None:
    letter = buried(queue, "a")
    assert queue.drop(SDXL, letter)
    assert not queue.drop(SDXL, letter)
    assert queue.depth(SDXL).dead == 0


def test_a_callback_that_was_given_up_can_be_sent_again_from_the_start(queue: Queue) -> None:
    queue.push(SDXL, message("a"))
    queue.finish(take(queue), is_final=True, callback=callback())
    (taken,), _ = queue.take_callbacks((SDXL,), limit=5, hold=60)
    refused = QueuedCallback(
        queue=SDXL,
        callback_id=taken.callback_id,
        job_id="a",
        body=taken.body,
        failures=9,
        reason="HTTP 500",
        first_tried_at=1.0,
    )
    queue.callback_given_up(refused)
    assert queue.replay(refused)
    assert not queue.undelivered(SDXL)
    (again,), _ = queue.take_callbacks((SDXL,), limit=5, hold=60)
    assert (again.callback_id, again.body, again.failures, again.first_tried_at) == ("cb-1", taken.body, 0, 0.0)
    queue.callback_delivered(again)
    assert not queue.replay(refused)


def test_those_callbacks_can_be_read_that_are_due_next(queue: Queue) -> None:
    for name, delay in (("late", 60.0), ("soon", 1.0), ("later", 90.0)):
        queue.push(SDXL, message(name))
        queue.finish(take(queue), is_final=True, callback=callback(name, name), callback_delay=delay)
    assert [row.callback_id for row in queue.waiting_callbacks(SDXL, limit=2)] == ["soon", "late"]
    assert queue.waiting_callbacks("empty_queue", limit=2) == []
    assert len(queue.waiting_callbacks(SDXL)) == 3


def test_a_callback_that_waits_can_be_sent_now(queue: Queue) -> None:
    queue.push(SDXL, message("a"))
    queue.finish(take(queue), is_final=True, callback=callback(), callback_delay=60)
    (waiting,) = queue.waiting_callbacks(SDXL)
    assert queue.replay(waiting)
    assert queue.take_callbacks((SDXL,), limit=5, hold=60)[0] == [waiting]


# -- what only Redis can show


def test_a_job_whose_lease_was_lost_runs_again(redis_client: redis.Redis, redis_server: EmbeddedRedis) -> None:
    queue = RedisQueue.connect(redis_server.address)
    queue.push(SDXL, message("a"))
    queue.push(SDXL, message("b"))
    take(queue)
    queue.hand_back(take(queue), delay=60)
    redis_client.delete("{sdxl_queue}:lease", "{sdxl_queue}:retry")
    assert set(recover(queue).recovered) == {"a", "b"}
    assert take(queue).reasons == ("its lease was lost",)
    redis_client.delete("{sdxl_queue}:meta", "{sdxl_queue}:lease")
    assert len(recover(queue).recovered) == 1
    redis_client.delete("{sdxl_queue}:meta")
    assert {take(queue).key, take(queue).key} == {"a", "b"}
    queue.close()


def test_a_job_whose_message_was_lost_does_not_keep_its_repetition_out(
    redis_client: redis.Redis, redis_server: EmbeddedRedis
) -> None:
    queue = RedisQueue.connect(redis_server.address)
    queue.push(SDXL, message("a"))
    take(queue)
    redis_client.delete("{sdxl_queue}:job")
    recover(queue)
    queue.push(SDXL, message("a"))
    assert take(queue).key == "a"
    queue.close()


def test_a_callback_whose_time_was_lost_is_due_now(redis_client: redis.Redis, redis_server: EmbeddedRedis) -> None:
    queue = RedisQueue.connect(redis_server.address)
    queue.push(SDXL, message("a"))
    queue.finish(take(queue), is_final=True, callback=callback(), callback_delay=60)
    redis_client.delete("{sdxl_queue}:outbox")
    assert len(queue.take_callbacks((SDXL,), limit=5, hold=60)[0]) == 1
    queue.close()


def test_what_is_over_is_forgotten_after_its_window(redis_client: redis.Redis, redis_server: EmbeddedRedis) -> None:
    queue = RedisQueue.connect(redis_server.address, duplicate_window=LEASE)
    queue.push(SDXL, message("a"))
    queue.finish(take(queue), is_final=True)
    assert redis_client.zcard("{sdxl_queue}:done") == 1
    time.sleep(LEASE * 1.2)
    recover(queue)
    assert redis_client.zcard("{sdxl_queue}:done") == 0
    queue.close()


@pytest.mark.parametrize("side", PopSide)
def test_a_job_deep_in_a_long_list_can_be_cancelled(
    redis_client: redis.Redis, redis_server: EmbeddedRedis, side: PopSide
) -> None:
    queue = RedisQueue.connect(redis_server.address, pop_side=side)
    raw = [message(f"job-{number}") for number in range(12_000)]
    (redis_client.lpush if side is PopSide.RIGHT else redis_client.rpush)(SDXL, *raw)
    for job_id in ("job-0", "job-6000", "job-11999"):
        assert cancel(queue, job_id).claim.key == job_id
    assert cancel(queue, "job-12000").state is CancelState.ABSENT
    assert queue.depth(SDXL).waiting == 11_997
    queue.close()


def test_a_cancel_key_of_another_type_does_not_stop_the_queue(
    redis_client: redis.Redis, redis_server: EmbeddedRedis
) -> None:
    queue = RedisQueue.connect(redis_server.address)
    redis_client.set("{sdxl_queue}:cancel", "a")
    queue.push(SDXL, message("a"))
    claim = take(queue)
    assert not claim.is_cancelled
    assert queue.finish(claim, is_final=True) is FinishAnswer.DONE
    queue.close()


@pytest.mark.parametrize(
    ("denied", "says"),
    [("-blmove", "lacks BLMOVE"), ("-eval", "runs no Lua scripts"), ("-info -config", None)],
    ids=["no blmove", "no scripts", "tells nothing"],
)
def test_what_a_server_lacks_is_said_at_the_start(
    redis_client: redis.Redis, redis_server: EmbeddedRedis, denied: str, says: str | None
) -> None:
    redis_client.execute_command("ACL", "SETUSER", "limited", "reset", "on", ">pw", "~*", "+@all", *denied.split())
    address = redis_server.address.replace("unix://", "unix://limited:pw@")
    if says is None:
        RedisQueue.connect(address).close()
        return
    with pytest.raises(QueueUnsupported, match=says):
        RedisQueue.connect(address)


def test_a_server_that_may_throw_jobs_away_is_warned_of(
    redis_client: redis.Redis, redis_server: EmbeddedRedis, caplog: pytest.LogCaptureFixture
) -> None:
    redis_client.config_set("maxmemory-policy", "allkeys-lru")
    redis_client.config_set("appendonly", "no")
    try:
        RedisQueue.connect(redis_server.address).close()
    finally:
        redis_client.config_set("maxmemory-policy", "noeviction")
        redis_client.config_set("appendonly", "yes")
    assert "allkeys-lru" in caplog.text
    assert "keeps nothing on disk" in caplog.text


def test_a_replica_is_refused(redis_client: redis.Redis, redis_server: EmbeddedRedis) -> None:
    redis_client.execute_command("REPLICAOF", "127.0.0.1", "1")
    try:
        with pytest.raises(QueueUnsupported, match="replica"):
            RedisQueue.connect(redis_server.address)
    finally:
        redis_client.execute_command("REPLICAOF", "NO", "ONE")


def test_the_producers_left_push_is_taken_from_the_right(
    redis_client: redis.Redis, redis_server: EmbeddedRedis
) -> None:
    redis_client.lpush(SDXL, message("first"), message("second"))
    queue = RedisQueue.connect(redis_server.address)
    assert take(queue).key == "first"
    queue.close()


def test_a_producer_that_pushes_right_is_served_from_the_left(
    redis_client: redis.Redis, redis_server: EmbeddedRedis
) -> None:
    redis_client.rpush(SDXL, message("first"), message("second"))
    queue = RedisQueue.connect(redis_server.address, pop_side=PopSide.LEFT)
    queue.wait((SDXL,), 5.0)
    assert [take(queue).key, take(queue).key] == ["first", "second"]
    queue.close()


def test_all_keys_of_a_queue_share_its_hash_tag(redis_client: redis.Redis, redis_server: EmbeddedRedis) -> None:
    queue = RedisQueue.connect(redis_server.address)
    for job_id in ("a", "b", "c"):
        queue.push(SDXL, message(job_id))
    queue.finish(take(queue), is_final=True, callback=callback())
    queue.hand_back(take(queue), delay=60)
    take(queue)
    keys = {key.decode() for key in redis_client.keys("*")}
    assert all(key.startswith("{sdxl_queue}:") for key in keys)
    queue.close()


def test_jobs_and_callbacks_survive_the_server(tmp_path: Path) -> None:
    server = EmbeddedRedis(tmp_path)
    queue = RedisQueue.connect(server.address, on_close=server.close)
    for job_id in ("a", "b", "c"):
        queue.push(SDXL, message(job_id))
    queue.finish(take(queue), is_final=True, callback=callback())
    take(queue, lease=LEASE)
    queue.close()
    server = EmbeddedRedis(tmp_path)
    queue = RedisQueue.connect(server.address, on_close=server.close)
    assert len(queue.take_callbacks((SDXL,), limit=5, hold=60)[0]) == 1
    time.sleep(LEASE)
    assert recover(queue).recovered == ("b",)
    assert {take(queue).key, take(queue).key} == {"b", "c"}
    queue.close()


def test_a_second_user_of_an_embedded_server_keeps_it_alive(tmp_path: Path) -> None:
    first, second = EmbeddedRedis(tmp_path), EmbeddedRedis(tmp_path)
    assert first.address == second.address
    first.close()
    with redis.Redis.from_url(second.address) as client:
        assert client.ping()
    second.close()
    with redis.Redis.from_url(second.address) as client, pytest.raises(redis.ConnectionError):
        client.ping()


@pytest.mark.parametrize("state", ["refuses everything", "hangs"])
def test_no_second_embedded_server_is_started_on_the_files_of_one_that_cannot_answer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, state: str
) -> None:
    first = EmbeddedRedis(tmp_path)
    with redis.Redis.from_url(first.address) as client:
        pid = client.info("server")["process_id"]
        if state == "hangs":
            os.kill(pid, signal.SIGSTOP)
            monkeypatch.setattr(embedded, "_START_SECONDS", 0.0)
            monkeypatch.setattr(embedded, "_ANSWER_SECONDS", 0.1)
            with pytest.raises(QueueUnavailable, match="does not answer"):
                EmbeddedRedis(tmp_path)
            os.kill(pid, signal.SIGCONT)
        else:
            client.execute_command("ACL SETUSER default -ping")  # a full disk has it refuse even that
            EmbeddedRedis(tmp_path).close()
        assert client.info("server")["process_id"] == pid
    with redis.Redis.from_url(first.address) as client:
        assert client.info("server")["process_id"] == pid
    first.close()


@pytest.mark.skipif(os.getuid() != 0, reason="only root can give a file to somebody else")
def test_an_embedded_server_of_another_user_is_not_talked_to(tmp_path: Path) -> None:
    ours = EmbeddedRedis(tmp_path)
    place = ours.address.removeprefix("unix://")
    os.chown(place, 12345, 12345)
    with pytest.raises(QueueUnavailable, match="is another user's"):
        EmbeddedRedis(tmp_path)
    os.chown(place, 0, 0)
    ours.close()


@pytest.mark.parametrize("trouble", ["a full disk", "a full memory", "a failover", "no replica"])
def test_what_a_server_refuses_for_now_is_asked_again(tmp_path: Path, trouble: str) -> None:
    server = EmbeddedRedis(tmp_path)
    queue = RedisQueue.connect(server.address)
    queue.push(SDXL, b'{"id": "a"}')
    claim = take(queue)
    with redis.Redis.from_url(server.address) as client:
        match trouble:
            case "a full disk":
                (tmp_path / "dump.rdb" / "in the way").mkdir(parents=True)
                client.config_set("save", "3600 1")
                client.bgsave()
                while client.info("persistence")["rdb_last_bgsave_status"] != "err":
                    time.sleep(0.01)
            case "a full memory":
                client.config_set("maxmemory", "1")
            case "a failover":
                client.replicaof("127.0.0.1", 1)
            case "no replica":
                client.config_set("min-replicas-to-write", "1")
    with pytest.raises(QueueUnavailable):
        queue.push(SDXL, b"{}")
    with pytest.raises(QueueUnavailable):
        queue.finish(claim, is_final=True)
    if trouble != "a failover":  # a replica's address is a setting to correct
        with pytest.raises(QueueUnavailable):
            RedisQueue.connect(server.address)
    queue.close()
    with redis.Redis.from_url(server.address) as client:
        client.shutdown(nosave=True)
    server.close()


def test_a_server_that_is_gone_is_said_to_be_unavailable(tmp_path: Path) -> None:
    server = EmbeddedRedis(tmp_path)
    queue = RedisQueue.connect(server.address)
    server.close()
    with pytest.raises(QueueUnavailable, match="Redis does not answer"):
        take(queue)


def test_a_key_that_holds_something_else_is_a_clear_error(
    redis_client: redis.Redis, redis_server: EmbeddedRedis
) -> None:
    redis_client.set(SDXL, "somebody's note")
    queue = RedisQueue.connect(redis_server.address)
    with pytest.raises(QueueError, match="in use for something else"):
        take(queue)
    queue.close()


def test_a_password_in_the_address_is_not_in_the_error() -> None:
    with pytest.raises(QueueUnavailable) as caught:
        RedisQueue.connect("redis://default:hunter2@127.0.0.1:1")
    assert "hunter2" not in str(caught.value)


json_values = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**31), 2**31) | st.text(max_size=12),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(["id", "data", "type", "x"]), inner, max_size=3)
    ),
    max_leaves=6,
)


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(json_values, st.sampled_from(["plain", "string", "data", "list"]))
@example({"id": "0", "data": ""}, "list")
@example(["{}"], "string")
def test_redis_and_the_worker_read_the_same_id(
    redis_client: redis.Redis, redis_server: EmbeddedRedis, value: object, envelope: str
) -> None:
    """Otherwise a duplicate would run twice, or a job's failure be reported under another's id."""
    text = json.dumps(value)
    raw = {"plain": text, "string": json.dumps(text), "data": json.dumps({"data": text}), "list": json.dumps([text])}[
        envelope
    ].encode()
    redis_client.flushall()
    redis_client.lpush(SDXL, raw)
    queue = RedisQueue(redis_client)
    claim = take(queue)
    try:
        job_id = decode_message(raw).get("id")
    except PayloadError:
        job_id = None
    if isinstance(job_id, str) and 0 < len(job_id.encode("utf-8", "surrogatepass")) <= 128:
        assert claim.key == job_id
    else:
        assert claim.key.startswith("sha1:")
