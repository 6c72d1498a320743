"""Run a job's command: its own process group, bounded output, progress, a deadline."""

from __future__ import annotations

import contextlib
import os
import re
import subprocess
import threading
import time
from collections import deque
from collections.abc import Callable
from pathlib import Path
from typing import IO

from ourvidz_core.engine.processes import COMMAND_MARK, ending_of, kill_group, kill_marked, last_exception, new_mark
from ourvidz_core.errors import CommandFailed, JobTimeout, OutOfMemory
from ourvidz_core.settings import without_keys
from ourvidz_core.wire.commands import Command

#: What an error carries of a command's output; a command may print gigabytes.
TAIL_LINES = 40
#: How torch puts it, in all its versions.
_OUT_OF_MEMORY = re.compile(r"(CUDA|HIP) (error: )?out of memory")
_LINE_BYTES = 4096
_CHUNK_BYTES = 65536
_POLL_SECONDS = 0.05


def run_command(
    command: Command,
    *,
    cwd: Path,
    timeout_seconds: float,
    on_progress: Callable[[int, int], None] = lambda step, total: None,
    check: Callable[[], None] = lambda: None,
) -> None:
    """Run ``command`` to its end. Nothing that it started outlives this call, whatever session it went to.

    ``on_progress`` is called with (step, total) for lines of output that match the command's
    pattern, ``check`` all the time; what they raise ends the command.

    :raises CommandFailed: it cannot be started or ends with a non-zero status.
    :raises OutOfMemory: it does so because of an exception that says so.
    :raises JobTimeout: it is still running after ``timeout_seconds``.
    """
    allowed = min(timeout_seconds, command.timeout_seconds or timeout_seconds)
    deadline = time.monotonic() + allowed
    mark = new_mark()
    try:
        process = subprocess.Popen(
            command.argv,
            cwd=command.cwd or cwd,
            env={**without_keys(os.environ), **command.env, COMMAND_MARK: mark},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            process_group=0,
        )
    except (OSError, ValueError, TypeError) as error:  # the latter two: a NUL or a number in its environment
        raise CommandFailed(f"{command.argv[0]} cannot be started: {error}") from error
    assert process.stdout is not None
    output = _Output(process.stdout, command.progress_pattern)
    try:
        while process.poll() is None:
            if time.monotonic() >= deadline:
                raise JobTimeout(
                    f"{command.argv[0]} was still running after {allowed:g} s and was stopped",
                    details={"output_tail": output.tail()},
                )
            if (latest := output.take_progress()) is not None:
                on_progress(*latest)
            check()
            output.wait(_POLL_SECONDS)
    finally:
        kill_group(process.pid)  # grandchildren too, also after a good end
        process.wait()
        kill_marked(COMMAND_MARK, mark)  # those that left the group
        output.close()
    if (latest := output.take_progress()) is not None:
        on_progress(*latest)
    if process.returncode != 0:
        raise _failure(command.argv[0], process.returncode, output)


def _failure(program: str, returncode: int, output: _Output) -> CommandFailed | OutOfMemory:
    details = {"exit_status": returncode, "output_tail": output.tail()}
    exception = last_exception(output.lines)
    # The last exception only: an earlier one may have been met with less memory, and something else gone wrong.
    if exception and _OUT_OF_MEMORY.search(exception):
        return OutOfMemory(f"{program} had too little device memory for this job: {exception}", details=details)
    return CommandFailed(f"{program} ended with {ending_of(returncode)}: {output.last_line()}", details=details)


class _Output:
    """Drains a command's output in a thread and keeps its end and the latest progress."""

    def __init__(self, stream: IO[bytes], pattern: str) -> None:
        self._stream = stream
        self._pattern = re.compile(pattern)
        self._lines: deque[str] = deque(maxlen=TAIL_LINES)
        self._progress: tuple[int, int] | None = None
        self._news = threading.Event()
        self._thread = threading.Thread(target=self._drain, name="command-output", daemon=True)
        self._thread.start()

    def take_progress(self) -> tuple[int, int] | None:
        latest, self._progress = self._progress, None
        return latest

    def wait(self, seconds: float) -> None:
        self._news.wait(seconds)
        self._news.clear()

    @property
    def lines(self) -> tuple[str, ...]:
        return tuple(self._lines)

    def tail(self) -> str:
        return "\n".join(self.lines)

    def last_line(self) -> str:
        return next((line for line in reversed(self.lines) if line.strip()), "it printed nothing")

    def close(self) -> None:
        # A process of another user, which we may not kill, may hold the pipe open; nobody waits for it.
        self._thread.join(timeout=1.0)

    def _drain(self) -> None:
        unfinished = b""
        with self._stream:
            while chunk := os.read(self._stream.fileno(), _CHUNK_BYTES):
                *lines, unfinished = (unfinished + chunk).split(b"\n")
                self._keep(lines)
                # A progress bar ends its states with a carriage return and its line much later, if ever.
                *states, last = unfinished.split(b"\r")
                self._look_for_progress(states)
                unfinished = b"\r".join((*states[-1:], last))[-_LINE_BYTES:]  # a line may be endless
                self._news.set()
        if unfinished:
            self._keep([unfinished])
        self._news.set()

    def _keep(self, lines: list[bytes]) -> None:
        for line in lines[-TAIL_LINES:]:
            self._lines.append(_text(line.rstrip(b"\r").rpartition(b"\r")[2]))
        self._look_for_progress([state for line in lines for state in line.split(b"\r")])

    def _look_for_progress(self, states: list[bytes]) -> None:
        for state in reversed(states):
            if match := self._pattern.search(_text(state)):
                with contextlib.suppress(ValueError, TypeError):  # a group that is empty, or no number
                    self._progress = (int(match["step"]), int(match["total"]))
                return


def _text(line: bytes) -> str:
    return line[-_LINE_BYTES:].decode("utf-8", "replace")
