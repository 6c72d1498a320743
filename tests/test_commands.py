"""A job's command: nasty subprocesses end in time, with bounded memory and a useful error."""

from __future__ import annotations

import contextlib
import json
import os
import resource
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from ourvidz_core.engine.commands import run_command
from ourvidz_core.errors import ArtifactError, CommandFailed, GenerationError, JobCancelled, JobTimeout, OutOfMemory
from ourvidz_core.testing.doubles import RecordingContext
from ourvidz_core.wire.commands import Command


def python(program: str, *arguments: str, **more: object) -> Command:
    return Command(argv=(sys.executable, "-S", "-c", program, *arguments), **more)


def alive(pid_file: Path) -> bool:
    pid = int(pid_file.read_text())
    return psutil.pid_exists(pid) and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE


def eventually(condition: Callable[[], bool], seconds: float = 3.0) -> bool:
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.02)
    return True


HANGS = "import time; time.sleep(60)"
#: Starts a child that writes its pid and hangs, then goes on.
FORKS = """
import subprocess, sys, time
child = subprocess.Popen([sys.executable, "-S", "-c", "import time; time.sleep(60)"])
open("pid", "w").write(str(child.pid))
"""


@pytest.mark.parametrize(
    "program",
    [
        pytest.param(HANGS, id="hangs"),
        pytest.param(FORKS + "time.sleep(60)", id="forks and hangs"),
        pytest.param("import signal\nsignal.signal(signal.SIGTERM, signal.SIG_IGN)\n" + HANGS, id="ignores SIGTERM"),
        pytest.param("while True: pass", id="spins"),
        pytest.param("while True: print('y' * 80)", id="floods"),
    ],
)
def test_the_deadline_holds(tmp_path: Path, program: str) -> None:
    started = time.monotonic()

    with pytest.raises(JobTimeout, match=r"still running after 0\.6 s"):
        run_command(python(program), cwd=tmp_path, timeout_seconds=0.6)

    assert 0.6 <= time.monotonic() - started < 1.1
    assert not (tmp_path / "pid").exists() or eventually(lambda: not alive(tmp_path / "pid"))


def test_a_command_may_have_less_time_than_its_job(tmp_path: Path) -> None:
    with pytest.raises(JobTimeout, match=r"after 0\.2 s"):
        run_command(python(HANGS, timeout_seconds=0.2), cwd=tmp_path, timeout_seconds=60)


def test_a_child_that_keeps_the_pipe_open_ends_with_its_parent(tmp_path: Path) -> None:
    started = time.monotonic()

    run_command(python(FORKS), cwd=tmp_path, timeout_seconds=20)

    assert time.monotonic() - started < 2
    assert eventually(lambda: not alive(tmp_path / "pid"))


#: Starts a child in a session of its own that hangs, writes its pid and is gone before its child is.
LEAVES = """
import os, subprocess, sys, time
if os.fork() == 0:
    child = subprocess.Popen([sys.executable, "-S", "-c", "import time; time.sleep(60)"], start_new_session=True)
    open("pid.part", "w").write(str(child.pid))
    os.rename("pid.part", "pid")
    os._exit(0)
while not os.path.exists("pid"): time.sleep(0.01)
"""


@pytest.mark.parametrize("then", ["", "time.sleep(60)", "sys.exit(1)"], ids=["ends well", "hangs", "fails"])
def test_a_grandchild_that_left_the_group_and_holds_the_pipe_ends_too(tmp_path: Path, then: str) -> None:
    started = time.monotonic()

    with contextlib.suppress(CommandFailed, JobTimeout):
        run_command(python(LEAVES + then), cwd=tmp_path, timeout_seconds=1)

    assert time.monotonic() - started < 2
    assert eventually(lambda: not alive(tmp_path / "pid"))


OUT_OF_MEMORY = "torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 20.00 GiB. GPU 0 has 9 GiB."


@pytest.mark.parametrize(
    ("lines", "error"),
    [
        pytest.param([OUT_OF_MEMORY], OutOfMemory, id="the last exception"),
        pytest.param(["RuntimeError: CUDA error: out of memory", "Compile with X."], OutOfMemory, id="with a note"),
        pytest.param([f"[rank0]: {OUT_OF_MEMORY}", "[rank0]: E0101 closing"], OutOfMemory, id="of one rank"),
        pytest.param([OUT_OF_MEMORY, "FileNotFoundError: no t5.pth"], CommandFailed, id="an earlier exception"),
        pytest.param(["prompt: CUDA out of memory"], CommandFailed, id="something else that says it"),
    ],
)
def test_too_little_memory_is_told_by_the_exception_that_ended_it(
    tmp_path: Path, lines: list[str], error: type[GenerationError]
) -> None:
    program = f"import sys\nsys.stderr.write({chr(10).join(lines) + chr(10)!r})\nsys.exit(1)"

    with pytest.raises(GenerationError) as caught:
        run_command(python(program), cwd=tmp_path, timeout_seconds=20)

    assert type(caught.value) is error
    assert caught.value.details["exit_status"] == 1


@pytest.mark.parametrize(
    "program",
    [
        pytest.param("import sys\nfor _ in range(100): sys.stdout.write(('y' * 99 + chr(10)) * 10000)", id="in lines"),
        pytest.param("import sys\nfor _ in range(100): sys.stdout.write('y' * 10**6)", id="in one line"),
        pytest.param("import sys\nfor _ in range(100): sys.stdout.write(('y' * 99 + chr(13)) * 10000)", id="in bars"),
    ],
)
def test_a_hundred_megabytes_of_output_take_no_memory(tmp_path: Path, program: str) -> None:
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss

    with pytest.raises(CommandFailed) as caught:
        run_command(python(program + "\nsys.stdout.flush(); sys.exit(1)"), cwd=tmp_path, timeout_seconds=30)

    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 20_000  # kB
    assert len(caught.value.details["output_tail"]) <= 40 * 4097
    assert len(caught.value.message) < 4400


@pytest.mark.parametrize(
    ("separator", "end"),
    [
        pytest.param("\n", "\n", id="lines"),
        pytest.param("\r", "\n", id="bars that end with a return"),
        pytest.param("\r\n", "\n", id="both"),
    ],
)
def test_progress_is_told_while_the_command_runs(tmp_path: Path, separator: str, end: str) -> None:
    program = f"""
import sys, time
for step in range(1, 6):
    sys.stdout.write("step %d of 5" % step + {separator!r}); sys.stdout.flush(); time.sleep(0.1)
time.sleep(0.2)
sys.stdout.write("done" + {end!r})
"""
    seen: list[tuple[float, tuple[int, int]]] = []

    run_command(
        python(program),
        cwd=tmp_path,
        timeout_seconds=20,
        on_progress=lambda step, total: seen.append((time.monotonic(), (step, total))),
    )

    ended = time.monotonic()
    assert seen[-1][1] == (5, 5)
    assert len(seen) >= 3
    assert ended - seen[0][0] > 0.4  # the first while it still ran


def test_progress_is_not_read_from_half_a_number(tmp_path: Path) -> None:
    program = """
import sys, time
sys.stdout.write("x" * 4085 + "step 1 of 5"); sys.stdout.flush(); time.sleep(0.2)
sys.stdout.write("0" + chr(10)); sys.stdout.flush()
"""
    seen: list[tuple[int, int]] = []

    run_command(python(program.replace('"x" * 4085', '"x" * 4085 + " "')), cwd=tmp_path, timeout_seconds=20,
                on_progress=lambda *step: seen.append(step))  # fmt: skip

    assert seen == [(1, 50)]


def test_a_number_without_an_end_does_not_stop_the_reading(tmp_path: Path) -> None:
    program = "import sys\nprint('step ' + '9' * 4050 + ' of 5')\nsys.stdout.write('y' * 10**6)"

    run_command(
        python(program, progress_pattern=r"step (?P<step>\d+) of (?P<total>\d+)"), cwd=tmp_path, timeout_seconds=5
    )


def test_what_a_progress_function_raises_ends_the_command(tmp_path: Path) -> None:
    def stop(step: int, total: int) -> None:
        raise JobCancelled("enough")

    started = time.monotonic()
    with pytest.raises(JobCancelled):
        run_command(
            python("print('step 1 of 2', flush=True)\n" + FORKS + HANGS),
            cwd=tmp_path,
            timeout_seconds=20,
            on_progress=stop,
        )

    assert time.monotonic() - started < 2


@pytest.mark.parametrize(
    ("program", "ending"),
    [
        ("import sys; print('first'); print('the reason'); print(); sys.exit(7)", "exit status 7: the reason"),
        ("import sys; sys.exit(7)", "exit status 7: it printed nothing"),
        ("import os, signal; os.kill(os.getpid(), signal.SIGKILL)", "signal SIGKILL"),
        ("import os; os.kill(os.getpid(), 40)", "signal 40"),
        ("import sys; sys.stderr.write('on stderr'); sys.exit(1)", "exit status 1: on stderr"),
        ("import sys; sys.stdout.buffer.write(bytes([255, 10])); sys.exit(1)", "exit status 1: \ufffd"),
    ],
    ids=["status", "silent", "killed", "a signal without a name", "stderr", "no text"],
)
def test_a_bad_end_is_told_with_the_last_words(tmp_path: Path, program: str, ending: str) -> None:
    with pytest.raises(CommandFailed) as caught:
        run_command(python(program), cwd=tmp_path, timeout_seconds=20)

    assert ending in caught.value.message


def test_the_end_of_the_output_is_in_the_details(tmp_path: Path) -> None:
    with pytest.raises(CommandFailed) as caught:
        run_command(python("import sys\nfor i in range(99): print(i)\nsys.exit(2)"), cwd=tmp_path, timeout_seconds=20)

    assert caught.value.details["exit_status"] == 2
    assert caught.value.details["output_tail"].split() == [str(i) for i in range(59, 99)]


def not_executable(tmp_path: Path) -> Command:
    (tmp_path / "tool").write_text("#!/bin/sh\n")
    return Command(argv=(tmp_path / "tool",))


@pytest.mark.parametrize(
    "command",
    [
        pytest.param(lambda tmp_path: Command(argv=("no-such-tool-here",)), id="not there"),
        pytest.param(not_executable, id="not executable"),
        pytest.param(lambda tmp_path: Command(argv=("true",), cwd=tmp_path / "gone"), id="no such directory"),
        pytest.param(lambda tmp_path: Command(argv=("true",), env={"A": "a\0b"}), id="NUL in its environment"),
        pytest.param(lambda tmp_path: Command(argv=("true",), env={"A": 3}), id="a number in its environment"),
        pytest.param(lambda tmp_path: Command(argv=("true", "x" * 10**7)), id="an argument of 10 MB"),
    ],
)
def test_a_command_that_cannot_be_started_says_why(tmp_path: Path, command: Callable[[Path], Command]) -> None:
    with pytest.raises(CommandFailed, match="cannot be started"):
        run_command(command(tmp_path), cwd=tmp_path, timeout_seconds=20)


@pytest.mark.parametrize(
    "prompt", ["-neon", "--help", "a'b\"c $HOME `id` ; rm", "line\nbreak", "\N{GRINNING FACE}", ""]
)
def test_a_prompt_arrives_unharmed(tmp_path: Path, prompt: str) -> None:
    program = "import sys; open('got', 'w', encoding='utf-8', newline='').write(sys.argv[1])"

    run_command(python(program, f"--prompt={prompt}", env={"PYTHONUTF8": "1"}), cwd=tmp_path, timeout_seconds=20)

    assert (tmp_path / "got").read_bytes().decode() == f"--prompt={prompt}"


def test_a_command_gets_its_environment_over_the_engines(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ACME_A", "engine")
    monkeypatch.setenv("ACME_B", "engine")
    program = "import os; open('got', 'w').write(os.environ['ACME_A'] + os.environ['ACME_B'])"

    run_command(python(program, env={"ACME_B": "command"}), cwd=tmp_path, timeout_seconds=20)

    assert (tmp_path / "got").read_text() == "enginecommand"


def test_a_command_gets_no_key_of_another_plugin_and_those_that_it_is_given(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OURVIDZ_OTHER_KEY", "other")
    monkeypatch.setenv("OURVIDZ_ACME_TOKEN", "engine")
    program = "import os, json; json.dump({k: v for k, v in os.environ.items() if 'OURVIDZ_' in k}, open('got', 'w'))"

    run_command(python(program, env={"OURVIDZ_ACME_TOKEN": "own"}), cwd=tmp_path, timeout_seconds=20)

    got = json.loads((tmp_path / "got").read_text())
    assert got.get("OURVIDZ_ACME_TOKEN") == "own"
    assert "OURVIDZ_OTHER_KEY" not in got


def test_no_thread_and_no_descriptor_is_left_behind(tmp_path: Path) -> None:
    run_command(python(""), cwd=tmp_path, timeout_seconds=20)
    threads, descriptors = threading.active_count(), len(os.listdir("/proc/self/fd"))

    for _ in range(5):
        run_command(python("print('x')"), cwd=tmp_path, timeout_seconds=20)

    assert (threading.active_count(), len(os.listdir("/proc/self/fd"))) == (threads, descriptors)


# -- through a context


def test_a_context_collects_what_was_made(tmp_path: Path) -> None:
    context = RecordingContext(tmp_path)
    paths = [context.output_path("png"), context.output_path(".mp4")]

    artifacts = context.run(
        python("import sys; [open(p, 'w').write('x') for p in sys.argv[1:]]\nprint('step 1 of 1')", *map(str, paths))
    )

    assert [artifact.path for artifact in artifacts] == paths == [tmp_path / "output_0.png", tmp_path / "output_1.mp4"]
    assert [artifact.media_type for artifact in artifacts] == ["image/png", "video/mp4"]
    assert context.steps == [("command", 1, 1)]


def test_a_relative_output_is_looked_for_where_the_command_ran(tmp_path: Path) -> None:
    context = RecordingContext(tmp_path)

    (artifact,) = context.run(python("open('made.png', 'w').write('x')", outputs=[Path("made.png")]))

    assert artifact.path == tmp_path / "made.png"


@pytest.mark.parametrize(
    ("program", "outputs", "said"),
    [
        pytest.param("", ["a.png"], "a.png is missing", id="without its file"),
        pytest.param("open('a.png', 'w')", ["a.png"], "a.png is empty", id="an empty file"),
        pytest.param("open('a.xyz', 'w').write('x')", ["a.xyz"], "no media type", id="an unknown kind"),
        pytest.param("", [], "no output was declared", id="nothing declared"),
    ],
)
def test_a_command_that_leaves_no_result_has_failed(tmp_path: Path, program: str, outputs: list, said: str) -> None:
    with pytest.raises(ArtifactError, match=said):
        RecordingContext(tmp_path).run(python(program, outputs=outputs))


def test_a_cancelled_job_ends_its_command(tmp_path: Path) -> None:
    cancelled = threading.Event()
    threading.Timer(0.2, cancelled.set).start()
    started = time.monotonic()

    with pytest.raises(JobCancelled):
        RecordingContext(tmp_path, cancelled=cancelled).run(python(HANGS))

    assert time.monotonic() - started < 1.5


def test_a_job_whose_time_is_over_starts_no_command(tmp_path: Path) -> None:
    with pytest.raises(JobTimeout):
        RecordingContext(tmp_path, timeout_seconds=0).run(python("open('ran', 'w')"))

    assert not (tmp_path / "ran").exists()
