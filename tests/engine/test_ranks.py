"""Processes beside the engine: what they hear and see, and what becomes of a job when one of them is gone."""

from __future__ import annotations

import os
import queue
import signal
from collections.abc import Callable, Iterator
from typing import Any

import psutil
import pytest

from ourvidz_core.engine.device_memory import is_out_of_memory
from ourvidz_core.engine.ranks import Followers, elsewhere, error_of
from ourvidz_core.errors import EngineUnusable, JobError, ModelUnavailable, OutOfMemory

Start = Callable[..., Followers]
SECONDS = 20.0


@pytest.fixture
def heard() -> list[tuple[int, dict[str, Any]]]:
    """What ranks answered, by rank."""
    return []


@pytest.fixture
def start(heard: list[tuple[int, dict[str, Any]]]) -> Iterator[Start]:
    started: list[Followers] = []

    def make(*devices: str, **options: Any) -> Followers:
        made = Followers(
            "tests.engine.rank", devices, on_answer=lambda rank, message: heard.append((rank, message)), **options
        )
        started.append(made)
        return made

    yield make
    for followers in started:
        followers.close()


def test_ranks_answer_with_the_bytes_that_came_along_and_leave_when_told(
    start: Start, heard: list[tuple[int, dict[str, Any]]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,5,6")
    monkeypatch.setenv("OURVIDZ_ACME_KEY", "a plugin's")
    followers = start("cuda:1", "cuda:0", "cuda:2", is_alone=True)
    pixels = bytes(range(256)) * 8192
    followers.tell_all(kind="echo", blobs=[pixels, b""])
    assert followers.wait_until(lambda: len(heard) == 2, SECONDS)
    for (rank, message), visible in zip(sorted(heard, key=lambda answer: answer[0]), ("4", "6"), strict=True):
        assert message["blobs"] == [pixels, b""]
        # Each sees its own GPU as the first, and no key of a plugin's.
        assert (message["visible"], message["key"]) == (visible, None)
        assert (message["start"]["rank"], message["start"]["ranks"], message["start"]["device"]) == (rank, 3, "cuda")
    followers.close()
    assert not any(map(psutil.pid_exists, followers.pids))
    with pytest.raises(EngineUnusable, match="were ended"):
        followers.wait_until(lambda: False, SECONDS)


@pytest.mark.parametrize(
    ("asked", "error", "said"),
    [
        ("load", ModelUnavailable, "failed: ModelUnavailable: there is no such model"),
        ("allocate", OutOfMemory, "failed: MemoryError: CUDA out of memory"),
        ("stumble", EngineUnusable, "failed: RuntimeError: CUDA error: misaligned address"),
        ("end", EngineUnusable, "died: exit status 3"),
    ],
)
def test_what_ails_one_rank_is_the_jobs_error_and_names_it(
    start: Start, asked: str, error: type[JobError], said: str
) -> None:
    lost: queue.SimpleQueue[JobError] = queue.SimpleQueue()
    followers = start("cpu", "cpu", on_lost=lost.put)
    followers.tell(1, kind=asked)
    with pytest.raises(error) as raised:
        followers.wait_until(lambda: False, SECONDS)
    assert f"rank 1 (cpu, process {followers.pids[0]}) {said}" in raised.value.message
    with pytest.raises(error):
        followers.check()
    assert lost.get(timeout=SECONDS) is raised.value


@pytest.mark.slow
@pytest.mark.parametrize(
    ("sent", "said"), [(signal.SIGKILL, "died: signal SIGKILL"), (signal.SIGSTOP, "has not answered for 2 s")]
)
def test_a_rank_that_is_killed_or_stopped_is_named_and_nobody_is_left(start: Start, sent: int, said: str) -> None:
    followers = start("cpu", "cpu", "cpu", silent_seconds=2.0)
    os.kill(followers.pids[1], sent)
    with pytest.raises(EngineUnusable, match=rf"rank 2 \(cpu, process {followers.pids[1]}\) {said}"):
        followers.wait_until(lambda: False, SECONDS)
    followers.close()
    assert not any(map(psutil.pid_exists, followers.pids))


@pytest.mark.slow
def test_a_rank_that_freezes_while_it_sends_is_named_and_the_others_are_heard(
    start: Start, heard: list[tuple[int, dict[str, Any]]]
) -> None:
    followers = start("cpu", "cpu", "cpu", silent_seconds=2.0)
    followers.tell_all(kind="echo")
    assert followers.wait_until(lambda: len(heard) == 2, SECONDS)
    followers.tell(2, kind="freeze")
    followers.tell(1, kind="echo", blobs=[b"pixels"])
    assert followers.wait_until(lambda: len(heard) == 3, SECONDS)
    assert (heard[-1][0], heard[-1][1]["blobs"]) == (1, [b"pixels"])
    followers.tell(2, kind="echo", blobs=[bytes(1 << 24)])  # nobody reads it, so this ends with the process
    with pytest.raises(EngineUnusable, match=rf"rank 2 \(cpu, process {followers.pids[1]}\) has not answered for 2 s"):
        followers.wait_until(lambda: False, SECONDS)
    followers.close()
    assert not any(map(psutil.pid_exists, followers.pids))


def test_what_another_rank_lacks_is_no_lack_of_memory_here() -> None:
    said = ("OutOfMemoryError", "CUDA out of memory. Tried to allocate 2.00 GiB")
    here, there = error_of("rank 0", *said), elsewhere(error_of("rank 1 (cuda:1, process 7)", *said))
    assert (type(here), type(there)) == (OutOfMemory, OutOfMemory)
    assert is_out_of_memory(here)
    assert not is_out_of_memory(there)
