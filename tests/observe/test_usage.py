"""The specification's worker and completion records: their shapes, and that they hold nobody up."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from datetime import datetime
from pathlib import Path

import pytest

from ourvidz_core.observe.usage import HttpUsage
from ourvidz_core.testing.host import PluginHost, plugin_of
from ourvidz_core.testing.servers import Answer, LocalServer, ReceivedRequest
from ourvidz_core.worker.usage import completion_record, worker_record

NOISE = """
from ourvidz_core import Artifact, Generation, JobType, hookimpl

@hookimpl
def register_job_types():
    yield JobType(name="acme", queue="acme_queue", content_type="image")

@hookimpl
def generate(job, context):
    from PIL import Image
    if job.prompt == "fail":
        raise RuntimeError("CANARY")
    path = context.output_path("png")
    Image.effect_noise((64, 64), 80).save(path)
    return Generation(artifacts=(Artifact(path=path, media_type="image/png"),))
"""


class RecordServer(LocalServer):
    """Takes records, and answers as told."""

    status = 200
    delay_seconds = 0.0

    def __init__(self) -> None:
        super().__init__()
        self.records: list[ReceivedRequest] = []

    def answer(self, request: ReceivedRequest) -> Answer:
        self.records.append(request)
        return Answer(status=self.status, delay_seconds=self.delay_seconds, headers={"Location": "/elsewhere"})


@pytest.fixture
def server() -> Iterator[RecordServer]:
    with RecordServer() as server:
        yield server


def wait_for(condition: Callable[[], object]) -> None:
    deadline = time.monotonic() + 5
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.005)


def test_records_have_the_shape_of_the_specification(host: Callable[..., PluginHost]) -> None:
    made = host(plugin_of(NOISE))
    message = {"id": "job-1", "type": "acme", "prompt": "", "user_id": "user-1"}
    outcome = made.run(message)
    used, completed = worker_record("gpu-1", outcome), completion_record(outcome)
    assert datetime.fromisoformat(used.pop("timestamp")).tzinfo is not None
    assert used.pop("generation_time") == outcome.callback.metadata["generation_time"] > 0
    assert used == {
        "worker_id": "gpu-1",
        "job_type": "acme",
        "vram_used": None,
        "reference_mode": "none",
        "success": True,
    }
    assert datetime.fromisoformat(completed.pop("completion_timestamp")).tzinfo is not None
    assert completed.pop("total_size_mb") == pytest.approx(outcome.assets[0].size_bytes / 1e6)
    assert completed == {
        "job_id": "job-1",
        "user_id": "user-1",
        "job_type": "acme",
        "reference_mode": "none",
        "assets_generated": 1,
    }


def test_a_failed_job_has_a_worker_record_and_no_completion(host: Callable[..., PluginHost]) -> None:
    outcome = host(plugin_of(NOISE)).run({"id": "a", "type": "acme", "prompt": "fail", "user_id": "u"})
    assert worker_record("w", outcome)["success"] is False
    assert completion_record(outcome) is None
    assert "CANARY" not in str(worker_record("w", outcome))


def test_a_message_that_nobody_could_read_has_no_records(host: Callable[..., PluginHost]) -> None:
    outcome = host(plugin_of(NOISE)).run(b"{")
    assert (worker_record("w", outcome), completion_record(outcome)) == (None, None)


def test_a_record_is_posted_as_json_with_the_key_whatever_a_netrc_says(
    server: RecordServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "netrc").write_text("machine 127.0.0.1 login someone password else\n")
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    usage = HttpUsage(f"{server.url}/metrics", key="usage-key")
    usage.put({"worker_id": "w", "generation_time": 1.5})
    usage.close()
    (request,) = server.records
    assert (request.method, request.path, request.json()) == (
        "POST",
        "/metrics",
        {"worker_id": "w", "generation_time": 1.5},
    )
    assert request.headers["content-type"] == "application/json"
    assert request.headers["authorization"] == "Bearer usage-key"
    assert usage.dropped == 0


@pytest.mark.parametrize("status", [500, 404, 302])
def test_a_record_that_is_refused_is_dropped_and_the_next_is_sent(server: RecordServer, status: int) -> None:
    usage = HttpUsage(server.url)
    server.status = status
    usage.put({"n": 1})
    wait_for(lambda: usage.dropped == 1)
    server.status = 200
    usage.put({"n": 2})
    usage.close()
    assert [request.json()["n"] for request in server.records] == [1, 2]
    assert usage.dropped == 1


def test_an_endpoint_that_hangs_or_is_down_holds_nobody_up(server: RecordServer) -> None:
    server.delay_seconds = 5.0
    for url in (server.url, "http://127.0.0.1:9"):
        usage = HttpUsage(url, timeout_seconds=0.2)
        started = time.monotonic()
        for number in range(1500):
            usage.put({"n": number})
        assert time.monotonic() - started < 0.5
        assert usage.dropped >= 499
        usage.close(timeout=0.05)
        assert time.monotonic() - started < 1.5
