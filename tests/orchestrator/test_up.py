"""``ourvidz up`` with real workers: killed, looping, replaced, drained, and left alone."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest
from click.testing import CliRunner

from ourvidz_core.cli.main import cli
from ourvidz_core.delivery.embedded import EmbeddedRedis
from ourvidz_core.orchestrator.report import OrchestratorReport, WorkerReport, read_report
from ourvidz_core.orchestrator.slots import SlotState
from ourvidz_core.testing.distributions import make_distribution
from ourvidz_core.testing.servers import Bucket, SupabaseServer
from tests.deployment import Fleet
from tests.toy import SOURCE

#: The toy, whose checks and whose import do what the environment says.
CHECKED = (
    """
import os, sys
if os.environ.get("TOY_IMPORT") == "exit" and "worker" in sys.argv:
    print("the toy has lost its wheels", file=sys.stderr)
    os._exit(7)
"""
    + SOURCE
    + """

from ourvidz_core import Check, Finding


@hookimpl
def doctor_checks(settings):
    lost = [name for name in os.environ.get("TOY_LOST", "").split(",") if name]
    finding = Finding.red("a wheel is lost", cure="fit a wheel", job_types=lost) if lost else Finding.green("fine")
    yield Check(name="models of acme-toy", run=lambda: [finding], is_at_start=True)
"""
)


class Up:
    """One ``ourvidz up`` and what is known of its workers."""

    def __init__(self, fleet: Fleet, directory: Path) -> None:
        self.fleet = fleet
        self.state = directory / "state"
        self.log = directory / "up.log"
        self.process: subprocess.Popen[bytes] | None = None

    def start(self, *arguments: str, **environ: str) -> None:
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "ourvidz_core", "up", *arguments],
                env={**self.fleet.environ, "OURVIDZ_RESTART_FIRST_SECONDS": "0.05", **environ},
                stderr=log,
            )

    @property
    def report(self) -> OrchestratorReport | None:
        report, is_alive = read_report(self.state / "up")
        return report if is_alive else None

    def worker(self, name: str = "worker") -> WorkerReport | None:
        return next((worker for worker in (self.report.workers if self.report else ()) if worker.name == name), None)

    def is_ready(self, name: str = "worker", *, not_pid: int | None = None) -> bool:
        worker = self.worker(name)
        return worker is not None and worker.state is SlotState.READY and worker.pid != not_pid

    def pid(self, name: str = "worker") -> int:
        worker = self.worker(name)
        assert worker is not None
        assert worker.pid is not None
        return worker.pid

    def wait_for(self, condition: Callable[[], object], seconds: float = 20.0) -> None:
        deadline = time.monotonic() + seconds
        while not condition():
            assert time.monotonic() < deadline, self.log.read_text()[-4000:]
            time.sleep(0.02)

    def tell(self, number: int) -> None:
        assert self.process is not None
        self.process.send_signal(number)

    def ends(self) -> int:
        assert self.process is not None
        return self.process.wait(20)

    def close(self) -> None:
        if self.process is not None and self.process.poll() is None:
            self.process.kill()
            self.process.wait()


@pytest.fixture
def up(redis_server: EmbeddedRedis, tmp_path: Path) -> Iterator[Up]:
    make_distribution(tmp_path / "site", "acme-toy", CHECKED)
    buckets = {"toy_image": Bucket(), "toy_brief": Bucket()}
    with (
        SupabaseServer(buckets=buckets) as supabase,
        Fleet.on(redis_server, tmp_path, "toy_queue", supabase) as fleet,
    ):
        fleet.environ |= {
            "PYTHONPATH": str(tmp_path / "site"),
            "OURVIDZ_ALLOW_PLUGINS": "acme-toy",
            "OURVIDZ_DEVICE": "cpu",
        }
        one = Up(fleet, tmp_path)
        yield one
        one.close()


def everything_of(up: Up) -> list[psutil.Process]:
    """The orchestrator's workers and engines, and whatever those started."""
    assert up.process is not None
    return psutil.Process(up.process.pid).children(recursive=True)


def alive(processes: list[psutil.Process]) -> list[str]:
    found = []
    for process in processes:
        with contextlib.suppress(psutil.NoSuchProcess):
            if process.is_running() and process.status() != psutil.STATUS_ZOMBIE:
                found.append(" ".join(process.cmdline()))
    return found


def push(up: Up, job_id: str, job_type: str = "toy_image", **config: object) -> None:
    up.fleet.push_message({"id": job_id, "type": job_type, "prompt": "", "config": config})


def statuses(up: Up, job_id: str) -> list[str]:
    return [body["status"] for body in up.fleet.callbacks(job_id)]


def test_a_killed_worker_is_started_again_its_job_is_done_and_what_it_cannot_do_is_left(up: Up) -> None:
    up.start(TOY_LOST="toy_brief")
    up.wait_for(up.is_ready)
    push(up, "impossible", "toy_brief")
    push(up, "killed", what="sleep", seconds=1.0)
    up.wait_for(lambda: statuses(up, "killed") == ["processing"] and len(everything_of(up)) > 1)
    first, processes = up.pid(), everything_of(up)
    os.kill(first, signal.SIGKILL)
    up.wait_for(lambda: up.is_ready(not_pid=first))
    up.wait_for(lambda: not alive(processes))
    worker = up.worker()
    assert worker is not None
    assert (worker.restarts, worker.failures, worker.last_ending) == (1, 1, "signal SIGKILL")
    up.wait_for(lambda: statuses(up, "killed")[-1:] == ["completed"])

    depth = up.fleet.queue.depth("toy_queue")
    assert (statuses(up, "impossible"), depth.retrying, depth.in_flight) == ([], 1, 0)
    assert worker.left_out == {"toy_brief": "a wheel is lost (cure: fit a wheel)"}
    shown = CliRunner(env=up.fleet.environ).invoke(cli, ["status"], standalone_mode=False)
    assert "worker does not take toy_brief: a wheel is lost (cure: fit a wheel)" in shown.output
    assert shown.return_value == 0

    push(up, "drained", what="sleep", seconds=0.6)
    up.wait_for(lambda: statuses(up, "drained") == ["processing"])
    processes = everything_of(up)
    up.tell(signal.SIGTERM)
    assert up.ends() == 0
    # Its callback may wait in the books for the next worker.
    (reported,) = [*statuses(up, "drained")[1:], *(row.job_id for row in up.fleet.queue.waiting_callbacks("toy_queue"))]
    assert reported in ("completed", "drained")
    assert up.fleet.queue.depth("toy_queue").in_flight == 0
    assert alive(processes) == []
    report, is_alive = read_report(up.state / "up")
    assert report is not None
    assert not is_alive
    assert [one.state for one in report.workers] == [SlotState.STOPPED]
    log = up.log.read_text()
    assert "worker | " in log
    assert "all workers have ended" in log


def test_sigkill_of_the_orchestrator_leaves_no_process_and_no_job_in_anybodys_hands(up: Up) -> None:
    up.start()
    up.wait_for(up.is_ready)
    push(up, "left", what="sleep", seconds=30.0)
    up.wait_for(lambda: statuses(up, "left") == ["processing"] and len(everything_of(up)) > 1)
    processes = everything_of(up)
    up.tell(signal.SIGKILL)
    up.ends()
    up.wait_for(lambda: not alive(processes))
    depth = up.fleet.queue.depth("toy_queue")
    assert (depth.in_flight, depth.retrying) == (0, 1), "it was not handed back"
    shown = CliRunner(env=up.fleet.environ).invoke(cli, ["status"], standalone_mode=False)
    assert "ourvidz up does not run" in shown.output
    assert shown.return_value == 1


def test_a_crash_loop_is_told_with_the_end_of_the_log_and_never_given_up(up: Up) -> None:
    up.start("--no-checks", TOY_IMPORT="exit", OURVIDZ_RESTART_LONGEST_SECONDS="0.05")
    up.wait_for(lambda: (worker := up.worker()) and worker.is_looping)
    shown = CliRunner(env=up.fleet.environ).invoke(cli, ["status"], standalone_mode=False)
    assert shown.return_value == 1
    assert "crash loop: " in shown.output
    assert "last exit status 7" in shown.output
    assert "the toy has lost its wheels" in shown.output
    up.tell(signal.SIGTERM)
    assert up.ends() == 0


@pytest.mark.slow
def test_sighup_replaces_one_worker_after_the_other_and_interrupts_no_job(up: Up) -> None:
    up.start("--workers=2")
    names = ("worker-1", "worker-2")
    up.wait_for(lambda: all(up.is_ready(name) for name in names))
    before = {name: up.pid(name) for name in names}
    for number in range(6):
        push(up, f"job{number}", what="sleep", seconds=0.5)
    up.wait_for(lambda: statuses(up, "job0"))
    up.tell(signal.SIGHUP)
    least_ready = 2

    def is_done() -> bool:
        nonlocal least_ready
        ready = [name for name in names if up.is_ready(name)]
        least_ready = min(least_ready, len(ready))
        return len(ready) == 2 and all(up.pid(name) != before[name] for name in names)

    up.wait_for(is_done)
    up.wait_for(lambda: all(statuses(up, f"job{number}")[-1:] == ["completed"] for number in range(6)))
    assert least_ready == 1
    assert [statuses(up, f"job{number}").count("processing") for number in range(6)] == [1] * 6
    assert all(up.worker(name).failures == 0 for name in names)


@pytest.mark.parametrize(
    ("broken", "said"),
    [
        ({"TOY_LOST": "toy_brief,toy_image"}, "no queue can be served here. toy_queue: a wheel is lost"),
        ({"OURVIDZ_STORAGE_DIR": "/proc/nowhere"}, "/proc/nowhere"),
        ({"policy": "allkeys-lru"}, "maxmemory-policy is allkeys-lru"),
    ],
    ids=["no model", "unwritable storage", "eviction"],
)
def test_a_worker_refuses_to_start_where_jobs_would_be_lost(broken: dict, said: str, up: Up, monkeypatch) -> None:
    environ = {**up.fleet.environ, **broken}
    policy = environ.pop("policy", "noeviction")
    up.fleet.client.config_set("maxmemory-policy", policy)
    # In this process the plugin is found by its directory, and the environment is the test's.
    monkeypatch.syspath_prepend(environ["PYTHONPATH"])
    try:
        refused = CliRunner(env=environ).invoke(cli, ["worker"], standalone_mode=False)
    finally:
        up.fleet.client.config_set("maxmemory-policy", "noeviction")
    assert said in str(refused.exception)
    assert "--no-checks" in str(refused.exception)


@pytest.mark.slow
def test_sighup_reads_the_settings_again_and_changes_nothing_where_they_cannot_be_used(up: Up, tmp_path: Path) -> None:
    settings = tmp_path / "settings.toml"

    def write(*names: str) -> None:
        settings.write_text("".join(f'[[ourvidz.workers]]\nname = "{name}"\n' for name in names))

    write("old", "kept")
    up.start(f"--config={settings}")
    up.wait_for(lambda: up.is_ready("old") and up.is_ready("kept"))
    kept, gone = up.pid("kept"), psutil.Process(up.pid("old"))
    settings.write_text("[ourvidz]\nstall_seconds = -1\n")
    up.tell(signal.SIGHUP)
    up.wait_for(lambda: "no worker is replaced" in up.log.read_text())
    assert "OURVIDZ_STALL_SECONDS" in up.log.read_text()
    assert (up.pid("kept"), gone.is_running()) == (kept, True)
    write("kept", "new")
    up.tell(signal.SIGHUP)
    up.wait_for(lambda: up.is_ready("new") and up.is_ready("kept", not_pid=kept) and up.worker("old") is None)
    assert alive([gone]) == []


@pytest.mark.slow
def test_a_worker_that_hangs_is_killed_and_replaced(up: Up) -> None:
    up.start(OURVIDZ_SILENCE_SECONDS="2")
    up.wait_for(up.is_ready)
    first = up.pid()
    os.kill(first, signal.SIGSTOP)
    up.wait_for(lambda: up.is_ready(not_pid=first))
    assert "worker hangs: no sign of life for 2 s" in up.log.read_text()
    assert up.worker().last_ending == "signal SIGKILL"


def test_two_orchestrators_do_not_share_a_state_directory(up: Up, monkeypatch) -> None:
    from ourvidz_core.orchestrator.report import ReportFile

    held = ReportFile(up.state / "up")
    monkeypatch.syspath_prepend(up.fleet.environ["PYTHONPATH"])
    refused = CliRunner(env=up.fleet.environ).invoke(cli, ["up"], standalone_mode=False)
    held.close()
    assert "another ourvidz up runs" in str(refused.exception)
