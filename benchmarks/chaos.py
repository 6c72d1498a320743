"""Kill everything, again and again, and count what was lost: the delivery guarantee, measured.

``python benchmarks/chaos.py [--quick] [--rows 1,2,3] [--json]``. It brings its own Redis,
storage and callback endpoint, and real worker and engine processes with a plugin whose jobs
cost next to nothing. The number of tries of a job is raised from 3 to 50, so that a job
which luck kills three times is delivered rather than reported as poison. Ends with 1 where
a target is missed.

1. workers killed with SIGKILL at random instants
2. workers frozen for longer than their lease, and SIGTERM at every phase of a job
3. Redis killed, and all connections cut, half of them after the command ran
4. an endpoint and a storage that fail in every way they can
5. engines that crash, run out of memory, break their device or leave
6. the books themselves: every change that Redis made, from its append-only file
7. overhead beside other queues: ``benchmarks/overhead.py``
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import hashlib
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Self
from urllib.parse import urlsplit

import attrs
import redis
from attrs import define, field, frozen

from ourvidz_core.cli.common import table
from ourvidz_core.delivery.embedded import EmbeddedRedis
from ourvidz_core.delivery.redis_queue import RedisQueue
from ourvidz_core.testing.distributions import make_distribution
from ourvidz_core.testing.servers import Answer, Bucket, ReceivedRequest, SupabaseServer

QUEUE, TYPE = "chaos_queue", "chaos_image"
LEASE_SECONDS = 2.0
RECOVERY_SECONDS = LEASE_SECONDS + 10.0
ENGINE_RECOVERY_SECONDS = 5.0
PNG_END = b"IEND\xaeB`\x82"

PLUGIN = """
import os, signal, sys, time
from attrs import frozen
from PIL import Image
from ourvidz_core import Artifact, Generation, JobType, hookimpl

MARKS = os.open(os.environ["CHAOS_MARKS"], os.O_WRONLY | os.O_APPEND | os.O_CREAT)


@frozen(kw_only=True)
class Config:
    seconds: float = 0.0
    fault: str = ""


@hookimpl
def register_job_types():
    yield JobType(name="chaos_image", queue="chaos_queue", content_type="image", preset=Config(), timeout_seconds=30)


def mark(what, job):
    os.write(MARKS, f"{what} {job.id} {time.time()}\\n".encode())


def fail_once(job):
    done = os.environ["CHAOS_MARKS"] + "." + job.id
    if not job.config.fault or os.path.exists(done):
        return
    open(done, "w").close()
    match job.config.fault:
        case "segfault":
            os.kill(os.getpid(), signal.SIGSEGV)
        case "oom_kill":
            os.kill(os.getpid(), signal.SIGKILL)
        case "sticky":
            raise RuntimeError("CUDA error: an illegal memory access was encountered")
        case "device_oom":
            raise RuntimeError("CUDA out of memory. Tried to allocate 20 GiB")
        case "exit":
            sys.exit(3)


@hookimpl
def generate(job, context):
    mark("start", job)
    fail_once(job)
    ends = time.monotonic() + job.config.seconds
    while (left := ends - time.monotonic()) > 0:
        time.sleep(min(left, 0.05))
        context.progress(0, 1)
    path = context.output_path("png")
    Image.linear_gradient("L").resize((16, 16)).save(path)
    mark("end", job)
    return Generation(artifacts=(Artifact(path=path, media_type="image/png", seed=job.seed),))
"""


@define
class Row:
    """What one kind of fault did."""

    name: str
    jobs: int = 0
    faults: int = 0
    lost: int = 0
    duplicate_rows: int = 0
    re_executions: int = 0
    recoveries: list[float] = field(factory=list)
    seconds: float = 0.0
    #: Targets that were missed, in words.
    misses: list[str] = field(factory=list)

    @property
    def p99_recovery(self) -> float | None:
        """Seconds that 99 of 100 jobs needed from the fault to their report."""
        ordered = sorted(self.recoveries)
        return ordered[min(len(ordered) - 1, int(len(ordered) * 0.99))] if ordered else None

    def expect(self, is_met: bool, miss: str) -> None:
        """Note a target."""
        if not is_met:
            self.misses.append(miss)


@frozen(kw_only=True)
class Scale:
    """How much of everything."""

    kill_jobs: int
    kills: int
    zombies: int
    phases: int
    redis_jobs: int
    redis_kills: int
    cuts: int
    bad_jobs: int
    engine_rounds: int


FULL = Scale(
    kill_jobs=1000,
    kills=200,
    zombies=12,
    phases=7,
    redis_jobs=300,
    redis_kills=10,
    cuts=40,
    bad_jobs=200,
    engine_rounds=4,
)
QUICK = Scale(
    kill_jobs=18, kills=4, zombies=2, phases=3, redis_jobs=16, redis_kills=2, cuts=4, bad_jobs=10, engine_rounds=1
)


class Receiver(SupabaseServer):
    """Storage and endpoint that remember what counts, and misbehave as told."""

    def __init__(self) -> None:
        super().__init__(buckets={TYPE: Bucket()})
        #: Of each job, the ids under which a terminal status arrived, and when it first did.
        self.terminal_ids: defaultdict[str, set[str]] = defaultdict(set)
        self.terminal_statuses: defaultdict[str, set[str]] = defaultdict(set)
        self.finished_at: dict[str, float] = {}
        self.wrongs: list[str] = []
        #: Called with the operation, and for callbacks the status, before anything is done.
        self.on_request: Callable[[str], None] = lambda operation: None
        self.misbehave: Callable[[str], str | None] = lambda operation: None
        self.misbehaved = 0

    def answer(self, request: ReceivedRequest) -> Answer:
        """Route the request, past what may go wrong with it."""
        operation = self._operation(request)
        if operation is None:
            return super().answer(request)
        self.on_request(request.json()["status"] if operation == "callback" else operation)
        fault = self.misbehave(operation)
        self.misbehaved += fault is not None
        match fault:
            case "500" | "400" | "429":
                return Answer(status=int(fault), body=b"not now")
            case "hang":
                return Answer(status=504, delay_seconds=1.5)
            case "drop":
                return Answer(is_lost=True)
            case "commit and drop":
                self._perform(operation, request)
                return Answer(is_lost=True)
            case "truncate":
                return self._perform(operation, attrs.evolve(request, body=request.body[: len(request.body) // 2]))
            case "slow":
                return attrs.evolve(self._perform(operation, request), delay_seconds=0.5)
        return super().answer(request)

    def _take_callback(self, request: ReceivedRequest) -> Answer:
        body = request.json()
        job_id, status = body["job_id"], body["status"]
        if status == "processing":
            if job_id in self.finished_at:
                self.wrongs.append(f"{job_id}: processing after a terminal status")
        else:
            self.finished_at.setdefault(job_id, time.time())
            self.terminal_ids[job_id].add(request.headers["webhook-id"])
            self.terminal_statuses[job_id].add(status)
        if status == "completed":
            for asset, size in zip(body["assets"], body["metadata"]["assets_bytes"], strict=True):
                stored = self.objects.get((TYPE, asset))
                if stored is None or len(stored.body) != size or not stored.body.endswith(PNG_END):
                    self.wrongs.append(f"{job_id}: completed and {asset} is not whole")
        return super()._take_callback(request)


@define
class TransitionLog:
    """Every change of the books, in order, as Redis wrote it to its append-only file."""

    changes: int = 0
    wrongs: list[str] = field(factory=list)
    rows: defaultdict[str, set[str]] = field(factory=lambda: defaultdict(set))
    _tokens: dict[str, int] = field(factory=dict)
    _owners: dict[int, str] = field(factory=dict)

    @classmethod
    def read(cls, directory: Path) -> Self:
        """Check the log of the server that keeps its data in ``directory``."""
        log = cls()
        for file in sorted([*directory.glob("appendonly.aof"), *directory.glob("appendonlydir/*.incr.aof")]):
            for command in _commands(file.read_bytes()):
                log._apply(command)
        return log

    def _apply(self, command: list[bytes]) -> None:
        name, key = command[0].upper(), command[1].decode() if len(command) > 1 else ""
        if not key.startswith(f"{{{QUEUE}}}:"):
            return
        self.changes += 1
        place = key.rpartition(":")[2]
        if name in (b"HSET", b"HMSET") and place == "meta":
            self._note_token(command[2].decode(), int(json.loads(command[3])["token"]))
        elif name in (b"HSET", b"HMSET") and place == "rows":
            row = json.loads(command[3])
            if json.loads(row["body"])["status"] != "processing":
                self.rows[row["job_id"]].add(row["callback_id"])
        elif name == b"ZADD" and place in ("lease", "retry") and command[-1].decode() in self.rows:
            self.wrongs.append(f"{command[-1].decode()}: in flight again after its terminal row")

    def _note_token(self, job_id: str, token: int) -> None:
        if token < self._tokens.get(job_id, 0):
            self.wrongs.append(f"{job_id}: token {token} after {self._tokens[job_id]}")
        if self._owners.setdefault(token, job_id) != job_id:
            self.wrongs.append(f"{job_id}: token {token} belongs to {self._owners[token]}")
        if job_id in self.rows:
            self.wrongs.append(f"{job_id}: taken after its terminal row")
        self._tokens[job_id] = token


def _commands(content: bytes) -> Iterator[list[bytes]]:
    """The commands of an append-only file; the last may be cut."""
    at = 0
    with contextlib.suppress(ValueError, IndexError):
        while at < len(content):
            end = content.index(b"\r\n", at)
            count, at = int(content[at + 1 : end]), end + 2
            command = []
            for _ in range(count):
                end = content.index(b"\r\n", at)
                size, at = int(content[at + 1 : end]), end + 2
                command.append(content[at : at + size])
                at += size + 2
            yield command


@define
class Arena:
    """A Redis, a receiver and workers, all of them to be hurt."""

    directory: Path
    server: EmbeddedRedis
    client: redis.Redis
    queue: RedisQueue
    receiver: Receiver
    environ: dict[str, str]
    random: random.Random = field(factory=lambda: random.Random(5))
    processes: dict[str, subprocess.Popen[bytes]] = field(factory=dict)
    pushed: dict[str, float] = field(factory=dict)
    started: int = 0

    @classmethod
    @contextlib.contextmanager
    def opened(cls, **settings: str) -> Iterator[Self]:
        """A fresh arena; nothing is left of it after the block."""
        with tempfile.TemporaryDirectory(prefix="ourvidz-chaos-") as name, Receiver() as receiver:
            directory = Path(name)
            make_distribution(directory / "site", "ourvidz-chaos", PLUGIN)
            server = EmbeddedRedis(directory / "redis")
            client = redis.Redis.from_url(server.address)
            client.config_set("auto-aof-rewrite-percentage", 0)
            kept = {k: v for k, v in os.environ.items() if not k.startswith(("OURVIDZ_", "SUPABASE_", "REDIS_"))}
            arena = cls(
                directory=directory,
                server=server,
                client=client,
                queue=RedisQueue(client),
                receiver=receiver,
                environ={
                    **kept,
                    "PYTHONPATH": str(directory / "site"),
                    "CHAOS_MARKS": str(directory / "marks"),
                    "REDIS_URL": server.address,
                    "SUPABASE_URL": receiver.url,
                    "SUPABASE_SERVICE_KEY": receiver.key,
                    "OURVIDZ_ALLOW_PLUGINS": "ourvidz-chaos",
                    "OURVIDZ_STATE_DIR": str(directory / "state"),
                    "OURVIDZ_WORK_DIR": str(directory / "work"),
                    "OURVIDZ_DEVICE": "cpu",
                    "OURVIDZ_LOG_LEVEL": "warning",
                    "OURVIDZ_CALLBACK_SECRET": "chaos",
                    "OURVIDZ_LEASE_SECONDS": str(LEASE_SECONDS),
                    "OURVIDZ_MAX_ATTEMPTS": "50",
                    "OURVIDZ_RETRY_DELAY_SECONDS": "0.05",
                    "OURVIDZ_CALLBACK_RETRY_SECONDS": "0.1",
                    "OURVIDZ_CALLBACK_MIN_AGE_SECONDS": "0",
                    "OURVIDZ_DRAIN_SECONDS": "10",
                    **settings,
                },
            )
            try:
                yield arena
            finally:
                for process in arena.processes.values():
                    process.kill()
                    process.wait()
                client.close()
                arena.server.close()

    def start(self, *arguments: str, **environ: str) -> str:
        """Start a worker and answer its name."""
        self.started += 1
        name = f"worker-{self.started}"
        self.processes[name] = subprocess.Popen(
            [sys.executable, "-m", "ourvidz_core", "worker", *arguments],
            env={**self.environ, "OURVIDZ_WORKER_NAME": name, **environ},
            stderr=(self.directory / "log").open("ab"),
        )
        return name

    def push(self, count: int, **config: object) -> list[str]:
        """Push jobs the way the producer does."""
        ids = [f"job-{len(self.pushed) + number}" for number in range(count)]
        for job_id in ids:
            message = {"id": job_id, "type": TYPE, "prompt": "", "user_id": "u", "config": config}
            self.client.lpush(QUEUE, json.dumps(message))
            self.pushed[job_id] = time.time()
        return ids

    def kill(self, name: str) -> list[str]:
        """SIGKILL a worker; answers the jobs that it had."""
        stricken = self.jobs_of(name)
        process = self.processes.pop(name)
        process.kill()
        process.wait()
        return stricken

    def jobs_of(self, name: str) -> list[str]:
        """The jobs that a worker has a lease of."""
        return [
            job.key for job in self.queue.in_flight(QUEUE) if job.worker == name and job.lease_left_seconds is not None
        ]

    def marks(self, what: str = "start") -> list[tuple[str, float]]:
        """The executions so far, as (job, time)."""
        with contextlib.suppress(FileNotFoundError):
            *lines, _ = (self.directory / "marks").read_text().split("\n")  # the last may be half written
            marks = [line.split() for line in lines]
            return [(job_id, float(at)) for kind, job_id, at in marks if kind == what]
        return []

    def is_over(self) -> bool:
        """Whether every job was reported."""
        return len(self.receiver.finished_at) >= len(self.pushed)

    def wait(self, condition: Callable[[], object], seconds: float = 60.0) -> bool:
        """Wait for ``condition``; False says that it did not come true."""
        deadline = time.monotonic() + seconds
        while not condition():
            if time.monotonic() >= deadline:
                return False
            time.sleep(0.005)
        return True

    def wait_until_over(self, seconds: float = 120.0) -> None:
        """Wait for the last report, and for repetitions that might follow it."""
        self.wait(self.is_over, seconds)
        self.wait(lambda: not self.queue.depth(QUEUE).callbacks, 15.0)
        time.sleep(0.2)

    def judge(self, row: Row, *, hit_at: Mapping[str, float] | None = None) -> TransitionLog:
        """Count what became of the jobs into ``row``, and check the books."""
        receiver, log = self.receiver, TransitionLog.read(self.directory / "redis")
        row.jobs += len(self.pushed)
        lost = self.pushed.keys() - receiver.finished_at.keys()
        row.lost += len(lost)
        row.duplicate_rows += sum(len(ids) - 1 for ids in log.rows.values())
        row.re_executions += len(self.marks()) - len({job_id for job_id, _ in self.marks()})
        for job_id, at in (hit_at or {}).items():
            if job_id in receiver.finished_at and receiver.finished_at[job_id] > at:
                row.recoveries.append(receiver.finished_at[job_id] - at)
        row.expect(not lost, f"{len(lost)} jobs were lost: {sorted(lost)[:3]}; {self.said()}")
        row.expect(not row.duplicate_rows, f"{row.duplicate_rows} jobs have more than one terminal row")
        several = [job_id for job_id, ids in receiver.terminal_ids.items() if len(ids) > 1]
        row.expect(not several, f"{len(several)} jobs were reported under more than one id")
        mixed = [job_id for job_id, statuses in receiver.terminal_statuses.items() if len(statuses) > 1]
        row.expect(not mixed, f"{len(mixed)} jobs have two terminal statuses")
        row.misses.extend(receiver.wrongs)
        row.misses.extend(log.wrongs)
        return log

    def said(self) -> str:
        """The end of the workers' log."""
        return (
            (self.directory / "log").read_text("utf-8", "replace")[-1500:] if (self.directory / "log").exists() else ""
        )

    def is_failed(self) -> int:
        """How many jobs were reported as failed."""
        return sum("failed" in statuses for statuses in self.receiver.terminal_statuses.values())


def kill_workers(scale: Scale, logs: list[TransitionLog]) -> Row:
    """SIGKILL at random instants, spread over the whole run."""
    row = Row(f"{scale.kills} SIGKILL, 3 workers", faults=scale.kills)
    with Arena.opened() as arena:
        workers = [arena.start() for _ in range(3)]
        arena.push(scale.kill_jobs, seconds=0.05)
        arena.wait(lambda: arena.receiver.finished_at)
        hit_at: dict[str, float] = {}
        for kill in range(scale.kills):
            enough = scale.kill_jobs * kill // scale.kills
            arena.wait(lambda enough=enough: len(arena.receiver.finished_at) >= enough, 3.0)
            time.sleep(arena.random.uniform(0.0, 0.2))
            chosen = arena.random.randrange(3)
            stricken, now = arena.kill(workers[chosen]), time.time()
            hit_at.update(dict.fromkeys(stricken, now))
            workers[chosen] = arena.start()
        arena.wait_until_over()
        logs.append(arena.judge(row, hit_at=hit_at))
        row.expect(not arena.is_failed(), f"{arena.is_failed()} jobs were reported as failed")
    row.expect(row.re_executions <= scale.kills, f"{row.re_executions} re-executions after {scale.kills} kills")
    row.expect((row.p99_recovery or 0) <= RECOVERY_SECONDS, f"p99 of recovery {row.p99_recovery} s")
    return row


def freeze_workers(scale: Scale, logs: list[TransitionLog]) -> Row:
    """SIGSTOP for longer than the lease, in mid generation and right before the finish; then SIGCONT."""
    row = Row(f"{scale.zombies} SIGSTOP beyond the lease", faults=scale.zombies)
    with Arena.opened() as arena:
        for _ in range(2):
            arena.start()
        arena.wait(lambda: len(arena.processes) == 2)
        for number in range(scale.zombies):
            is_late = number % 2 == 1
            reached = threading.Event()
            arena.receiver.on_request = lambda operation, reached=reached: (
                reached.set() if operation == "info" else None
            )
            if is_late:
                arena.receiver.misbehave = lambda operation: "slow" if operation == "info" else None
            (job_id,) = arena.push(1, seconds=0.5)
            if is_late:
                reached.wait(20)
            else:
                arena.wait(lambda job_id=job_id: job_id in dict(arena.marks()))
            holder = next((name for name in arena.processes if job_id in arena.jobs_of(name)), None)
            if holder is None:
                row.misses.append(f"{job_id} was in nobody's hands")
                continue
            zombie = arena.processes[holder]
            zombie.send_signal(signal.SIGSTOP)
            arena.receiver.misbehave = lambda operation: None
            arena.wait(lambda job_id=job_id: job_id in arena.receiver.finished_at, RECOVERY_SECONDS)
            zombie.send_signal(signal.SIGCONT)
            time.sleep(1.0)
            row.expect(zombie.poll() is None, f"the zombie {holder} did not live on")
        arena.wait_until_over()
        logs.append(arena.judge(row))
    row.expect(row.re_executions <= scale.zombies, f"{row.re_executions} re-executions after {scale.zombies} freezes")
    return row


PHASES = ("generating", "info", "processing", "claimed", "storage", "completed", "starting")


def stop_workers(scale: Scale, logs: list[TransitionLog]) -> Row:
    """SIGTERM at each phase of a job: exit code 0, and the rest is done by another."""
    phases = PHASES[: scale.phases]
    row = Row(f"SIGTERM at {len(phases)} phases", faults=len(phases))
    with Arena.opened() as arena:
        for phase in phases:
            reached = threading.Event()
            arena.receiver.on_request = lambda operation, phase=phase, reached=reached: (
                reached.set() if operation == phase else None
            )
            before = len(arena.marks())
            arena.push(2, seconds=0.2)
            name = arena.start()
            if phase == "generating":
                arena.wait(lambda before=before: len(arena.marks()) > before)
            elif phase == "claimed":
                arena.wait(lambda name=name: arena.jobs_of(name))
            elif phase == "starting":
                arena.wait(lambda: any((arena.directory / "work").glob("worker-*")))
            else:
                reached.wait(20)
            process = arena.processes.pop(name)
            process.terminate()
            try:
                code: int | None = process.wait(20)
            except subprocess.TimeoutExpired:
                process.kill()
                code = None
            row.expect(code == 0, f"SIGTERM while {phase}: exit code {code}")
        arena.start("--drain")
        arena.wait_until_over()
        logs.append(arena.judge(row))
    row.expect(row.re_executions == 0, f"{row.re_executions} re-executions although every worker could end well")
    return row


def kill_redis(scale: Scale, logs: list[TransitionLog]) -> Row:
    """kill -9 of the server, which starts again from its append-only file."""
    row = Row(f"{scale.redis_kills} kill -9 of Redis", faults=scale.redis_kills)
    with Arena.opened() as arena:
        for _ in range(3):
            arena.start()
        arena.push(scale.redis_jobs, seconds=0.1)
        arena.wait(lambda: arena.receiver.finished_at)
        for kill in range(scale.redis_kills):
            enough = scale.redis_jobs * kill // scale.redis_kills
            arena.wait(lambda enough=enough: len(arena.receiver.finished_at) >= enough, 8.0)
            time.sleep(arena.random.uniform(0.0, 0.3))
            os.kill(arena.client.info("server")["process_id"], signal.SIGKILL)
            time.sleep(arena.random.uniform(0.1, 0.5))
            again = EmbeddedRedis(arena.directory / "redis")
            arena.server.close()
            arena.server = again
            arena.client.config_set("auto-aof-rewrite-percentage", 0)
        arena.wait_until_over()
        logs.append(arena.judge(row))
    return row


class CutProxy:
    """Stands between the workers and Redis: cuts all connections when it is told to, and counts what is asked."""

    def __init__(self, address: str) -> None:
        self._upstream = urlsplit(address)
        self.round_trips = 0
        self._loop = asyncio.new_event_loop()
        self._connections: set[_Connection] = set()
        self._server = self._loop.run_until_complete(asyncio.start_server(self._serve, "127.0.0.1", 0))
        self.address = f"redis://127.0.0.1:{self._server.sockets[0].getsockname()[1]}"
        threading.Thread(target=self._loop.run_forever, daemon=True).start()

    def cut(self, *, is_after: bool) -> None:
        """Cut every connection: now, or once what it is waiting for was done and before the reply is passed on."""
        self._loop.call_soon_threadsafe(self._cut, is_after)

    def close(self) -> None:
        """Cut everything and take no more."""
        self._loop.call_soon_threadsafe(self._server.close)
        self.cut(is_after=False)
        time.sleep(0.05)
        self._loop.call_soon_threadsafe(self._loop.stop)

    def _cut(self, is_after: bool) -> None:
        for connection in list(self._connections):
            if is_after:
                connection.is_doomed = True
                self._loop.call_later(0.3, connection.close)
            else:
                connection.close()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        if self._upstream.scheme == "unix":
            upstream_reader, upstream_writer = await asyncio.open_unix_connection(self._upstream.path)
        else:
            upstream_reader, upstream_writer = await asyncio.open_connection(
                self._upstream.hostname, self._upstream.port
            )
        connection = _Connection(self, writer, upstream_writer)
        self._connections.add(connection)
        try:
            await asyncio.gather(
                connection.pass_on(reader, upstream_writer, is_reply=False),
                connection.pass_on(upstream_reader, writer, is_reply=True),
            )
        finally:
            self._connections.discard(connection)


@define(eq=False)
class _Connection:
    proxy: CutProxy
    writer: asyncio.StreamWriter
    upstream: asyncio.StreamWriter
    is_doomed: bool = False
    is_asking: bool = False

    async def pass_on(self, source: asyncio.StreamReader, target: asyncio.StreamWriter, *, is_reply: bool) -> None:
        with contextlib.suppress(OSError):
            while data := await source.read(65536):
                if is_reply and self.is_doomed:
                    break
                self.proxy.round_trips += not is_reply and not self.is_asking
                self.is_asking = not is_reply
                target.write(data)
                await target.drain()
        self.close()

    def close(self) -> None:
        for writer in (self.writer, self.upstream):
            writer.transport.abort()


def cut_connections(scale: Scale, logs: list[TransitionLog]) -> Row:
    """Every connection of every worker cut, every second time after the command ran."""
    row = Row(f"all connections cut {scale.cuts} times", faults=scale.cuts)
    with Arena.opened() as arena:
        proxy = CutProxy(arena.server.address)
        arena.environ["REDIS_URL"] = proxy.address
        for _ in range(3):
            arena.start()
        arena.push(scale.redis_jobs, seconds=0.1)
        arena.wait(lambda: arena.receiver.finished_at)
        for cut in range(scale.cuts):
            enough = scale.redis_jobs * cut // scale.cuts
            arena.wait(lambda enough=enough: len(arena.receiver.finished_at) >= enough, 5.0)
            time.sleep(arena.random.uniform(0.0, 0.3))
            proxy.cut(is_after=cut % 2 == 0)
        arena.wait_until_over()
        logs.append(arena.judge(row))
        proxy.close()
    return row


#: How likely each trouble is, for each request of the kind.
TROUBLE: Mapping[str, Mapping[str, float]] = {
    "callback": {"500": 0.12, "400": 0.12, "429": 0.03, "commit and drop": 0.1, "drop": 0.05, "hang": 0.04},
    "storage": {"500": 0.1, "truncate": 0.1, "slow": 0.08, "commit and drop": 0.06, "drop": 0.04, "hang": 0.02},
    "info": {"500": 0.06, "drop": 0.04, "slow": 0.03},
}


def trouble_services(scale: Scale, logs: list[TransitionLog]) -> Row:
    """An endpoint and a storage that fail in every way they can, in a third of all requests."""
    row = Row("endpoint and storage fail")
    with Arena.opened(OURVIDZ_CALLBACK_TIMEOUT_SECONDS="1", OURVIDZ_UPLOAD_TIMEOUT_SECONDS="1") as arena:
        chance = random.Random(8)

        def misbehave(operation: str) -> str | None:
            troubles = TROUBLE.get(operation, {})
            (chosen,) = chance.choices([*troubles, None], [*troubles.values(), 1 - sum(troubles.values())])
            return chosen

        arena.receiver.misbehave = misbehave
        for _ in range(2):
            arena.start()
        arena.push(scale.bad_jobs)
        arena.wait_until_over(300.0)
        row.faults = arena.receiver.misbehaved
        logs.append(arena.judge(row))
        bodies: defaultdict[str, set[str]] = defaultdict(set)
        for request in arena.receiver.requests:
            if request.path.endswith("/job-callback") and request.json()["status"] != "processing":
                bodies[request.json()["job_id"]].add(hashlib.sha256(request.body).hexdigest())
        changed = sum(len(hashes) > 1 for hashes in bodies.values())
        row.expect(not changed, f"{changed} callbacks were sent with two bodies")
        row.expect(not arena.is_failed(), f"{arena.is_failed()} jobs were reported as failed")
    return row


ENGINE_FAULTS = ("segfault", "oom_kill", "sticky", "device_oom", "exit")


def break_engines(scale: Scale, logs: list[TransitionLog]) -> Row:
    """What can go wrong beside the device; the job runs again, or is reported, within seconds."""
    row = Row("engine crashes", faults=len(ENGINE_FAULTS) * scale.engine_rounds)
    with Arena.opened() as arena:
        name = arena.start()
        faulty = {arena.push(1, fault=fault)[0]: fault for _ in range(scale.engine_rounds) for fault in ENGINE_FAULTS}
        arena.push(2)
        arena.wait_until_over()
        starts: defaultdict[str, list[float]] = defaultdict(list)
        for job_id, at in arena.marks():
            starts[job_id].append(at)
        for job_id in faulty:
            answered = starts[job_id][1] if len(starts[job_id]) > 1 else arena.receiver.finished_at.get(job_id, 0.0)
            row.recoveries.append(answered - starts[job_id][0])
        row.expect(arena.processes[name].poll() is None, "the worker died with its engine")
        outcomes = Counter(fault for job_id, fault in faulty.items() if len(starts[job_id]) > 1)
        row.expect(outcomes == dict.fromkeys(ENGINE_FAULTS[:-1], scale.engine_rounds), f"tried again: {dict(outcomes)}")
        row.expect(arena.is_failed() == scale.engine_rounds, f"{arena.is_failed()} jobs failed")
        logs.append(arena.judge(row))
    row.expect(max(row.recoveries) <= ENGINE_RECOVERY_SECONDS, f"{max(row.recoveries):.1f} s until a job was seen to")
    return row


def check_books(logs: list[TransitionLog]) -> Row:
    """The invariants over every change of every run: they are checked as each run ends, and counted here."""
    row = Row(f"{sum(log.changes for log in logs)} changes of the books")
    row.jobs = sum(len(log.rows) for log in logs)
    row.duplicate_rows = sum(len(ids) - 1 for log in logs for ids in log.rows.values())
    row.misses = [wrong for log in logs for wrong in log.wrongs]
    row.expect(all(log.changes for log in logs), "a run left no log")
    return row


ROWS: Mapping[str, tuple[Callable[[Scale, list[TransitionLog]], Row], ...]] = {
    "1": (kill_workers,),
    "2": (freeze_workers, stop_workers),
    "3": (kill_redis, cut_connections),
    "4": (trouble_services,),
    "5": (break_engines,),
}


def run(rows: list[str], scale: Scale, *, at_once: int = 1) -> Iterator[Row]:
    """Run the rows asked for; 6 is the books of those that ran."""
    logs: list[TransitionLog] = []

    def one(number: str, function: Callable[[Scale, list[TransitionLog]], Row]) -> Row:
        started = time.monotonic()
        row = function(scale, logs)
        row.name, row.seconds = f"{number}. {row.name}", time.monotonic() - started
        return row

    with ThreadPoolExecutor(at_once) as pool:
        yield from pool.map(
            lambda item: one(*item), [(number, each) for number in rows for each in ROWS.get(number, ())]
        )
    if "6" in rows and logs:
        row = check_books(logs)
        row.name = f"6. {row.name}"
        yield row


def main() -> int:
    """Measure, print, and end with 1 where a target is missed."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="a little of everything, in less than a minute")
    parser.add_argument("--rows", default="1,2,3,4,5,6", help="which rows, comma-separated; 7 is the overhead")
    parser.add_argument("--json", action="store_true", help="print JSON")
    options = parser.parse_args()
    asked = options.rows.split(",")
    done = []
    # A little of everything is mostly waiting, so three may wait together.
    for row in run(asked, QUICK if options.quick else FULL, at_once=3 if options.quick else 1):
        done.append(row)
        print(f"{row.name}: {row.seconds:.0f} s, {len(row.misses)} targets missed", file=sys.stderr)
    if options.json:
        print(
            json.dumps(
                [{**attrs.asdict(r), "recoveries": len(r.recoveries), "p99_recovery": r.p99_recovery} for r in done],
                indent=2,
            )
        )
    else:
        head = ("what", "jobs", "faults", "lost", "duplicate rows", "re-executions", "p99 recovery s", "verdict")
        cells = [
            (
                row.name,
                row.jobs,
                row.faults,
                row.lost,
                row.duplicate_rows,
                row.re_executions,
                "-" if row.p99_recovery is None else f"{row.p99_recovery:.1f}",
                "missed" if row.misses else "met",
            )
            for row in done
        ]
        print(table(head, cells))
    for row in done:
        for miss in row.misses:
            print(f"MISSED {row.name}: {miss}", file=sys.stderr)
    code = 1 if any(row.misses for row in done) else 0
    if "7" in asked:
        overhead = Path(__file__).parent / "overhead.py"
        code = max(code, subprocess.run([sys.executable, str(overhead)], check=False).returncode)
    return code


if __name__ == "__main__":
    sys.exit(main())
