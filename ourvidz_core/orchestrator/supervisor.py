"""Runs the workers of a plan: starts each, passes its log on, starts it again when it ends, and ends them all.

One thread decides; it sleeps until a signal, a word of a worker, or a time that is due. The
decisions are ``slots``'; here are the processes.
"""

from __future__ import annotations

import contextlib
import logging
import os
import selectors
import signal
import socket
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import IO

from attrs import define, field

from ourvidz_core.engine.processes import ending_of, kill_marked, new_mark
from ourvidz_core.errors import OurVidzError
from ourvidz_core.orchestrator.link import OrchestratorEnd, Ready
from ourvidz_core.orchestrator.plan import PlannedWorker
from ourvidz_core.orchestrator.report import OrchestratorReport, WorkerReport
from ourvidz_core.orchestrator.slots import Fleet, Patience, Slot, SlotState

logger = logging.getLogger(__name__)

#: In the environment of a worker and of all that it starts.
WORKER_MARK = "OURVIDZ_WORKER_MARK"
#: A worker that does not even get ready is not waited for any longer; its checks have time limits of their own.
START_SECONDS = 300.0
#: Beyond the time that running jobs may take after a first signal, and after a second.
_END_MARGIN_SECONDS = 30.0
_HURRIED_SECONDS = 15.0
_TAIL_LINES = 30
_LONGEST_LINE = 16384
_LONGEST_SLEEP = 1.0
#: A worker's line breaks a moment before its process can be waited for.
_SHORT_SLEEP = 0.02
#: The report says at least this often that it is not stale.
_REPORT_SECONDS = 5.0
_STOPPING = (signal.SIGTERM, signal.SIGINT)


class Supervisor:
    """Watches the processes of ``plan`` until it is told to stop. Runs in the main thread.

    ``replan`` is asked for the plan again at each SIGHUP; where it raises, nothing changes.
    """

    def __init__(
        self,
        plan: Sequence[PlannedWorker],
        *,
        patience: Patience,
        drain_seconds: float,
        silence_seconds: float,
        environ: Mapping[str, str],
        replan: Callable[[], Sequence[PlannedWorker]],
        report: Callable[[OrchestratorReport], None] = lambda report: None,
        log: IO[bytes] | None = None,
    ) -> None:
        self._plan = {worker.name: worker for worker in plan}
        self._patience = patience
        self._drain_seconds = drain_seconds
        self._silence_seconds = silence_seconds
        self._environ = dict(environ)
        self._replan = replan
        self._report = report
        self._log = log or sys.stderr.buffer
        self._log_lock = threading.Lock()
        self._children: dict[str, _Child] = {}
        self._left_out: dict[str, Mapping[str, str]] = {}
        self._signals: deque[int] = deque()
        self._started_at = time.time()
        self._reported_at = 0.0
        self._stop_signals = 0

    def run(self) -> None:
        """Keep the workers running. Returns when SIGTERM or SIGINT has ended them all."""
        self._fleet = Fleet.of(self._plan, self._patience, time.monotonic())
        with selectors.DefaultSelector() as selector, self._listening(selector):
            self._selector = selector
            try:
                while not self._fleet.is_over:
                    self._step()
            finally:
                # Only after an error of ours is anybody left.
                for child in self._children.values():
                    child.kill()
        self._tell()
        logger.info("all workers have ended")

    def _step(self) -> None:
        for key, _ in self._selector.select(self._sleep_seconds()):
            if isinstance(key.fileobj, OrchestratorEnd):
                self._hear(key.data)
            else:
                key.data()
        now = time.monotonic()
        while self._signals:
            self._obey(self._signals.popleft(), now)
        for name in list(self._children):
            self._look_after(name, now)
        self._fleet.tick(now)
        if (slot := self._fleet.next_to_roll(now)) is not None:
            logger.info("%s is replaced: it finishes its jobs first", slot.name)
            self._tell_to_end(slot.name, now, self._drain_seconds + _END_MARGIN_SECONDS)
        for slot in self._fleet.due(now):
            self._start(slot, now)
        if time.time() - self._reported_at >= _REPORT_SECONDS:
            self._tell()

    def _sleep_seconds(self) -> float:
        if any(not child.line.is_open for child in self._children.values()):
            return _SHORT_SLEEP
        due = self._fleet.next_start()
        return _LONGEST_SLEEP if due is None else min(max(due - time.monotonic(), 0.0), _LONGEST_SLEEP)

    # -- signals

    @contextlib.contextmanager
    def _listening(self, selector: selectors.BaseSelector) -> Iterator[None]:
        """Signals wake the selector, and are obeyed between two steps."""
        ours, theirs = socket.socketpair()
        ours.setblocking(False)
        theirs.setblocking(False)

        def wake(number: int, _: object) -> None:
            self._signals.append(number)
            with contextlib.suppress(BlockingIOError):
                theirs.send(b"!")

        def woken() -> None:
            with contextlib.suppress(BlockingIOError):
                ours.recv(4096)

        selector.register(ours, selectors.EVENT_READ, woken)
        before = {number: signal.signal(number, wake) for number in (*_STOPPING, signal.SIGHUP)}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)
            ours.close()
            theirs.close()

    def _obey(self, number: int, now: float) -> None:
        if number == signal.SIGHUP:
            if not self._fleet.is_ending:
                self._roll(now)
            return
        self._stop_signals += 1
        if self._stop_signals == 1:
            logger.info("%s: no more jobs are taken; running ones may finish", signal.Signals(number).name)
            for slot in self._fleet.end(now):
                self._tell_to_end(slot.name, now, self._drain_seconds + _END_MARGIN_SECONDS)
        else:
            logger.info("%s again: running jobs are handed back", signal.Signals(number).name)
            for name in self._children:
                self._tell_to_end(name, now, _HURRIED_SECONDS)
        self._tell()

    def _roll(self, now: float) -> None:
        try:
            planned = {worker.name: worker for worker in self._replan()}
        except OurVidzError as error:
            # Their successors would not start: what runs is better.
            logger.error("SIGHUP: no worker is replaced, since the settings cannot be used: %s", error)
            return
        logger.info("SIGHUP: the workers are replaced one by one")
        self._plan |= planned
        self._fleet.roll(planned, now)
        self._tell()

    # -- processes

    def _start(self, slot: Slot, now: float) -> None:
        planned = self._plan[slot.name]
        try:
            child = _Child.start(planned, self._environ, self._pass_on)
        except OSError as error:
            logger.error("%s cannot be started: %s", slot.name, error)
            slot.started(now)
            slot.exited(now, -1, [str(error)])
            return
        slot.started(now)
        self._children[slot.name] = child
        self._left_out.pop(slot.name, None)
        self._selector.register(child.line, selectors.EVENT_READ, slot.name)
        logger.info("%s is started as process %s", slot.name, child.process.pid)
        self._tell()

    def _hear(self, name: str) -> None:
        child, slot = self._children[name], self._fleet.slots[name]
        said = child.line.read()
        if isinstance(said, Ready):
            slot.became_ready(time.monotonic())
            self._left_out[name] = said.left_out
            logger.info("%s takes jobs from %s", name, ", ".join(said.queues) or "its queues")
            self._tell()
        if not child.line.is_open:
            self._selector.unregister(child.line)

    def _look_after(self, name: str, now: float) -> None:
        child, slot = self._children[name], self._fleet.slots[name]
        if slot.state is SlotState.STARTING and now - slot.since >= START_SECONDS:
            logger.error("%s was not ready after %.0f s; it is killed", name, START_SECONDS)
            child.kill()
        if slot.state is SlotState.READY and now - child.line.heard_at >= self._silence_seconds:
            logger.error("%s hangs: no sign of life for %.0f s; it is killed", name, self._silence_seconds)
            child.kill()
        if child.kill_at is not None and now >= child.kill_at:
            logger.error("%s has not ended in time; it is killed", name)
            child.kill()
        returncode = child.process.poll()
        if returncode is None:
            return
        if child.line.is_open:
            self._selector.unregister(child.line)
        del self._children[name]
        tail = child.end()
        was_asked = slot.state is SlotState.DRAINING
        slot.exited(now, returncode, tail)
        if was_asked:
            logger.info("%s has ended (%s)", name, ending_of(returncode))
        else:
            logger.error(
                "%s ended by itself (%s); start %s is in %.1f s%s",
                name,
                ending_of(returncode),
                slot.restarts + 2,
                max(slot.start_at - now, 0.0),
                f"; crash loop: {slot.failures} failures in a row" if slot.is_looping else "",
            )
        self._tell()

    def _tell_to_end(self, name: str, now: float, seconds: float) -> None:
        child = self._children[name]
        child.kill_at = now + seconds
        child.process.terminate()

    def _pass_on(self, name: str, line: bytes) -> None:
        with self._log_lock, contextlib.suppress(OSError, ValueError):
            # A line of JSON names its worker itself, and must stay one.
            self._log.write(line if line.startswith(b"{") else name.encode() + b" | " + line)
            self._log.flush()

    # -- the report

    def _tell(self) -> None:
        self._reported_at = time.time()
        self._report(
            OrchestratorReport(
                pid=os.getpid(),
                host=socket.gethostname(),
                started_at=self._started_at,
                updated_at=self._reported_at,
                is_ending=self._fleet.is_ending,
                rolling=self._fleet.rolling,
                workers=tuple(self._report_of(slot) for slot in self._fleet.slots.values()),
            )
        )

    def _report_of(self, slot: Slot) -> WorkerReport:
        planned, child, last = self._plan[slot.name], self._children.get(slot.name), slot.last_exit
        offset = time.time() - time.monotonic()
        return WorkerReport(
            name=slot.name,
            worker_name=planned.worker_name,
            state=slot.state,
            since=slot.since + offset,
            pid=child.process.pid if child is not None else None,
            queues=planned.queues,
            gpus=planned.gpus,
            memory_gb=planned.memory_gb,
            restarts=max(slot.restarts, 0),
            next_start_at=slot.start_at + offset if slot.state is SlotState.WAITING else None,
            is_looping=slot.is_looping,
            failures=slot.failures,
            failing_since=None if slot.failing_since is None else slot.failing_since + offset,
            last_ending=None if last is None else ending_of(last.returncode),
            last_ended_at=None if last is None else last.at + offset,
            last_lines=() if last is None else last.last_lines,
            left_out=self._left_out.get(slot.name, {}),
        )


@define(kw_only=True, eq=False)
class _Child:
    """A worker's process, the line to it, and its log."""

    process: subprocess.Popen[bytes]
    line: OrchestratorEnd
    mark: str
    #: When it is killed unless it has ended.
    kill_at: float | None = None
    _tail: deque[str] = field(factory=lambda: deque[str](maxlen=_TAIL_LINES))
    _reader: threading.Thread | None = None

    @classmethod
    def start(cls, planned: PlannedWorker, environ: Mapping[str, str], pass_on: Callable[[str, bytes], None]) -> _Child:
        line, mark = OrchestratorEnd(), new_mark()
        try:
            process = subprocess.Popen(
                [sys.executable, "-m", "ourvidz_core", *planned.arguments, f"--supervisor={line.their_descriptor}"],
                env={**environ, **planned.environment, WORKER_MARK: mark},
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                pass_fds=[line.their_descriptor],
                # A Ctrl-C in the terminal is for the orchestrator, which tells its workers.
                start_new_session=True,
            )
        except OSError:
            line.close()
            raise
        finally:
            line.passed_on()
        child = cls(process=process, line=line, mark=mark)
        child._reader = threading.Thread(
            target=child._read_log, args=[planned.name, pass_on], name=f"log-{planned.name}", daemon=True
        )
        child._reader.start()
        return child

    def kill(self) -> None:
        """End it at once, with all that it started."""
        self.process.kill()

    def end(self) -> list[str]:
        """It has ended: leave nothing of it behind, and answer the end of its log."""
        # Its engine ends by itself when the worker does, unless it is stuck in a call that never returns.
        kill_marked(WORKER_MARK, self.mark)
        self.line.close()
        if self._reader is not None:
            self._reader.join(timeout=2.0)
        return list(self._tail)

    def _read_log(self, name: str, pass_on: Callable[[str, bytes], None]) -> None:
        assert self.process.stdout is not None
        with self.process.stdout as stream:
            while line := stream.readline(_LONGEST_LINE):
                self._tail.append(line.decode("utf-8", "replace").rstrip())
                pass_on(name, line if line.endswith(b"\n") else line + b"\n")
