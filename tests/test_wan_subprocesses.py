"""Scripts that run WAN jobs and go wrong: each is one failed job in time, and nothing of it is left."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import psutil
import pytest

from ourvidz_core.delivery.embedded import EmbeddedRedis
from ourvidz_core.testing.servers import SupabaseServer
from tests import wan_scripts
from tests.deployment import Fleet

pytest.importorskip("ourvidz_wan")

QUEUE = "wan_queue"
#: video_high is the job type for scripts that do not end by themselves.
SECONDS = {"video_high": 0.8, "video_fast": 60}
#: Before this much more the failure must be reported.
PATIENCE = 3.0


@pytest.fixture(scope="module")
def scripts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The directory of the script and of the videos that it passes off as its own."""
    from ourvidz_wan.video import write_video

    directory = tmp_path_factory.mktemp("scripts")
    (directory / "generate.py").write_text(wan_scripts.SOURCE)
    noise = np.random.default_rng(0)
    for name, frames, width, height in (("good", 5, 480, 832), ("wide", 5, 832, 480), ("short", 1, 480, 832)):
        pictures = noise.integers(0, 255, (frames, height // 16, width // 16, 3), dtype=np.uint8)
        write_video(pictures.repeat(16, axis=1).repeat(16, axis=2), directory / f"{name}.mp4", {}, fps=16)
    write_video(np.full((5, 832, 480, 3), 77, np.uint8), directory / "grey.mp4", {}, fps=16)
    return directory


@pytest.fixture(scope="module")
def fleet(tmp_path_factory: pytest.TempPathFactory, scripts: Path) -> Iterator[Fleet]:
    """One worker for all messages of this module."""
    directory = tmp_path_factory.mktemp("fleet")
    redis_server = EmbeddedRedis(directory / "redis")
    with SupabaseServer() as supabase, Fleet.on(redis_server, directory, QUEUE, supabase) as fleet:
        fleet.start(
            "--queues",
            QUEUE,
            OURVIDZ_WAN_RUN_AS="subprocess",
            OURVIDZ_WAN_SCRIPT=str(scripts / "generate.py"),
            OURVIDZ_WAN_CKPT_DIR=str(directory),
            OURVIDZ_JOB_TIMEOUTS_SECONDS=str(SECONDS).replace("'", '"'),
            OURVIDZ_MAX_ATTEMPTS="2",
        )
        yield fleet
    redis_server.close()


def push(fleet: Fleet, job_id: str, what: str, **more: object) -> None:
    config = {"frame_num": 5, "seed": 1}
    fleet.push_message({"id": job_id, "type": "video_fast", "prompt": f"{what} please", "config": config, **more})


def terminal(fleet: Fleet, job_id: str) -> dict | None:
    return next((body for body in fleet.callbacks(job_id) if body["status"] != "processing"), None)


def seconds_of(fleet: Fleet, job_id: str) -> float:
    """From the callback that says that work began to the one that says how it ended."""
    first, last = (r for r in fleet.supabase.callbacks if r.json()["job_id"] == job_id)
    return last.received_at - first.received_at


def left_running(scripts: Path) -> list[str]:
    """Processes that were started from the scripts' directory."""
    found = []
    for process in psutil.process_iter(["cmdline", "status"]):
        words = process.info["cmdline"] or []
        if process.info["status"] != psutil.STATUS_ZOMBIE and any(word.startswith(str(scripts)) for word in words):
            found.append(" ".join(words)[:200])
    return found


#: What the script does, the job type, and the error that the callback names, with words of its message.
BAD = [
    ("hang", "video_high", "JobTimeout", "still running after"),
    ("fork", "video_high", "JobTimeout", "still running after"),
    ("setsid", "video_high", "JobTimeout", "still running after"),
    ("deaf", "video_high", "JobTimeout", "still running after"),
    ("daemon", "video_fast", "ArtifactError", "output_0.mp4 is missing"),
    ("nothing", "video_fast", "ArtifactError", "output_0.mp4 is missing"),
    ("truncated", "video_fast", "ArtifactError", "not a complete video"),
    ("wide", "video_fast", "ArtifactError", "should have width 480 and has 832"),
    ("short", "video_fast", "ArtifactError", "should have frames 5 and has 1"),
    ("grey", "video_fast", "ArtifactError", "one single colour"),
    ("flood", "video_fast", "CommandFailed", "exit status 3: yyyy"),
    ("missing", "video_fast", "CommandFailed", "FileNotFoundError: models_t5"),
    ("oom", "video_fast", "OutOfMemory", "Tried to allocate 20.00 GiB"),
]


@pytest.mark.parametrize(("what", "job_type", "error_type", "says"), BAD, ids=[what for what, *_ in BAD])
def test_a_bad_script_is_a_failed_job_in_time_and_leaves_nothing(
    fleet: Fleet, scripts: Path, what: str, job_type: str, error_type: str, says: str
) -> None:
    push(fleet, f"{what}-1", what, type=job_type)
    push(fleet, f"{what}-2", "good")

    fleet.wait_for(lambda: terminal(fleet, f"{what}-1"), SECONDS["video_fast"])
    if error_type == "JobTimeout":
        assert SECONDS[job_type] <= seconds_of(fleet, f"{what}-1") < SECONDS[job_type] + PATIENCE
    fleet.wait_for(lambda: terminal(fleet, f"{what}-2"), SECONDS["video_fast"])

    body = terminal(fleet, f"{what}-1")
    assert (body["status"], body["metadata"]["error_type"]) == ("failed", error_type), body["error_message"]
    assert says in body["error_message"]
    assert body["metadata"]["attempts"] == (2 if error_type == "OutOfMemory" else 1)
    assert terminal(fleet, f"{what}-2")["status"] == "completed"
    fleet.wait_for(lambda: left_running(scripts) == [], 1.0)
    assert list(fleet.work_dir.glob("worker-*/job-*")) == []
    assert (fleet.queue.depth(QUEUE).waiting, fleet.queue.depth(QUEUE).in_flight) == (0, 0)


def test_output_of_a_hundred_megabytes_is_no_fault_and_takes_no_memory(fleet: Fleet) -> None:
    push(fleet, "chatty", "chatty")
    fleet.wait_for(lambda: terminal(fleet, "chatty"), SECONDS["video_fast"])
    assert terminal(fleet, "chatty")["status"] == "completed"
    (worker,) = fleet.processes
    for process in (psutil.Process(worker.pid), fleet.engine_of(worker)):
        assert process.memory_info().rss < 300e6


def test_too_little_memory_is_tried_again_on_an_emptied_device(fleet: Fleet) -> None:
    push(fleet, "oom-once", "oom-once")
    fleet.wait_for(lambda: terminal(fleet, "oom-once"), SECONDS["video_fast"])
    body = terminal(fleet, "oom-once")
    assert (body["status"], body["metadata"]["attempts"]) == ("completed", 2)


def test_a_worker_that_is_killed_takes_the_scripts_with_it(fleet: Fleet, scripts: Path) -> None:
    push(fleet, "last", "setsid")
    fleet.wait_for(lambda: len(left_running(scripts)) == 2)
    (worker,) = fleet.processes
    worker.kill()
    worker.wait()
    fleet.wait_for(lambda: left_running(scripts) == [], 5.0)
