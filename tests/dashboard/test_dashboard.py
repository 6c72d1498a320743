"""What the dashboard shows and does, asked over HTTP, on a real Redis."""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import redis
import requests

from ourvidz_core.cli.main import main
from ourvidz_core.dashboard.figures import stage_times, throughput
from ourvidz_core.delivery.board import RECENT_JOBS, FinishedJob, RunningJob, StoredAsset
from ourvidz_core.delivery.embedded import EmbeddedRedis
from ourvidz_core.delivery.storage import SupabaseStorage
from ourvidz_core.testing.host import PluginHost, plugin_of
from ourvidz_core.testing.servers import Bucket, SupabaseServer
from ourvidz_core.wire.callbacks import JobStatus
from tests.dashboard.scenes import QUEUES, USER, Scene, opened

PAINTER = """
from ourvidz_core import Artifact, Generation, JobType, hookimpl

@hookimpl
def register_job_types():
    yield JobType(name="paint", queue="sdxl_queue", content_type="image")

@hookimpl
def generate(job, context):
    from PIL import Image
    context.progress(0, 1)
    path = context.output_path("png")
    Image.linear_gradient("L").save(path)
    return Generation(artifacts=(Artifact(path=path, media_type="image/png"),))
"""


def overview(scene: Scene) -> dict[str, Any]:
    return requests.get(f"{scene.url}/api/overview", timeout=5).json()


@contextlib.contextmanager
def stream(scene: Scene) -> Iterator[Iterator[tuple[str, Any]]]:
    """The events of the page as they come: name and content."""

    def events(lines: Iterator[str]) -> Iterator[tuple[str, Any]]:
        name = ""
        for line in lines:
            if line.startswith("event: "):
                name = line.removeprefix("event: ")
            elif line.startswith("data: "):
                yield name, json.loads(line.removeprefix("data: "))

    with requests.get(f"{scene.url}/api/events", stream=True, timeout=5) as answer:
        assert answer.headers["content-type"] == "text/event-stream"
        yield events(answer.iter_lines(chunk_size=1, decode_unicode=True))


def requeue(scene: Scene, queue: str, letter: str) -> requests.Response:
    csrf = overview(scene)["csrf"]
    return requests.post(
        f"{scene.url}/api/requeue",
        json={"queue": queue, "letter": letter},
        headers={"x-csrf-token": csrf},
        timeout=5,
    )


def test_the_overview_tells_what_waits_runs_ended_and_was_put_aside(scene: Scene) -> None:
    now = time.time()
    created_at = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(now - 90))
    scene.bury(b'{"id": "bad", "type": "sdxl_image_fast", "prompt": "CANARY"}', "bad", "the prompt is missing")
    scene.queue.push(QUEUES[0], json.dumps({"id": "a", "created_at": created_at}).encode())
    scene.publish(jobs=(RunningJob(id="r", type="video", attempt=2, stage="denoise", step=3, total=9, claimed_at=now),))
    scene.finish("good", assets=[("video/mp4", b"mp4")])
    scene.fail("broken", "too little of it")

    told = overview(scene)

    queue = told["queues"][0]
    assert (queue["name"], queue["waiting"], queue["dead"]) == (QUEUES[0], 1, 1)
    assert abs(queue["oldest_at"] - (now - 90)) <= 3
    (worker,) = told["workers"]
    assert [(job["id"], job["stage"], job["step"], job["total"]) for job in worker["jobs"]] == [("r", "denoise", 3, 9)]
    (result,) = told["results"]
    assert (result["id"], result["assets"][0]["address"]) == ("good", f"/assets/toys/{USER}/good_0.mp4")
    (failure,) = told["failures"]
    assert (failure["id"], failure["error_type"], failure["reason"]) == ("broken", "OutOfMemory", "too little of it")
    (letter,) = told["dead"]
    assert (letter["job_id"], letter["job_type"], letter["reason"]) == (
        "bad",
        "sdxl_image_fast",
        "the prompt is missing",
    )
    assert sum(told["figures"]["throughput"]["completed"]) == 1
    assert "CANARY" not in json.dumps(told)


def test_a_queue_that_only_a_worker_knows_is_shown_too(scene: Scene) -> None:
    scene.publish(queues=("acme_queue",))
    assert [queue["name"] for queue in overview(scene)["queues"]] == [*QUEUES, "acme_queue"]


def test_a_change_is_on_the_page_within_two_seconds_and_comes_alone(scene: Scene) -> None:
    with stream(scene) as events:
        first = dict(next(events) for _ in range(8))
        assert set(first) == {"hello", "queues", "workers", "results", "failures", "dead", "figures", "trouble"}
        begun = time.monotonic()
        for stage in ("denoise", "store"):
            scene.publish(jobs=(RunningJob(id="r", type="video", attempt=1, stage=stage, claimed_at=1.0),))
            name, workers = next(events)
            assert (name, workers[0]["jobs"][0]["stage"]) == ("workers", stage)
        assert time.monotonic() - begun < 2


def test_a_dead_letter_that_is_requeued_runs_again_to_its_end(scene: Scene, tmp_path: Path) -> None:
    message = {"id": "again", "type": "paint", "prompt": "a toy", "user_id": USER}
    scene.bury(json.dumps(message).encode(), "again", "there was no GPU")
    (letter,) = overview(scene)["dead"]

    answer = requeue(scene, letter["queue"], letter["letter"])

    assert (answer.status_code, answer.json()) == (200, {"answer": "done"})
    assert overview(scene)["dead"] == []
    with PluginHost(tmp_path / "host", plugin_of(PAINTER), queue=scene.queue) as host:
        host.work()
        bodies = host.callbacks_of("again")
    assert [body["status"] for body in bodies] == ["processing", "completed"], bodies


def test_a_letter_that_is_gone_and_one_whose_job_runs_again_already_are_called_so(scene: Scene) -> None:
    raw = b'{"id": "twice", "type": "paint"}'
    scene.bury(raw, "twice", "why")
    (letter,) = overview(scene)["dead"]
    scene.queue.push(QUEUES[0], raw)
    scene.claim(QUEUES[0])
    assert requeue(scene, QUEUES[0], letter["letter"]).json() == {"answer": "in flight"}
    answer = requeue(scene, QUEUES[0], "0" * 24)
    assert (answer.status_code, answer.json()) == (409, {"answer": "absent"})


@pytest.mark.parametrize(
    ("asked", "status", "first", "end"),
    [(None, 200, 0, 1000), ("bytes=0-", 206, 0, 1000), ("bytes=10-19", 206, 10, 20), ("bytes=-5", 206, 995, 1000),
     ("bytes=990-5000", 206, 990, 1000), ("bytes=5-1", 200, 0, 1000), ("bytes=0-1,4-5", 200, 0, 1000)],
)  # fmt: skip
def test_a_player_gets_the_part_of_a_video_that_it_asks_for(
    film: tuple[Scene, bytes], asked: str | None, status: int, first: int, end: int
) -> None:
    scene, content = film
    headers = {} if asked is None else {"Range": asked}
    answer = requests.get(f"{scene.url}/assets/toys/{USER}/film_0.mp4", headers=headers, timeout=5)
    assert (answer.status_code, answer.content) == (status, content[first:end])
    assert answer.headers["content-type"] == "video/mp4"
    if status == 206:
        assert answer.headers["content-range"] == f"bytes {first}-{end - 1}/1000"


def test_a_part_behind_the_end_of_a_video_is_refused(film: tuple[Scene, bytes]) -> None:
    scene, _ = film
    answer = requests.get(f"{scene.url}/assets/toys/{USER}/film_0.mp4", headers={"Range": "bytes=1000-"}, timeout=5)
    assert (answer.status_code, answer.headers["content-range"]) == (416, "bytes */1000")


@pytest.fixture(scope="module")
def film(redis_server: EmbeddedRedis, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Scene, bytes]]:
    content = bytes(range(250)) * 4
    with opened(tmp_path_factory.mktemp("assets"), redis_server) as scene:
        scene.finish("film", assets=[("video/mp4", content)])
        scene.feed.sections()  # it is known now, whatever other tests do to Redis
        yield scene, content


def test_a_preview_in_supabase_is_shown_by_a_signed_address(scene_of: Callable[..., Scene], tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(b"\x89PNG and so on")
    with SupabaseServer(buckets={"toys": Bucket()}) as supabase:
        storage = SupabaseStorage(supabase.url, supabase.key)
        storage.store(tmp_path / "a.png", bucket="toys", path="u/a_0.png", media_type="image/png")
        scene = scene_of(storage=storage, media_origins=(supabase.url,))
        asset = StoredAsset(bucket="toys", path="u/a_0.png", media_type="image/png", size_bytes=14)
        scene.board.finished(
            FinishedJob(
                id="a", type="t", status=JobStatus.COMPLETED, finished_at=time.time(), worker="w", assets=(asset,)
            )
        )
        answer = requests.get(f"{scene.url}/assets/toys/u/a_0.png", timeout=5)
        storage.close()
    (redirect,) = answer.history
    assert answer.content == b"\x89PNG and so on"
    assert "/object/sign/toys/u/a_0.png?token=" in redirect.headers["location"]
    assert f"media-src 'self' {supabase.url};" in redirect.headers["content-security-policy"]


def test_when_redis_goes_away_the_page_says_so_and_keeps_what_it_had(tmp_path: Path) -> None:
    server = EmbeddedRedis(tmp_path / "redis")
    with opened(tmp_path, server) as scene:
        scene.finish("before", assets=[("image/png", b"png")])
        with stream(scene) as events:
            assert dict(next(events) for _ in range(8))["trouble"] == ""
            server.close()
            name, said = next(events)
            assert name == "trouble"
            assert said.startswith("Redis does not answer")
        assert [job["id"] for job in overview(scene)["results"]] == ["before"]
        assert requeue(scene, QUEUES[0], "0" * 24).status_code == 503


def test_what_nobody_of_us_wrote_into_redis_is_told_and_the_page_goes_on(scene: Scene) -> None:
    with redis.Redis.from_url(scene.redis_url) as client, stream(scene) as events:
        assert dict(next(events) for _ in range(8))["trouble"] == ""
        client.lpush(f"{{{QUEUES[0]}}}:dead", b"{")
        name, said = next(events)
        assert (name, "no worker of this version wrote" in said) == ("trouble", True)
        client.flushall()
        scene.publish()
        assert ("trouble", "") in [next(events) for _ in range(2)]


def test_an_address_that_is_taken_is_an_error_that_says_so(
    scene: Scene, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("REDIS_URL", scene.redis_url)
    taken = scene.url.removeprefix("http://")
    assert main(["dashboard", "--listen", taken, "--queues", QUEUES[0]]) == 2
    assert f"--listen {taken} cannot be had: Address already in use" in capsys.readouterr().err


# -- figures


def ended(ago: float, status: JobStatus = JobStatus.COMPLETED, **seconds: float) -> FinishedJob:
    return FinishedJob(id="a", type="video", status=status, finished_at=1_000_000.0 - ago, worker="w", seconds=seconds)


def test_jobs_are_counted_in_the_stretch_in_which_they_ended() -> None:
    now = 1_000_000.0
    drawn = throughput([ended(-2), ended(0), ended(130), ended(135, JobStatus.FAILED), ended(9000)], now)
    assert (len(drawn.completed), drawn.window_seconds) == (30, 3600)
    assert (drawn.completed[-1], drawn.completed[-2], sum(drawn.completed)) == (2, 1, 3)
    assert (drawn.failed[-2], sum(drawn.failed)) == (1, 1)


def test_a_time_that_the_board_does_not_remember_whole_is_not_drawn() -> None:
    drawn = throughput([ended(index * 1.5) for index in range(RECENT_JOBS)], 1_000_000.0)
    assert drawn.window_seconds == 600
    assert 0 not in drawn.completed[:-1]  # the last has only just begun


def test_stage_times_are_medians_of_completed_jobs() -> None:
    jobs = [
        ended(1, generate=2.0, store=0.5, total=3.0),
        ended(2, generate=4.0, store=0.7, total=5.0),
        ended(3, generate=90.0, store=0.6, total=91.0),
        ended(4, JobStatus.FAILED, generate=1000.0, total=1000.0),
    ]
    (times,) = stage_times(jobs)
    assert (times.job_type, times.jobs, times.seconds, times.total_seconds) == (
        "video",
        3,
        {"generate": 4.0, "store": 0.6},
        5.0,
    )
