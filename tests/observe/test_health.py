"""Health and readiness: what they rest on, and the pages that say so."""

from __future__ import annotations

import http.client
import json
import socket

import pytest

from ourvidz_core.observe.server import Answer, HealthServer
from ourvidz_core.observe.vitals import HUNG_SECONDS, SILENT_SECONDS, Vitals
from ourvidz_core.wire import events
from ourvidz_core.wire.states import EngineState, WorkerState

JOB = {"job_id": "a", "job_type": "t"}
READY = (WorkerState.IDLE, EngineState.STOPPED)


class Clock:
    now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def vitals(clock: Clock) -> Vitals:
    made = Vitals(clock)
    for loop in ("claims", "leases"):
        made.turn(loop)
    made.queue_answered()
    return made


def test_a_worker_whose_loops_turn_is_alive_and_one_with_a_loop_that_hangs_is_not(vitals: Vitals, clock: Clock) -> None:
    assert vitals.health().is_good
    clock.now += HUNG_SECONDS
    vitals.turn("leases")
    verdict = vitals.health()
    assert not verdict.is_good
    assert verdict.checks == {"claims": "hangs for 120 s", "leases": "ok"}


def test_a_worker_that_has_ended_its_claims_does_not_hang(vitals: Vitals, clock: Clock) -> None:
    vitals.end("claims")
    clock.now += HUNG_SECONDS
    vitals.turn("leases")
    assert vitals.health().is_good


def test_an_outage_of_redis_makes_a_worker_unready_and_does_not_have_it_restarted(vitals: Vitals, clock: Clock) -> None:
    assert vitals.readiness(*READY).is_good
    clock.now += SILENT_SECONDS
    verdict = vitals.readiness(*READY)
    assert not verdict.is_good
    assert verdict.checks["redis"] == "has not answered for 60 s"
    assert vitals.health().is_good
    vitals.queue_answered()
    assert vitals.readiness(*READY).is_good


def test_before_redis_has_answered_nobody_is_ready() -> None:
    assert Vitals().readiness(*READY).checks["redis"] == "has not answered yet"


@pytest.mark.parametrize(
    ("state", "engine", "bad"),
    [
        (WorkerState.STARTING, EngineState.STOPPED, "worker"),
        (WorkerState.DRAINING, EngineState.READY, "worker"),
        (WorkerState.IDLE, EngineState.FAILED, "engine"),
        (WorkerState.WORKING, EngineState.STARTING, None),
        (WorkerState.WORKING, EngineState.READY, None),
    ],
)
def test_who_drains_or_has_no_engine_is_not_ready(
    vitals: Vitals, state: WorkerState, engine: EngineState, bad: str | None
) -> None:
    verdict = vitals.readiness(state, engine)
    assert [name for name, check in verdict.checks.items() if check != "ok"] == ([bad] if bad else [])
    assert verdict.is_good == (bad is None)


def test_storage_that_refused_the_last_asset_is_no_storage_until_it_takes_one(vitals: Vitals, clock: Clock) -> None:
    refused = events.JobRetried(**JOB, error_type="StorageUnavailable", message="503", attempt=1, delay_seconds=1.0)
    vitals(event=refused)
    assert vitals.readiness(*READY).checks["storage"] == "refused the last asset: StorageUnavailable"
    vitals(event=events.AssetStored(**JOB, bucket="b", path="p", size_bytes=1, media_type="image/png", seconds=0.1))
    assert vitals.readiness(*READY).is_good
    vitals(event=events.JobFailed(**JOB, error_type="AssetRejected", message="too large"))
    assert vitals.readiness(*READY).is_good, "an asset that is too large says nothing of storage"
    vitals(event=refused)
    clock.now += 3600
    vitals.queue_answered()
    assert vitals.readiness(*READY).is_good


# -- the pages


@pytest.fixture
def server():
    def broken(_: object) -> Answer:
        raise RuntimeError("CANARY")

    pages = {
        "/good": lambda _: Answer.of(True, {"x": 1}),
        "/bad": lambda _: Answer.of(False, {}),
        "/broken": broken,
        "/echo": lambda headers: Answer(body=headers["accept"].encode(), media_type="text/plain"),
    }
    made = HealthServer("127.0.0.1:0", pages)
    yield made
    made.close()


def ask(address: str, method: str, path: str, **headers: str) -> tuple[int, bytes]:
    connection = http.client.HTTPConnection(address, timeout=5)
    connection.request(method, path, headers=headers)
    answer = connection.getresponse()
    body = answer.read()
    connection.close()
    return answer.status, body


def test_a_page_answers_with_its_verdict(server: HealthServer) -> None:
    status, body = ask(server.address, "GET", "/good?x=1")
    assert (status, json.loads(body)) == (200, {"status": "ok", "x": 1})
    assert ask(server.address, "GET", "/bad")[0] == 503
    assert ask(server.address, "GET", "/echo", accept="text/x") == (200, b"text/x")
    assert ask(server.address, "HEAD", "/good") == (200, b"")


def test_a_page_that_fails_tells_the_log_and_not_the_world(server: HealthServer) -> None:
    status, body = ask(server.address, "GET", "/broken")
    assert status == 503
    assert b"CANARY" not in body


@pytest.mark.parametrize("method", ["POST", "PUT", "DELETE", "PATCH", "OPTIONS", "CONNECT", "TRACE"])
def test_nothing_can_be_changed_from_outside(server: HealthServer, method: str) -> None:
    assert ask(server.address, method, "/good")[0] == 501


def test_other_paths_are_no_files(server: HealthServer) -> None:
    for path in ("/", "/../../etc/passwd", "/good/../broken"):
        assert ask(server.address, "GET", path)[0] == 404


def test_a_closed_server_gives_its_port_back_at_once(server: HealthServer) -> None:
    with pytest.raises(OSError, match="in use"):
        HealthServer(server.address, {})
    server.close()
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(("127.0.0.1", int(server.address.rpartition(":")[2])), timeout=1)
    again = HealthServer(server.address, {"/good": lambda _: Answer.of(True, {})})
    assert ask(again.address, "GET", "/good")[0] == 200
    again.close()
