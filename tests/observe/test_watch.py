"""What a worker is watched by follows its settings, and whatever is missing or taken costs it nothing."""

from __future__ import annotations

import os
import socket
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from ourvidz_core.delivery.board import MemoryBoard
from ourvidz_core.delivery.memory_queue import MemoryQueue
from ourvidz_core.observe.device import DeviceMonitor, visible_name
from ourvidz_core.observe.server import HealthServer
from ourvidz_core.observe.vitals import Vitals
from ourvidz_core.observe.watch import Subject, watched
from ourvidz_core.plugins.registry import Registry
from ourvidz_core.settings import Settings, load
from ourvidz_core.testing.host import PluginHost, plugin_of
from ourvidz_core.testing.servers import Answer, LocalServer, ReceivedRequest
from ourvidz_core.wire import events
from ourvidz_core.wire.states import EngineState, WorkerState

JOB = {"job_id": "job-1", "job_type": "acme"}
ACME = """
from ourvidz_core import JobType, hookimpl

@hookimpl
def register_job_types():
    yield JobType(name="acme", queue="acme_queue", content_type="image")
"""


class Collector(LocalServer):
    """Takes traces over OTLP."""

    def __init__(self) -> None:
        super().__init__()
        self.taken: list[ReceivedRequest] = []

    def answer(self, request: ReceivedRequest) -> Answer:
        self.taken.append(request)
        return Answer()


@pytest.fixture
def registry(host: Callable[..., PluginHost]) -> Registry:
    return host(plugin_of(ACME)).registry


def settings_of(tmp_path: Path, **environ: str) -> Settings:
    known = {"OURVIDZ_STATE_DIR": str(tmp_path), "OURVIDZ_DEVICE": "cpu", "OURVIDZ_HEALTH_ADDRESS": "off"}
    return load({**known, **environ})


@pytest.fixture
def watch(tmp_path: Path, registry: Registry) -> Callable[..., MemoryBoard]:
    """Watches a worker that does one job, by the settings given; answers the board."""

    def run(**environ: str) -> MemoryBoard:
        board = MemoryBoard()
        subject = Subject(
            queue=MemoryQueue(),
            queues=("acme_queue",),
            state=lambda: WorkerState.WORKING,
            engine=lambda: EngineState.READY,
            busy_seconds=lambda: 1.0,
            dropped_records=lambda: 0,
            vitals=Vitals(),
        )
        with watched(settings_of(tmp_path, **environ), registry, board, subject):
            registry.report(events.JobStarted(**JOB, attempt=1))
            registry.report(events.JobCompleted(**JOB, assets=1, seconds=1.0))
        return board

    return run


def test_traces_go_to_the_collector_that_is_set_with_its_headers(watch: Callable[..., MemoryBoard]) -> None:
    pytest.importorskip("opentelemetry.sdk")
    with Collector() as collector:
        watch(OTEL_EXPORTER_OTLP_ENDPOINT=collector.url, OTEL_EXPORTER_OTLP_HEADERS="x-key=abc, x-team = media")
        (request,) = collector.taken
    assert (request.method, request.path) == ("POST", "/v1/traces")
    assert (request.headers["x-key"], request.headers["x-team"]) == ("abc", "media")
    assert b"job acme" in request.body


def test_a_collector_that_hangs_or_is_down_keeps_no_worker_from_ending(watch: Callable[..., MemoryBoard]) -> None:
    pytest.importorskip("opentelemetry.sdk")
    with socket.create_server(("127.0.0.1", 0)) as deaf:
        for port in (deaf.getsockname()[1], 9):
            started = time.monotonic()
            assert watch(OURVIDZ_OTLP_ENDPOINT=f"http://127.0.0.1:{port}").recent()
            assert time.monotonic() - started < 8.0


def test_without_a_collector_opentelemetry_is_not_even_imported(
    watch: Callable[..., MemoryBoard], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delitem(sys.modules, "ourvidz_core.observe.traces", raising=False)
    assert [record.id for record in watch().recent()] == ["job-1"]
    assert "ourvidz_core.observe.traces" not in sys.modules


def test_a_collector_without_the_extra_is_said_and_the_worker_goes_on(
    watch: Callable[..., MemoryBoard], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.delitem(sys.modules, "ourvidz_core.observe.traces", raising=False)
    monkeypatch.setitem(sys.modules, "opentelemetry", None)
    assert [record.id for record in watch(OURVIDZ_OTLP_ENDPOINT="http://127.0.0.1:9").recent()] == ["job-1"]
    assert "pip install 'ourvidz-core[otel]'" in caplog.text


def test_a_port_that_is_taken_is_said_with_the_setting_and_the_worker_goes_on(
    watch: Callable[..., MemoryBoard], caplog: pytest.LogCaptureFixture
) -> None:
    other = HealthServer("127.0.0.1:0", {})
    board = watch(OURVIDZ_HEALTH_ADDRESS=other.address)
    other.close()
    assert [record.id for record in board.recent()] == ["job-1"]
    assert f"{other.address} cannot be had" in caplog.text
    assert "OURVIDZ_HEALTH_ADDRESS" in caplog.text


def test_a_machine_without_a_gpu_has_no_memory_of_one() -> None:
    for device, environ in [("cpu", {}), ("auto", {"CUDA_VISIBLE_DEVICES": "nonsense"}), ("cuda:7", {})]:
        monitor = DeviceMonitor(device, environ)
        assert monitor.memory() is None
        monitor.close()


@pytest.mark.parametrize(
    ("device", "visible", "name"),
    [
        ("auto", "", "0"),
        ("cuda", "", "0"),
        ("cuda:1", "", "1"),
        ("cuda:1", "3,5", "5"),
        ("cuda", "GPU-3f1b, GPU-77aa", "GPU-3f1b"),
        ("cuda:2", "0", "none"),
    ],
)
def test_a_device_is_named_as_the_driver_names_it(device: str, visible: str, name: str) -> None:
    assert visible_name(device, {"CUDA_VISIBLE_DEVICES": visible}) == name


@pytest.mark.gpu
def test_the_memory_of_a_gpu_is_what_torch_sees() -> None:
    import torch

    monitor = DeviceMonitor("cuda:0", os.environ)
    torch.zeros(1, device="cuda")  # what the first use of a device takes
    before = monitor.memory()
    held = torch.zeros(2**28, device="cuda")  # 1 GiB
    after = monitor.memory()
    free, total = torch.cuda.mem_get_info()
    assert after.used_gb - before.used_gb == pytest.approx(1.0, abs=0.1)
    assert after.total_gb == pytest.approx(total / 2**30, rel=0.02)
    assert after.used_gb == pytest.approx((total - free) / 2**30, abs=1.0)
    del held
    monitor.close()
