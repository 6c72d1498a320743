"""The board: what workers say of themselves, read back by another process's connection."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from pathlib import Path

import attrs
import pytest
import redis

from ourvidz_core.delivery.board import (
    Board,
    DeviceMemory,
    FinishedJob,
    MemoryBoard,
    RedisBoard,
    RunningJob,
    StoredAsset,
    WorkerStatus,
)
from ourvidz_core.delivery.embedded import EmbeddedRedis
from ourvidz_core.errors import QueueUnavailable
from ourvidz_core.wire.callbacks import JobStatus
from ourvidz_core.wire.previews import PREVIEW_BYTES
from ourvidz_core.wire.states import EngineState, WorkerState

STATUS = WorkerStatus(
    name="gpu-1",
    host="box",
    pid=7,
    version="1.0",
    queues=("sdxl_queue", "wan_queue"),
    state=WorkerState.WORKING,
    started_at=1000.0,
    published_at=1001.0,
    engine=EngineState.READY,
    jobs=(RunningJob(id="a", type="t", attempt=2, stage="denoise", step=3, total=25, claimed_at=1.0, started_at=2.0),),
    device=DeviceMemory(used_gb=20.5, total_gb=48.0),
    completed=3,
    failed=1,
    retried=2,
    health_address="127.0.0.1:9464",
)
RECORD = FinishedJob(
    id="a",
    type="t",
    status=JobStatus.COMPLETED,
    finished_at=2000.0,
    worker="gpu-1",
    attempt=2,
    seconds={"references": 0.5, "generate": 12.0, "total": 14.0},
    assets=(StoredAsset(bucket="b", path="u/a_0.png", media_type="image/png", size_bytes=10),),
)


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[EmbeddedRedis]:
    server = EmbeddedRedis(tmp_path_factory.mktemp("redis"))
    yield server
    server.close()


@pytest.fixture
def client(server: EmbeddedRedis) -> Iterator[redis.Redis]:
    with redis.Redis.from_url(server.address) as client:
        client.flushall()
        yield client


@pytest.fixture(params=["redis", "memory"])
def board(request: pytest.FixtureRequest, server: EmbeddedRedis, client: redis.Redis) -> Iterator[Board]:
    made = RedisBoard.connect(server.address) if request.param == "redis" else MemoryBoard()
    yield made
    made.close()


def test_what_a_worker_says_is_read_whole(board: Board) -> None:
    board.publish(STATUS)
    idle = attrs.evolve(STATUS, name="gpu-0", state=WorkerState.IDLE, jobs=(), device=None, health_address=None)
    board.publish(idle)
    assert board.workers() == [idle, STATUS]
    board.publish(attrs.evolve(STATUS, state=WorkerState.DRAINING))
    assert [status.state for status in board.workers()] == [WorkerState.IDLE, WorkerState.DRAINING]


def test_a_worker_that_ends_leaves_the_board(board: Board) -> None:
    board.publish(STATUS)
    board.withdraw(STATUS.name)
    assert board.workers() == []


def test_ended_jobs_come_newest_first_and_no_more_than_asked(board: Board) -> None:
    failed = attrs.evolve(
        RECORD, id="b", status=JobStatus.FAILED, error_type="JobTimeout", reason="too slow", seconds={}, assets=()
    )
    for record in (RECORD, failed):
        board.finished(record)
    assert board.recent() == [failed, RECORD]
    assert board.recent(1) == [failed]
    assert board.recent(0) == []


def test_a_worker_that_falls_silent_is_forgotten_and_one_that_speaks_again_is_back(
    server: EmbeddedRedis, client: redis.Redis
) -> None:
    board = RedisBoard.connect(server.address, lifetime_seconds=0.02)
    board.publish(STATUS)
    deadline = time.monotonic() + 5
    while board.workers():
        assert time.monotonic() < deadline
    assert client.smembers("{ourvidz}:workers") == set()
    board.publish(STATUS)
    assert board.workers() == [STATUS]
    board.close()


def test_the_list_of_ended_jobs_stays_short(server: EmbeddedRedis, client: redis.Redis) -> None:
    board = RedisBoard.connect(server.address, recent_jobs=3)
    for number in range(10):
        board.finished(attrs.evolve(RECORD, id=f"job-{number}"))
    assert [record.id for record in board.recent()] == ["job-9", "job-8", "job-7"]
    assert client.llen("{ourvidz}:recent") == 3
    board.close()


def test_the_newest_preview_of_a_job_is_kept_and_none_that_is_too_large(board: Board) -> None:
    for content in (b"first", b"second", b"x" * (PREVIEW_BYTES + 1)):
        board.show_preview("a", content)
    board.show_preview("\ud800 " * 500, b"of an odd id")
    assert [board.preview("a"), board.preview("b")] == [b"second", None]
    assert board.preview("\ud800 " * 500) == b"of an odd id"


def test_a_preview_is_forgotten_by_itself_and_one_of_anothers_making_is_not_read_whole(
    server: EmbeddedRedis, client: redis.Redis
) -> None:
    with contextlib.closing(RedisBoard.connect(server.address)) as board:
        board.show_preview("a", b"x" * PREVIEW_BYTES)
        (key,) = client.keys("{ourvidz}:preview:*")
        assert (client.strlen(key), 0 < client.pttl(key) <= 30_000) == (PREVIEW_BYTES, True)
        client.append(key, b"x")
        assert board.preview("a") is None
    with contextlib.closing(RedisBoard.connect(server.address, preview_seconds=0.01)) as board:
        board.show_preview("a", b"x")
        deadline = time.monotonic() + 5
        while client.exists(key):
            assert time.monotonic() < deadline
        assert board.preview("a") is None


def test_what_another_version_wrote_is_passed_over(server: EmbeddedRedis, client: redis.Redis) -> None:
    board = RedisBoard.connect(server.address)
    board.publish(STATUS)
    client.set("{ourvidz}:worker:odd", b'{"name": "odd"}')
    client.set("{ourvidz}:worker:text", b"\xff{")
    client.sadd("{ourvidz}:workers", "odd", "text")
    assert board.workers() == [STATUS]
    board.finished(RECORD)
    client.lpush("{ourvidz}:recent", b"[]")
    assert board.recent() == [RECORD]
    board.close()


def test_a_board_whose_redis_is_away_says_so(tmp_path: Path) -> None:
    board = RedisBoard.connect(f"unix://{tmp_path}/nobody.sock")
    with pytest.raises(QueueUnavailable):
        board.publish(STATUS)
    with pytest.raises(QueueUnavailable):
        board.workers()
