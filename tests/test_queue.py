"""The promises of a queue, kept by Redis and by the in-memory double alike."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import redis
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ourvidz_core.delivery.embedded import EmbeddedRedis
from ourvidz_core.delivery.memory_queue import MemoryQueue
from ourvidz_core.delivery.queue import DeadLetter, FinishAnswer, Queue, QueuedCallback
from ourvidz_core.delivery.redis_queue import RedisQueue
from ourvidz_core.errors import PayloadError, QueueError, QueueUnavailable
from ourvidz_core.settings import PopSide
from ourvidz_core.wire.payloads import decode_message

SDXL, WAN = "sdxl_queue", "wan_queue"
LEASE = 0.15
Wait = Callable[[float], None]


@pytest.fixture(scope="session")
def redis_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[EmbeddedRedis]:
    server = EmbeddedRedis(tmp_path_factory.mktemp("redis"))
    yield server
    server.close()


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
    queue.finish(take(queue), is_completed=True)
    queue.push(SDXL, message("bad"))
    queue.finish(take(queue), is_completed=False)
    queue.push(SDXL, message("good"))
    queue.push(SDXL, message("bad"))
    assert take(queue).key == "bad"
    assert take(queue) is None


def test_a_finish_ends_the_job_and_makes_its_callback_durable(queue: Queue) -> None:
    queue.push(SDXL, message("a"))
    assert queue.finish(take(queue), is_completed=True, callback=callback()) is FinishAnswer.DONE
    assert queue.depth(SDXL).in_flight == 0
    taken, _ = queue.take_callbacks((SDXL,), limit=5, hold=10)
    assert taken == [callback()]


def test_a_finish_whose_reply_was_lost_can_be_repeated(queue: Queue) -> None:
    queue.push(SDXL, message("a"))
    claim = take(queue)
    assert queue.finish(claim, is_completed=True, callback=callback()) is FinishAnswer.DONE
    assert queue.finish(claim, is_completed=True, callback=callback()) is FinishAnswer.ALREADY
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
    assert queue.finish(zombie, is_completed=True, callback=callback("zombie")) is FinishAnswer.FENCED
    assert queue.finish(other, is_completed=True, callback=callback("other")) is FinishAnswer.DONE
    taken, _ = queue.take_callbacks((SDXL,), limit=5, hold=10)
    assert [row.callback_id for row in taken] == ["other"]


def test_a_late_finish_counts_while_nobody_else_has_the_job(queue: Queue) -> None:
    queue.push(SDXL, message("a"))
    late = take(queue, lease=LEASE)
    time.sleep(LEASE * 1.2)
    assert recover(queue).recovered == ("a",)
    assert queue.finish(late, is_completed=True) is FinishAnswer.DONE
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
    assert queue.finish(given_up, is_completed=False) is FinishAnswer.DONE


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
    queue.finish(take(queue), is_completed=True, callback=callback(), callback_delay=LEASE)
    taken, soonest = queue.take_callbacks((SDXL, WAN), limit=5, hold=60)
    assert taken == []
    assert 0 < soonest <= LEASE
    time.sleep(LEASE * 1.2)
    assert len(queue.take_callbacks((SDXL,), limit=5, hold=60)[0]) == 1
    assert queue.take_callbacks((SDXL,), limit=5, hold=60)[0] == []


def test_a_callback_whose_taker_died_is_due_again(queue: Queue) -> None:
    queue.push(SDXL, message("a"))
    queue.finish(take(queue), is_completed=True, callback=callback())
    queue.take_callbacks((SDXL,), limit=5, hold=LEASE)
    time.sleep(LEASE * 1.2)
    assert len(queue.take_callbacks((SDXL,), limit=5, hold=60)[0]) == 1


def test_a_refused_callback_keeps_what_is_known_of_it_until_it_is_settled(queue: Queue) -> None:
    queue.push(SDXL, message("a"))
    queue.finish(take(queue), is_completed=True, callback=callback())
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
    queue.finish(take(queue), is_completed=True, callback=callback())
    (taken,), _ = queue.take_callbacks((SDXL,), limit=5, hold=0)
    queue.callback_delivered(taken)
    assert queue.take_callbacks((SDXL,), limit=5, hold=60) == ([], None)


@pytest.mark.parametrize("raw", [b'{"id": "\xc3\xa4"}', b"\xff\x00\xfe"], ids=["text", "bytes"])
def test_a_dead_letter_keeps_the_message_byte_for_byte_with_the_reason(queue: Queue, raw: bytes) -> None:
    letter = DeadLetter(
        raw=raw, job_id=None, error_type="PayloadError", reason="not JSON", buried_at="2026-01-01T00:00:00Z", worker="w"
    )
    queue.push(SDXL, raw)
    queue.finish(take(queue), is_completed=False, dead_letter=letter)
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


# -- what only Redis can show


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
    queue.finish(take(queue), is_completed=True, callback=callback())
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
    queue.finish(take(queue), is_completed=True, callback=callback())
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
