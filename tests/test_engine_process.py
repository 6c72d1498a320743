"""The engine process: warm between jobs, and replaced whatever happens to it."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from multiprocessing.connection import Pipe
from pathlib import Path

import attrs
import psutil
import pytest

from ourvidz_core.engine.host import EngineProcess
from ourvidz_core.engine.processes import kill_session
from ourvidz_core.errors import (
    ArtifactError,
    DiskFull,
    EngineCrashed,
    EngineUnusable,
    GenerationError,
    HookFailed,
    JobCancelled,
    JobError,
    JobTimeout,
    OutOfMemory,
    PayloadError,
)
from ourvidz_core.plugins.loading import load_registry
from ourvidz_core.settings import Settings, engine_environment, load
from ourvidz_core.testing.distributions import make_distribution
from ourvidz_core.wire.jobs import Job, References
from ourvidz_core.wire.payloads import Payload

SOURCE = """
import os, signal, subprocess, sys, time
from enum import StrEnum
from datetime import datetime
from pathlib import Path
import attrs
from attrs import frozen
from ourvidz_core import Artifact, Command, Generation, JobType, OutOfMemory, PayloadError, hookimpl

class Tint(StrEnum):
    RED = "red"
    BLUE = "blue"

@frozen(kw_only=True)
class Corner:
    x: int = 0

@frozen(kw_only=True)
class Config:
    what: str = "draw"
    tint: Tint = Tint.RED
    corners: tuple[Corner, ...] = ()
    size: tuple[int, int] = (16, 16)
    since: datetime | None = None
    source: Path | None = None
    names: frozenset[str] = frozenset()
    count: int | None = None

loads = 0

@hookimpl
def register_job_types():
    yield JobType(name="acme", queue="acme_queue", content_type="image", preset=Config(), timeout_seconds=20)

@hookimpl
def parse_job(job_type, payload):
    from ourvidz_core import default_job
    job = default_job(job_type, payload)
    return attrs.evolve(job, asset_count=job.config.count)

@hookimpl
def prepare_job(job):
    if job.config.what == "prepare":
        return attrs.evolve(job, enhanced_prompt="better", facts={"prepared": True})
    if job.config.what == "prepare nonsense":
        return attrs.evolve(job, seed="seven")

def picture(context, seed=0):
    from PIL import Image
    path = context.output_path("png")
    Image.linear_gradient("L").resize((16, 16)).save(path)
    return Artifact(path=path, media_type="image/png", seed=seed)

SLEEPER = [sys.executable, "-S", "-c", "import time; time.sleep(600)"]

@hookimpl
def generate(job, context):
    global loads
    what = job.config.what
    def load():
        global loads
        loads += 1
        return object()
    context.models.get("acme", load)
    facts = {"loads": loads, "pid": os.getpid()}
    if what == "print":
        print("{}" * 1000); sys.stdout.flush()
        os.write(1, b"noise" * 1000); os.write(2, b"\\xff" * 20000); os.system("echo from a shell")
    elif what == "raise": raise RuntimeError("the acme broke")
    elif what == "exit": sys.exit(3)
    elif what == "interrupt": raise KeyboardInterrupt("no hands")
    elif what == "os_exit": os._exit(7)
    elif what == "segfault":
        import ctypes
        ctypes.string_at(0)
    elif what == "kill": os.kill(os.getpid(), signal.SIGKILL)
    elif what == "kill and leave the pipe":
        os.fork() or time.sleep(600)
        os.kill(os.getpid(), signal.SIGKILL)
    elif what == "hang": time.sleep(600)
    elif what == "grandchildren":
        ways = ({}, {"process_group": 0}, {"start_new_session": True})
        children = [subprocess.Popen(SLEEPER, **way) for way in ways]
        Path(os.environ["ACME_PIDS"]).write_text(" ".join(str(c.pid) for c in children))
        time.sleep(600)
    elif what == "command":
        Path(os.environ["ACME_PIDS"]).write_text(str(os.getpid()))
        context.run(Command(argv=SLEEPER))
    elif what == "steps":
        for step in range(400):
            context.progress(step, 400); time.sleep(0.05)
    elif what == "flood":
        for step in range(20000): context.progress(1, 1)
    elif what == "odd progress": context.progress("soon", 3)
    elif what == "oom": raise OutOfMemory("too little of it")
    elif what == "torch oom":
        class OutOfMemoryError(RuntimeError): pass
        raise OutOfMemoryError("CUDA out of memory. Tried to allocate 20 GiB")
    elif what == "sticky": raise RuntimeError("CUDA error: an illegal memory access was encountered")
    elif what == "full": raise OSError(28, "No space left on device")
    elif what == "payload": raise PayloadError("the acme wants more")
    elif what == "nonsense": return "three pictures, I promise"
    elif what == "none": return Generation(artifacts=())
    elif what == "no artifact": return Generation(artifacts=("a.png",))
    elif what == "text path": return Generation(artifacts=(Artifact(path="a.png", media_type="image/png"),))
    elif what == "odd facts": return Generation(artifacts=(picture(context),), facts={"nan": float("nan")})
    elif what == "odd seed": return Generation(artifacts=(picture(context, "seven"),))
    elif what == "empty":
        path = context.output_path("png"); path.write_bytes(b"")
        return Generation(artifacts=(Artifact(path=path, media_type="image/png"),))
    elif what == "missing":
        return Generation(artifacts=(Artifact(path=context.output_path("png"), media_type="image/png"),))
    elif what == "elsewhere":
        return Generation(artifacts=(Artifact(path=Path("/etc/hostname"), media_type="image/png"),))
    elif what == "link":
        path = context.output_path("png"); path.symlink_to("/etc/hostname")
        return Generation(artifacts=(Artifact(path=path, media_type="image/png"),))
    elif what == "video":
        return Generation(artifacts=(attrs.evolve(picture(context), media_type="video/mp4"),))
    elif what == "twice":
        one = picture(context)
        return Generation(artifacts=(one, one))
    elif what == "finish": return Generation(finish=lambda: (picture(context, job.seed),), facts=facts)
    elif what == "finish and artifacts":
        return Generation(artifacts=(picture(context),), finish=lambda: (picture(context),))
    elif what == "finish raises":
        def break_it(): raise RuntimeError("no ink")
        return Generation(finish=break_it)
    elif what == "finish nonsense": return Generation(finish=lambda: "three pictures")
    elif what == "environment": facts |= {"environ": dict(os.environ)}
    elif what == "config": facts |= {"config": repr(job.config)}
    elif what == "collector":
        import gc
        facts |= {"collects": gc.isenabled(), "frozen": gc.get_freeze_count()}
    return Generation(artifacts=(picture(context, job.seed),), facts=facts)
"""

USER = "user-1"


@pytest.fixture(scope="module")
def shared_engine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[EngineProcess]:
    """One engine for many tests: it has to live on after each of them anyway."""
    site = tmp_path_factory.mktemp("site")
    make_distribution(site, "acme", SOURCE)
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(site))
        registry = load_registry(Settings(allow_plugins=["acme"]))
        environ = {"PYTHONPATH": str(site), "OURVIDZ_ALLOW_PLUGINS": "acme", "ACME_PIDS": str(site / "pids")}
        engine = EngineProcess(registry, {**os.environ, **environ})
        engine.registry, engine.pids = registry, site / "pids"
        yield engine
        engine.close()
        del sys.modules["acme"]


@pytest.fixture
def engine(shared_engine: EngineProcess) -> EngineProcess:
    shared_engine.pids.unlink(missing_ok=True)
    return shared_engine


@pytest.fixture
def make_job(engine: EngineProcess) -> Callable[..., Job]:
    def make(what: str, **config: object) -> Job:
        payload = Payload(
            id="job-1", type="acme", prompt="a toy", user_id=USER, config={"what": what, "seed": 7, **config}
        )
        return engine.registry.get("acme").parse_job(payload)

    return make


@pytest.fixture
def work(engine: EngineProcess, make_job: Callable[..., Job], tmp_path: Path) -> Callable:
    count = iter(range(1000))

    def run(what: str, *, seconds: float = 20.0, config: dict | None = None, **parts: object) -> object:
        directory = tmp_path / f"job-{next(count)}"
        directory.mkdir()
        return engine.run(make_job(what, **(config or {})), work_dir=directory, timeout_seconds=seconds, **parts)

    return run


def is_alive(pid: int) -> bool:
    with contextlib.suppress(psutil.NoSuchProcess):
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    return False


def all_gone(pids: list[int], seconds: float = 5.0) -> bool:
    deadline = time.monotonic() + seconds
    while any(map(is_alive, pids)):
        if time.monotonic() > deadline:
            return False
        time.sleep(0.02)
    return True


def pids_in(file: Path, seconds: float = 10.0) -> list[int]:
    deadline = time.monotonic() + seconds
    while not (file.exists() and file.read_text()):
        assert time.monotonic() < deadline
        time.sleep(0.02)
    return [int(pid) for pid in file.read_text().split()]


# -- the good way


def test_what_is_warm_stays_warm_and_what_a_plugin_prints_harms_nothing(work: Callable) -> None:
    first, loud, third = work("draw"), work("print"), work("draw")

    assert {run.generation.facts["loads"] for run in (first, loud, third)} == {1}
    assert len({run.generation.facts["pid"] for run in (first, loud, third)}) == 1
    assert first.generation.artifacts[0].seed == 7
    assert (first.generation.artifacts[0].width, first.seconds > 0) == (16, True)


def test_from_the_second_job_on_garbage_is_collected_and_what_stays_is_not_looked_at(work: Callable) -> None:
    work("draw")
    facts = work("collector").generation.facts
    assert facts["collects"]
    assert facts["frozen"] > 10_000


def test_files_that_are_written_when_the_device_is_free_come_back_like_others(work: Callable) -> None:
    finished = work("finish")

    assert (finished.generation.artifacts[0].width, finished.generation.finish) == (16, None)
    assert finished.generation.facts["loads"] == 1


def test_the_prepared_job_comes_back(work: Callable) -> None:
    finished = work("prepare")

    assert (finished.job.enhanced_prompt, finished.job.facts) == ("better", {"prepared": True})


def test_a_config_of_every_kind_crosses_the_pipe(
    engine: EngineProcess, make_job: Callable[..., Job], work: Callable
) -> None:
    config = {"tint": "blue", "corners": [{"x": 3}], "size": [1, 2], "since": "2025-07-19T19:00:00Z", "names": ["a"]}

    job = attrs.evolve(
        make_job("config", **config),
        references=References.choose(single="https://a.example/x.png"),
        created_at=datetime(2025, 7, 19, tzinfo=UTC),
        expected_seconds=3.5,
        asset_count=1,
        facts={"list": [1, None]},
    )

    assert work("config", config=config).generation.facts["config"] == repr(job.config)


def test_progress_is_told_and_a_flood_of_it_is_not_passed_on(work: Callable) -> None:
    seen: list[tuple[str, int, int]] = []

    work("flood", on_progress=lambda *step: seen.append(step))

    assert seen == [("generate", 1, 1)]


def test_the_engine_holds_no_secret(install: Callable, engine_of: Callable, tmp_path: Path) -> None:
    install("acme", SOURCE)
    environ = {
        **os.environ,
        "SUPABASE_SERVICE_KEY": "canary-key",
        "COPY": "x canary-key y",
        "REDIS_URL": "redis://canary@h",
    }
    engine = engine_of("acme")
    engine._environ = engine_environment(load(environ), {**environ, **engine._environ, "COPY": environ["COPY"]})
    payload = Payload(id="a", type="acme", prompt="", user_id="u", config={"what": "environment"})

    finished = engine.run(engine.registry.get("acme").parse_job(payload), work_dir=tmp_path, timeout_seconds=20)

    assert "canary" not in str(finished.generation.facts["environ"])
    assert finished.generation.facts["environ"]["OURVIDZ_ALLOW_PLUGINS"] == "acme"


# -- the bad ways


@pytest.mark.parametrize(
    ("what", "error", "said", "stays"),
    [
        pytest.param("raise", HookFailed, "acme failed in generate: RuntimeError: the acme broke", True, id="raises"),
        pytest.param("exit", HookFailed, r"it called sys\.exit\(3\)", True, id="sys.exit"),
        pytest.param("payload", PayloadError, "the acme wants more", True, id="an error of ours"),
        pytest.param("full", DiskFull, "no room is left", True, id="full disk"),
        pytest.param("oom", OutOfMemory, "too little of it", False, id="out of memory"),
        pytest.param("torch oom", OutOfMemory, "CUDA out of memory", False, id="torch out of memory"),
        pytest.param("sticky", EngineUnusable, "illegal memory access", False, id="a broken CUDA context"),
        pytest.param("nonsense", HookFailed, "not a Generation", True, id="nonsense"),
        pytest.param("none", HookFailed, "without artifacts", True, id="no artifacts"),
        pytest.param("no artifact", HookFailed, "not an Artifact", True, id="no artifact"),
        pytest.param("text path", HookFailed, "not an Artifact with a pathlib.Path", True, id="a path as text"),
        pytest.param(
            "odd facts", HookFailed, "facts hold something that JSON cannot", True, id="facts that are no JSON"
        ),
        pytest.param(
            "odd seed", HookFailed, r"\$\.artifacts\[0\]\.seed: expected an integer", True, id="a seed of text"
        ),
        pytest.param(
            "prepare nonsense", HookFailed, r"\$\.seed: expected an integer", True, id="a prepared seed of text"
        ),
        pytest.param("odd progress", HookFailed, "ValueError", True, id="progress of text"),
        pytest.param("empty", ArtifactError, "is empty", True, id="an empty file"),
        pytest.param("missing", ArtifactError, "was not written", True, id="no file"),
        pytest.param(
            "elsewhere", ArtifactError, "does not lie in the job's work directory", True, id="a file elsewhere"
        ),
        pytest.param("link", ArtifactError, "does not lie in the job's work directory", True, id="a link elsewhere"),
        pytest.param("video", ArtifactError, "declared as video/mp4", True, id="another media type"),
        pytest.param("twice", HookFailed, "one file as two artifacts", True, id="one file twice"),
        pytest.param(
            "finish and artifacts", HookFailed, "one of them makes the files", True, id="a finish and artifacts"
        ),
        pytest.param(
            "finish raises",
            HookFailed,
            "failed in the finish of generate: RuntimeError: no ink",
            True,
            id="finish raises",
        ),
        pytest.param("finish nonsense", HookFailed, "without artifacts", True, id="finish of nonsense"),
        pytest.param("interrupt", EngineCrashed, r"SIGINT\): KeyboardInterrupt: no hands", False, id="an interrupt"),
        pytest.param("os_exit", EngineCrashed, "exit status 7", False, id="os._exit"),
        pytest.param("segfault", EngineCrashed, r"signal SIGSEGV\): Fatal Python error: Seg", False, id="segfault"),
        pytest.param("kill", EngineCrashed, "signal SIGKILL", False, id="killed"),
        pytest.param(
            "kill and leave the pipe", EngineCrashed, "signal SIGKILL", False, id="killed, a child holds the pipe"
        ),
    ],
)
def test_each_failure_has_its_error_and_the_next_job_completes(
    work: Callable, engine: EngineProcess, what: str, error: type[JobError], said: str, stays: bool
) -> None:
    before = work("draw").generation.facts["pid"]
    started = time.monotonic()

    with pytest.raises(error, match=said):
        work(what)

    assert time.monotonic() - started < 5
    assert (engine.pid == before) is stays
    assert (work("draw").generation.facts["pid"] == before) is stays


def test_a_wrong_number_of_files_is_refused(work: Callable) -> None:
    with pytest.raises(ArtifactError, match="3 files were asked for and acme made 1"):
        work("draw", config={"count": 3})


def test_an_earlier_jobs_log_is_not_the_reason_for_a_later_crash(work: Callable) -> None:
    with pytest.raises(HookFailed):
        work("raise")

    with pytest.raises(EngineCrashed) as caught:
        work("os_exit")

    assert "the acme broke" not in caught.value.message


def test_a_hang_ends_with_the_engine(work: Callable, engine: EngineProcess, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ourvidz_core.engine.host.GRACE_SECONDS", 0.3)
    before = work("draw").generation.facts["pid"]
    started = time.monotonic()

    with pytest.raises(JobTimeout, match=r"after 0\.3 s"):
        work("hang", seconds=0.3)

    assert time.monotonic() - started < 2
    assert all_gone([before])
    assert work("draw").generation.facts["pid"] != before


def test_a_plugin_that_reports_its_steps_ends_at_its_deadline_and_stays_warm(work: Callable) -> None:
    before = work("draw").generation.facts["pid"]

    with pytest.raises(JobTimeout):
        work("steps", seconds=0.3)

    assert work("draw").generation.facts["pid"] == before


@pytest.mark.parametrize(("what", "stays"), [("steps", True), ("hang", False)])
def test_a_job_that_is_cancelled_ends(work: Callable, what: str, stays: bool) -> None:
    before = work("draw").generation.facts["pid"]
    cancelled = threading.Event()
    threading.Timer(0.3, cancelled.set).start()
    started = time.monotonic()

    with pytest.raises(JobCancelled):
        work(what, cancelled=cancelled)

    assert time.monotonic() - started < 3
    assert (work("draw").generation.facts["pid"] == before) is stays


def test_killed_from_outside_between_jobs_it_is_just_started_again(work: Callable, engine: EngineProcess) -> None:
    before = work("draw").generation.facts["pid"]
    os.kill(before, signal.SIGKILL)
    assert all_gone([before])
    time.sleep(0.1)  # its first thread is gone; the others follow

    assert work("draw").generation.facts["pid"] != before


def test_killed_from_outside_in_mid_generation_the_job_fails_at_once(work: Callable, engine: EngineProcess) -> None:
    engine.start()
    threading.Timer(0.3, os.kill, (engine.pid, signal.SIGKILL)).start()
    started = time.monotonic()

    with pytest.raises(EngineCrashed, match="SIGKILL"):
        work("hang")

    assert time.monotonic() - started < 3
    work("draw")


def test_a_caller_that_fails_does_not_leave_its_result_to_the_next_job(work: Callable) -> None:
    def fail(stage: str, step: int, total: int) -> None:
        raise ValueError("the caller broke")

    with pytest.raises(ValueError, match="the caller broke"):
        work("flood", on_progress=fail)

    assert work("prepare").job.enhanced_prompt == "better"


@pytest.mark.parametrize("what", ["grandchildren", "command"])
def test_nothing_that_a_job_started_outlives_its_engine(
    work: Callable, engine: EngineProcess, monkeypatch: pytest.MonkeyPatch, what: str
) -> None:
    monkeypatch.setattr("ourvidz_core.engine.host.GRACE_SECONDS", 0.2)
    engine.start()
    family: list[int] = []

    def watch() -> None:
        pids_in(engine.pids)
        time.sleep(0.2)
        family.extend(child.pid for child in psutil.Process(engine.pid).children(recursive=True))

    watcher = threading.Thread(target=watch)
    watcher.start()
    with pytest.raises((JobTimeout, EngineCrashed)):
        work(what, seconds=1.0)
    watcher.join()

    assert family
    assert all_gone(family)


WORKER = """
import sys, pathlib
from ourvidz_core.engine.host import EngineProcess
from ourvidz_core.plugins.loading import load_registry
from ourvidz_core.settings import load
from ourvidz_core.wire.payloads import Payload
import os
registry = load_registry(load())
what = sys.argv[1]
environ = {**os.environ, **({"ACME_SLOW": "1"} if what == "start" else {})}
engine = EngineProcess(registry, environ)
payload = Payload(id="a", type="acme", prompt="", user_id="u", config={"what": what})
engine.run(registry.get("acme").parse_job(payload), work_dir=pathlib.Path(sys.argv[2]), timeout_seconds=60)
"""


@pytest.mark.parametrize("what", ["grandchildren", "command", "start"])
def test_nothing_is_left_after_the_worker_was_killed(install: Callable, tmp_path: Path, what: str) -> None:
    slow = """
        import os, pathlib, time
        if os.environ.get("ACME_SLOW"):
            pathlib.Path(os.environ["ACME_PIDS"]).write_text(str(os.getpid()))
            time.sleep(600)
    """
    install("acme", textwrap.dedent(slow) + SOURCE)
    environ = {**os.environ, "OURVIDZ_ALLOW_PLUGINS": "acme", "ACME_PIDS": str(tmp_path / "pids")}
    worker = subprocess.Popen([sys.executable, "-c", WORKER, what, str(tmp_path)], env=environ)
    pids_in(tmp_path / "pids")
    time.sleep(0.3)
    family = [child.pid for child in psutil.Process(worker.pid).children(recursive=True)]

    worker.kill()
    worker.wait()

    assert len(family) >= (1 if what == "start" else 2)
    assert all_gone(family)


def test_nothing_is_left_of_an_engine_whose_worker_goes_before_it_hears_the_answer(install: Callable) -> None:
    install("acme", SOURCE)
    ours, theirs = Pipe()
    engine = subprocess.Popen(
        [sys.executable, "-m", "ourvidz_core.engine.server", str(theirs.fileno())],
        env={**os.environ, "OURVIDZ_ALLOW_PLUGINS": "acme"},
        pass_fds=[theirs.fileno()],
        start_new_session=True,
    )
    theirs.close()
    ours.recv_bytes()  # it is ready
    engine.send_signal(signal.SIGSTOP)
    ours.send_bytes(b'{"kind": "RunJob", "request": 1}')
    ours.close()
    engine.send_signal(signal.SIGCONT)

    try:
        assert engine.wait(10) == 0
    finally:
        kill_session(engine.pid)


# -- the start


def test_an_engine_whose_plugin_sleeps_is_given_up(install: Callable, engine_of: Callable, tmp_path: Path) -> None:
    install("acme-sleepy", "import os, time\nif os.environ.get('ACME_CHILD'): print('still loading'); time.sleep(600)")
    engine = engine_of("acme-sleepy", ACME_CHILD="1", start_seconds=1.0)
    started = time.monotonic()

    with pytest.raises(EngineCrashed, match="not ready after 1 s"):
        engine.start()

    assert time.monotonic() - started < 4
    assert engine.pid is None


@pytest.mark.parametrize(
    ("line", "said"),
    [
        pytest.param("raise RuntimeError('only here')", "could not load acme-child.*only here", id="raises"),
        pytest.param("os._exit(5)", r"died while it started \(exit status 5\)", id="exits"),
        pytest.param("os.kill(os.getpid(), 9)", r"died while it started \(signal SIGKILL\)", id="is killed"),
    ],
)
def test_a_plugin_that_fails_in_the_engine_only_is_told(
    install: Callable, engine_of: Callable, line: str, said: str
) -> None:
    install("acme-child", f"import os\nif os.environ.get('ACME_CHILD'): {line}")
    engine = engine_of("acme-child", ACME_CHILD="1")

    with pytest.raises(EngineCrashed, match=said):
        engine.start()

    assert engine.pid is None


def test_a_wrong_setting_of_the_engine_is_told(install: Callable, engine_of: Callable) -> None:
    install("acme", SOURCE)
    engine = engine_of("acme", OURVIDZ_LEASE_SECONDS="soon")

    with pytest.raises(EngineCrashed, match="OURVIDZ_LEASE_SECONDS"):
        engine.start()


def test_an_engine_can_be_closed_twice_and_used_again(work: Callable, engine: EngineProcess) -> None:
    engine.close()
    work("draw")
    engine.close()
    engine.close()

    assert work("draw").generation.facts["loads"] == 1


def test_a_session_is_killed_with_the_groups_inside_it() -> None:
    program = "import subprocess, time; subprocess.Popen(['sleep', '600'], process_group=0); print(1, flush=True)"
    leader = subprocess.Popen(
        [sys.executable, "-S", "-c", f"{program}; time.sleep(600)"], start_new_session=True, stdout=subprocess.PIPE
    )
    leader.stdout.readline()
    family = [leader.pid, *(child.pid for child in psutil.Process(leader.pid).children())]

    kill_session(leader.pid)
    leader.wait()

    assert len(family) == 2
    assert all_gone(family)


def test_an_engine_error_is_a_generation_error() -> None:
    assert issubclass(EngineCrashed, GenerationError)
