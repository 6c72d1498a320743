"""The worker that is being replaced and the new one on one queue, and the way back."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import redis

from ourvidz_core.delivery.embedded import EmbeddedRedis
from ourvidz_core.delivery.redis_queue import RedisQueue

QUEUE = "sdxl_queue"


@pytest.fixture
def server(tmp_path: Path) -> Iterator[EmbeddedRedis]:
    embedded = EmbeddedRedis(tmp_path / "redis")
    yield embedded
    embedded.close()


@pytest.fixture
def producer(server: EmbeddedRedis) -> Iterator[redis.Redis]:
    with redis.Redis.from_url(server.address) as client:
        yield client


@pytest.fixture
def queue(server: EmbeddedRedis) -> Iterator[RedisQueue]:
    opened = RedisQueue.connect(server.address)
    yield opened
    opened.close()


def test_each_message_goes_to_exactly_one_of_an_old_and_a_new_worker(
    server: EmbeddedRedis, producer: redis.Redis, queue: RedisQueue
) -> None:
    messages = [json.dumps({"id": f"job-{number}", "type": "sdxl_image_fast"}).encode() for number in range(400)]
    by_old: list[bytes] = []
    by_new: list[bytes] = []
    is_over = threading.Event()

    def old_worker() -> None:
        with redis.Redis.from_url(server.address) as client:
            while not is_over.is_set():
                if (raw := client.rpop(QUEUE)) is not None:
                    by_old.append(raw)

    thread = threading.Thread(target=old_worker)
    thread.start()
    for raw in messages:
        producer.lpush(QUEUE, raw)
        if (claim := queue.claim((QUEUE,), worker="new", lease=60)) is not None:
            by_new.append(claim.raw)
    while (claim := queue.claim((QUEUE,), worker="new", lease=60)) is not None:
        by_new.append(claim.raw)
    is_over.set()
    thread.join()

    assert sorted(by_old + by_new) == sorted(messages)
    assert by_old
    assert by_new
    assert queue.depth(QUEUE).in_flight == len(by_new)


def test_waiting_and_looking_leave_every_message_as_it_was_pushed(producer: redis.Redis, queue: RedisQueue) -> None:
    odd = [b'{"id":"a" , "type": "sdxl_image_fast", "x": 1.0}', b'{"data": "{\\"id\\": \\"b\\"}"}', b"no message"]
    for raw in odd:
        producer.lpush(QUEUE, raw)

    queue.wait((QUEUE,), 0.05)
    queue.depth(QUEUE)
    assert queue.peek(QUEUE, 10) == odd

    assert [producer.rpop(QUEUE) for _ in odd] == odd
