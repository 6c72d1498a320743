"""A hundred workers on one Redis: does a job cost the same however many there are, and is any lost when they die?

``python -m benchmarks.scale [--quick] [--workers 1,10,50,100] [--jobs 100000] [--json]``. It brings its own Redis.
The workers are real: the loop, the leases, the callbacks' dispatcher, the board, each with connections of its own. What
is light is what they work with: an engine that sleeps and leaves a small file, a storage that takes it at its word, a
callback endpoint that is a file, and no spool. Five workers share a process, because a hundred processes of 70 MB would
measure the machine's memory; a kill ends a process, and so five workers at once.

First a fleet of each size is watched when nothing waits, when one job comes at a time, and when there is always more.
Then the largest does all jobs while its processes are killed at random and replaced. A run without options also writes
the tables of ``docs/explanation/scale.md``. Ends with 1 where a target is missed.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import platform
import random
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Self, cast

import attrs
import psutil
import redis
from attrs import define, field, frozen

from ourvidz_core import Artifact, Generation, JobType, hookimpl
from ourvidz_core.delivery.board import RedisBoard
from ourvidz_core.delivery.callbacks import MaySend, always
from ourvidz_core.delivery.embedded import EmbeddedRedis
from ourvidz_core.delivery.redis_queue import RedisQueue
from ourvidz_core.delivery.references import StubReferences
from ourvidz_core.engine.host import OnMoment, OnProgress, ignore_moment, ignore_progress
from ourvidz_core.errors import JobCancelled
from ourvidz_core.observe.watch import Subject, watched
from ourvidz_core.plugins.loading import load_registry
from ourvidz_core.settings import Settings
from ourvidz_core.testing.host import plugin_module
from ourvidz_core.wire.artifacts import Asset, FinishedGeneration
from ourvidz_core.wire.jobs import Job
from ourvidz_core.wire.states import EngineState
from ourvidz_core.worker.parts import WorkerParts
from ourvidz_core.worker.runner import JobRunner
from ourvidz_core.worker.slot import EngineSlot
from ourvidz_core.worker.worker import Worker
from ourvidz_core.worker.workspace import Workspace

QUEUE, TYPE = "scale_queue", "scale_image"
PAGE = Path(__file__).parent.parent / "docs/explanation/scale.md"
RESULT = PAGE.with_suffix(".json")
BEGIN, END = "<!-- Made by benchmarks/scale.py: {} -->", "<!-- the end of it -->"
WORKERS_IN_A_PROCESS = 5
#: What a job takes: long enough that two cores keep a hundred workers going.
JOB_SECONDS = 0.5
LEASE_SECONDS = 10.0
#: Between two kills, on average.
KILL_SECONDS = 6.0
#: The kills end before the jobs do, so that what they interrupted is seen to end.
KILLED_SHARE = 0.95
#: A fleet's cost of a job may be so much larger than that of a few workers.
FLAT = 1.5
#: With less of the machine than this left, its cores decide how fast the workers are.
BUSY_SHARE = 0.85
#: What a client sends to Redis, each once a round trip; none of them is called inside a script.
ROUND_TRIPS = ("evalsha", "blmove", "set", "ltrim")


# -- a process with some workers


class LightPlugin:
    """One job type; its engine is :class:`LightEngine`."""

    @hookimpl
    def register_job_types(self) -> Iterator[JobType]:
        """The only one."""
        yield JobType(name=TYPE, queue=QUEUE, content_type="image", timeout_seconds=60)


class Marks:
    """A file of lines that other processes append to as well; what was written outlives the process."""

    def __init__(self, path: Path) -> None:
        self._descriptor = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)

    def add(self, *words: object) -> None:
        """Append a line."""
        os.write(self._descriptor, (" ".join(map(str, words)) + "\n").encode())


class LightEngine:
    """Takes as long as a job is said to take, and leaves a small file. Counts half-way, as engines count steps."""

    state = EngineState.READY

    def __init__(self, marks: Marks, seconds: float) -> None:
        self._marks = marks
        self._seconds = seconds

    def run(
        self,
        job: Job,
        *,
        work_dir: Path,
        timeout_seconds: float,  # noqa: ARG002 - the protocol names it
        on_progress: OnProgress = ignore_progress,
        on_begun: OnMoment = ignore_moment,
        on_generated: OnMoment = ignore_moment,  # noqa: ARG002 - the same
        cancelled: threading.Event | None = None,
    ) -> FinishedGeneration:
        """Sleep."""
        on_begun()
        self._marks.add("start", job.id, time.time())
        for step in range(2):
            on_progress("generate", step, 2)
            if cancelled is not None and cancelled.wait(self._seconds / 2):
                raise JobCancelled("the job was cancelled")
        path = work_dir / "light.png"
        path.write_bytes(b"light")
        generation = Generation(artifacts=(Artifact(path=path, media_type="image/png"),))
        return FinishedGeneration(job=job, generation=generation, seconds=self._seconds)

    def close(self) -> None:
        """There is nothing to end."""


class LightStorage:
    """Takes everything and keeps nothing."""

    def store(self, file: Path, *, bucket: str, path: str, media_type: str) -> Asset:
        """Say that it is stored."""
        size = file.stat().st_size
        return Asset(bucket=bucket, path=path, media_type=media_type, size_bytes=size, sha256="", reported_as=path)

    def close(self) -> None:
        """There is nothing to close."""


class LightCallbacks:
    """An endpoint that is a file."""

    def __init__(self, marks: Marks) -> None:
        self._marks = marks

    def send(self, callback_id: str, job_id: str, body: bytes, *, may_send: MaySend = always) -> None:
        """Note the callback."""
        if may_send():
            self._marks.add(json.loads(body)["status"], job_id, callback_id)


def work(directory: Path, address: str, names: Sequence[str], seconds: float) -> None:
    """Run a worker under each of ``names`` until SIGTERM."""
    marks = Marks(directory / "marks")
    running: list[Worker] = []
    with contextlib.ExitStack() as stack:
        threads = []
        for name in names:
            settings = Settings(
                redis_url=address,
                device="cpu",
                worker_name=name,
                work_dir=directory / "work",
                state_dir=directory / "state",
                lease_seconds=LEASE_SECONDS,
                # What luck kills three times shall be delivered rather than reported as poison.
                max_attempts=50,
                callback_min_age_seconds=0.0,
                min_free_disk_mb=0.0,
                health_address="off",
            )
            worker = stack.enter_context(_light_worker(settings, address, marks, seconds))
            running.append(worker)
            threads.append(threading.Thread(target=worker.run, name=name))
        signal.signal(signal.SIGTERM, lambda *_: [threading.Thread(target=worker.stop).start() for worker in running])
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()


@contextlib.contextmanager
def _light_worker(settings: Settings, address: str, marks: Marks, seconds: float) -> Iterator[Worker]:
    registry = load_registry(settings, [plugin_module(LightPlugin(), distribution="light")])
    workspace = Workspace(settings.work_dir)
    slot = EngineSlot(LightEngine(marks, seconds), report=registry.report)
    runner = JobRunner(
        registry=registry, engine=slot, references=StubReferences({}), storage=LightStorage(), workspace=workspace
    )
    with contextlib.closing(RedisQueue.connect(address)) as queue, contextlib.closing(workspace):
        parts = WorkerParts(
            queue=queue,
            callbacks=LightCallbacks(marks),
            runner=runner,
            slot=slot,
            registry=registry,
            workspace=workspace,
            settings=settings,
        )
        worker = Worker(parts, [QUEUE])
        subject = Subject(
            queue=queue,
            queues=(QUEUE,),
            state=lambda: worker.state,
            engine=lambda: slot.state,
            busy_seconds=lambda: slot.busy_seconds,
            dropped_records=lambda: 0,
            vitals=parts.vitals,
        )
        with watched(settings, registry, RedisBoard.connect(address), subject):
            yield worker


# -- many such processes


@frozen(kw_only=True)
class Reading:
    """What had been used at one moment."""

    at: float
    jobs: int
    round_trips: int
    #: Seconds of processor time.
    redis_seconds: float
    worker_seconds: float
    #: Of the whole machine, whoever used it; and how much there was of it.
    busy_seconds: float
    machine_seconds: float


@frozen(kw_only=True)
class Spent:
    """What was used between two readings."""

    seconds: float
    jobs: int
    round_trips: int
    redis_seconds: float
    worker_seconds: float
    #: Share of the machine's cores, from 0 to 1.
    machine_share: float

    @classmethod
    def between(cls, first: Reading, last: Reading) -> Self:
        """The difference."""
        return cls(
            seconds=last.at - first.at,
            jobs=last.jobs - first.jobs,
            round_trips=last.round_trips - first.round_trips,
            redis_seconds=last.redis_seconds - first.redis_seconds,
            worker_seconds=last.worker_seconds - first.worker_seconds,
            machine_share=(last.busy_seconds - first.busy_seconds) / (last.machine_seconds - first.machine_seconds),
        )


@define(kw_only=True)
class Fleet:
    """Processes with workers on one Redis, and what they leave behind."""

    directory: Path
    address: str
    client: redis.Redis
    queue: RedisQueue
    seconds: float
    hosts: dict[subprocess.Popen[bytes], tuple[str, ...]] = field(factory=dict)
    _started: int = 0

    @classmethod
    @contextlib.contextmanager
    def on_new_redis(cls, seconds: float) -> Iterator[Self]:
        """Jobs take ``seconds``. Everything ends with the block."""
        with tempfile.TemporaryDirectory() as name:
            embedded = EmbeddedRedis(Path(name) / "redis")
            with redis.Redis.from_url(embedded.address) as client:
                made = cls(
                    directory=Path(name),
                    address=embedded.address,
                    client=client,
                    queue=RedisQueue(client),
                    seconds=seconds,
                )
                try:
                    yield made
                finally:
                    made.kill_all()
                    embedded.close()

    def start(self, workers: int) -> None:
        """Start so many workers, and return when all are there."""
        for first in range(0, workers, WORKERS_IN_A_PROCESS):
            self.start_one(min(WORKERS_IN_A_PROCESS, workers - first))
        with contextlib.closing(RedisBoard(redis.Redis.from_url(self.address))) as board:
            wait_for(lambda: len(board.workers()) >= workers, 120.0, "the workers did not start")

    def start_one(self, workers: int) -> None:
        """Start a process."""
        self._started += 1
        names = tuple(f"light-{self._started}-{number}" for number in range(workers))
        arguments = [str(self.directory), self.address, ",".join(names), str(self.seconds)]
        process = subprocess.Popen(
            [sys.executable, "-m", "benchmarks.scale", "work", *arguments],
            cwd=Path(__file__).parent.parent,
            stderr=(self.directory / "log").open("ab"),
        )
        self.hosts[process] = names

    def kill_one(self, chosen: random.Random) -> Counter[str]:
        """Kill a process as it is, start another, and say which jobs it had."""
        process = chosen.choice(list(self.hosts))
        names = self.hosts.pop(process)
        # Frozen first: what it has then is what it had when it died.
        process.send_signal(signal.SIGSTOP)
        in_hand = Counter(job.key for job in self.queue.in_flight(QUEUE) if job.worker in names)
        process.kill()
        process.wait()
        self.start_one(len(names))
        return in_hand

    def kill_all(self) -> None:
        """End it, at once."""
        for process in self.hosts:
            process.kill()
        for process in self.hosts:
            process.wait()
        self.hosts.clear()

    def forget(self) -> None:
        """Empty Redis and the marks."""
        self.client.flushall()
        (self.directory / "marks").unlink(missing_ok=True)

    def push(self, first: int, count: int) -> None:
        """Push jobs, numbered from ``first``."""
        for start in range(first, first + count, 1000):
            numbers = range(start, min(start + 1000, first + count))
            self.client.lpush(QUEUE, *[json.dumps(_message(number)) for number in numbers])

    @property
    def done(self) -> int:
        """How many jobs have ended for good."""
        return cast(int, self.client.zcard(f"{{{QUEUE}}}:done"))

    def read(self) -> Reading:
        """What has been used so far."""
        calls = self.client.info("commandstats")
        used = self.client.info("cpu")
        workers = [psutil.Process(process.pid).cpu_times() for process in self.hosts]
        machine = psutil.cpu_times()
        idle = machine.idle + getattr(machine, "iowait", 0.0)
        return Reading(
            at=time.monotonic(),
            jobs=self.done,
            round_trips=sum(calls.get(f"cmdstat_{name}", {}).get("calls", 0) for name in ROUND_TRIPS),
            redis_seconds=used["used_cpu_user"] + used["used_cpu_sys"],
            worker_seconds=sum(times.user + times.system for times in workers),
            busy_seconds=sum(machine) - idle,
            machine_seconds=sum(machine),
        )

    def marks(self) -> list[list[str]]:
        """What the workers noted, in words; a line that a kill cut short is left out."""
        with contextlib.suppress(FileNotFoundError):
            lines = [line.split() for line in (self.directory / "marks").read_text("utf-8").splitlines()]
            return [words for words in lines if len(words) == 3]
        return []


def _message(number: int) -> dict[str, Any]:
    return {"id": f"job-{number}", "type": TYPE, "prompt": "x" * 200, "user_id": "user"}


def wait_for(condition: Any, seconds: float, otherwise: str) -> None:
    """Return when ``condition()`` is true."""
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            raise TimeoutError(otherwise)
        time.sleep(0.1)


# -- what a job costs in a fleet of one size


@frozen(kw_only=True)
class Size:
    """What a fleet of one size does and costs."""

    workers: int
    connections: int
    #: Round trips a second of one worker with nothing to do, and the part of a core that Redis uses for all of them.
    idle_round_trips: float
    idle_redis_share: float
    #: One job comes and all others wait: round trips and Redis's milliseconds until all wait again.
    sparse_round_trips: float
    sparse_redis_ms: float
    sparse_start_ms: float
    #: There is always one more job.
    jobs_a_second: float
    jobs_a_second_a_worker: float
    round_trips: float
    redis_ms: float
    worker_ms: float
    machine_share: float

    @property
    def is_limited_by_cores(self) -> bool:
        """Whether this machine was too small to show how fast the workers are."""
        return self.machine_share >= BUSY_SHARE


def measure(fleet: Fleet, workers: int, *, window: float) -> Size:
    """Watch a fleet for ``window`` seconds in each of the three states."""
    fleet.forget()
    fleet.start(workers)
    time.sleep(2.0)
    first = fleet.read()
    time.sleep(window)
    idle = Spent.between(first, fleet.read())

    alone = max(int(window), 5)
    pushed_at = []
    first = fleet.read()
    for number in range(alone):
        pushed_at.append(time.time())
        fleet.push(number, 1)
        time.sleep(1.0)
    sparse = Spent.between(first, fleet.read())
    started_at = {job_id: float(at) for kind, job_id, at in fleet.marks() if kind == "start"}
    waits = [(started_at[f"job-{number}"] - at) * 1000 for number, at in enumerate(pushed_at)]
    # What they would have cost Redis without a job is no part of the job's cost.
    idle_trips, idle_seconds = idle.round_trips / idle.seconds, idle.redis_seconds / idle.seconds

    fleet.push(alone, int(workers / fleet.seconds * (window + 20)))
    settled = alone + workers * 2
    wait_for(lambda: fleet.done >= settled, 120.0, "the workers did not begin")
    connections = fleet.client.info("clients")["connected_clients"] - 1
    first = fleet.read()
    time.sleep(window)
    busy = Spent.between(first, fleet.read())
    fleet.kill_all()
    return Size(
        workers=workers,
        connections=connections,
        idle_round_trips=idle_trips / workers,
        idle_redis_share=idle_seconds,
        sparse_round_trips=(sparse.round_trips - idle_trips * sparse.seconds) / alone,
        sparse_redis_ms=(sparse.redis_seconds - idle_seconds * sparse.seconds) / alone * 1000,
        sparse_start_ms=statistics.median(waits),
        jobs_a_second=busy.jobs / busy.seconds,
        jobs_a_second_a_worker=busy.jobs / busy.seconds / workers,
        round_trips=busy.round_trips / busy.jobs,
        redis_ms=busy.redis_seconds / busy.jobs * 1000,
        worker_ms=busy.worker_seconds / busy.jobs * 1000,
        machine_share=busy.machine_share,
    )


# -- all jobs, with kills


@frozen(kw_only=True)
class Soak:
    """What became of all jobs while processes were killed."""

    workers: int
    jobs: int
    seconds: float
    #: Processes that were killed, and the jobs that they had.
    kills: int
    interrupted: int
    completed: int
    #: Jobs without a terminal callback, and with two different ones.
    lost: int
    two_outcomes: int
    #: Runs beyond the first; and those of them that no kill explains.
    repeated_runs: int
    unexplained_runs: int
    #: Terminal callbacks that arrived again under their own id.
    repeated_callbacks: int
    left_in_the_books: int

    @property
    def is_met(self) -> bool:
        """Whether the delivery guarantee held."""
        wrong = self.lost + self.two_outcomes + self.unexplained_runs + self.left_in_the_books
        return wrong == 0 and self.completed == self.jobs and self.kills > 0


def soak(fleet: Fleet, workers: int, jobs: int, *, seed: int = 9) -> Soak:
    """Do ``jobs`` jobs with ``workers`` workers, of which five at a time are killed."""
    fleet.forget()
    fleet.push(0, jobs)
    begun = time.monotonic()
    fleet.start(workers)
    chosen = random.Random(seed)
    interrupted: Counter[str] = Counter()
    kills = 0
    while fleet.done < jobs * KILLED_SHARE:
        time.sleep(KILL_SECONDS * chosen.uniform(0.5, 1.5))
        interrupted += fleet.kill_one(chosen)
        kills += 1

    def books() -> int:
        depth = fleet.queue.depth(QUEUE)
        return depth.waiting + depth.in_flight + depth.retrying + depth.callbacks

    with contextlib.suppress(TimeoutError):
        wait_for(lambda: fleet.done >= jobs, 120.0 + jobs * fleet.seconds / workers, "")
    seconds = time.monotonic() - begun
    with contextlib.suppress(TimeoutError):
        # A worker that was killed with a callback in its hands keeps it from the others for most of a minute.
        wait_for(lambda: not books(), 120.0, "")
    left = books()
    fleet.kill_all()
    marks = fleet.marks()
    runs = Counter(words[1] for words in marks if words[0] == "start")
    outcomes: dict[str, Counter[str]] = {}
    for status, job_id, callback_id in marks:
        if status in ("completed", "failed"):
            outcomes.setdefault(job_id, Counter())[callback_id] += 1
    completed = {job_id for status, job_id, _ in marks if status == "completed"}
    return Soak(
        workers=workers,
        jobs=jobs,
        seconds=seconds,
        kills=kills,
        interrupted=interrupted.total(),
        completed=len(completed),
        lost=sum(f"job-{number}" not in outcomes for number in range(jobs)),
        two_outcomes=sum(len(ids) > 1 for ids in outcomes.values()),
        repeated_runs=runs.total() - len(runs),
        unexplained_runs=sum(max(count - 1 - interrupted[job_id], 0) for job_id, count in runs.items()),
        repeated_callbacks=sum(ids.total() - len(ids) for ids in outcomes.values()),
        left_in_the_books=left,
    )


# -- what is said of it


@frozen(kw_only=True)
class Result:
    """One whole run."""

    #: What a job is said to take.
    job_seconds: float
    cores: int
    python: str
    redis: str
    sizes: tuple[Size, ...]
    soak: Soak

    @property
    def misses(self) -> list[str]:
        """Targets that were missed, in words."""
        small, *larger = self.sizes
        found = []
        for size in larger:
            for name in ("round_trips", "redis_ms"):
                least, cost = getattr(small, name), getattr(size, name)
                if cost > least * FLAT:
                    found.append(f"{name} of a job: {cost:.2f} with {size.workers} workers, {least:.2f} with one")
            rate, alone = size.jobs_a_second_a_worker, small.jobs_a_second_a_worker
            if rate * FLAT < alone and not size.is_limited_by_cores:
                found.append(f"a worker does {rate:.2f} jobs/s among {size.workers} and {alone:.2f} alone")
        if not self.soak.is_met:
            found.append(f"the delivery guarantee did not hold: {self.soak}")
        return found


def tables(result: Mapping[str, Any]) -> dict[str, str]:
    """The page's tables, of a result as JSON."""
    sizes = [{**size, "own_share": _own_share(size, result["cores"])} for size in result["sizes"]]
    head = ["workers", *(str(size["workers"]) for size in sizes)]
    rows = (
        ("jobs/s", "jobs_a_second", "{:.1f}"),
        ("jobs/s a worker", "jobs_a_second_a_worker", "{:.2f}"),
        ("round trips a job", "round_trips", "{:.1f}"),
        ("Redis, ms a job", "redis_ms", "{:.2f}"),
        ("workers, ms a job", "worker_ms", "{:.1f}"),
        ("of the machine's cores: Redis and workers", "own_share", "{:.0%}"),
        ("of the machine's cores: anybody", "machine_share", "{:.0%}"),
        ("connections", "connections", "{}"),
        ("nothing to do: round trips/s a worker", "idle_round_trips", "{:.1f}"),
        ("nothing to do: Redis, of one core", "idle_redis_share", "{:.1%}"),
        ("one job, all others wait: round trips", "sparse_round_trips", "{:.0f}"),
        ("one job, all others wait: Redis, ms", "sparse_redis_ms", "{:.1f}"),
        ("one job, all others wait: push to start, ms", "sparse_start_ms", "{:.1f}"),
    )
    cells = [[text, *(shape.format(size[name]) for size in sizes)] for text, name, shape in rows]
    ended = result["soak"]
    counted = [
        ["workers, jobs", f"{ended['workers']}, {ended['jobs']:,}"],
        ["time, jobs/s", f"{ended['seconds']:.0f} s, {ended['jobs'] / ended['seconds']:.0f}"],
        ["processes killed, workers in them", f"{ended['kills']}, {ended['kills'] * WORKERS_IN_A_PROCESS}"],
        ["jobs that these had", f"{ended['interrupted']:,}"],
        ["jobs completed", f"{ended['completed']:,}"],
        ["jobs lost", f"{ended['lost']}"],
        ["jobs with two outcomes", f"{ended['two_outcomes']}"],
        ["runs beyond the first", f"{ended['repeated_runs']:,}"],
        ["of these without a kill", f"{ended['unexplained_runs']}"],
        ["callbacks that came twice, under one id", f"{ended['repeated_callbacks']}"],
        ["left in the books", f"{ended['left_in_the_books']}"],
    ]
    return {"sizes": _markdown(head, cells), "soak": _markdown(["what", "figure"], counted)}


def _own_share(size: Mapping[str, Any], cores: int) -> float:
    """What of the machine Redis and the workers used while there was always one more job."""
    busy_ms: float = size["jobs_a_second"] * (size["redis_ms"] + size["worker_ms"])
    return busy_ms / 1000 / cores


def _markdown(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def with_tables(page: str, result: Mapping[str, Any]) -> str:
    """``page`` with the tables of ``result`` between its marks."""
    for name, text in tables(result).items():
        before, _, rest = page.partition(BEGIN.format(name))
        _, _, after = rest.partition(END)
        page = f"{before}{BEGIN.format(name)}\n{text}\n{END}{after}"
    return page


def run(sizes: Sequence[int], jobs: int, *, job_seconds: float, window: float) -> Result:
    """The whole benchmark."""
    with Fleet.on_new_redis(job_seconds) as fleet:
        measured = []
        for workers in sizes:
            measured.append(measure(fleet, workers, window=window))
            print(f"{workers} workers: {measured[-1].jobs_a_second:.1f} jobs/s", file=sys.stderr)
        return Result(
            job_seconds=job_seconds,
            cores=psutil.cpu_count() or 1,
            python=platform.python_version(),
            redis=fleet.client.info("server")["redis_version"],
            sizes=tuple(measured),
            soak=soak(fleet, max(sizes), jobs),
        )


def main() -> int:
    """Measure, print, write the page, and end with 1 where a target is missed."""
    if sys.argv[1:2] == ["work"]:
        directory, address, names, seconds = sys.argv[2:]
        work(Path(directory), address, names.split(","), float(seconds))
        return 0
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="1 and 10 workers, 600 jobs, windows of 5 s")
    parser.add_argument("--workers", help="the sizes of the fleets, comma-separated")
    parser.add_argument("--jobs", type=int, help="how many jobs the largest does while it is killed")
    parser.add_argument("--json", action="store_true", help="print JSON")
    options = parser.parse_args()
    is_whole = not (options.quick or options.workers or options.jobs)
    sizes = [int(text) for text in (options.workers or ("1,10" if options.quick else "1,10,50,100")).split(",")]
    jobs = options.jobs or (600 if options.quick else 100_000)
    result = run(sizes, jobs, job_seconds=JOB_SECONDS, window=5.0 if options.quick else 20.0)
    said = attrs.asdict(result)
    if is_whole:
        RESULT.write_text(json.dumps(said, indent=2) + "\n", "utf-8")
        PAGE.write_text(with_tables(PAGE.read_text("utf-8"), said), "utf-8")
    if options.json:
        print(json.dumps(said, indent=2))
    else:
        print("\n\n".join(tables(said).values()))
    for miss in result.misses:
        print(f"MISSED {miss}", file=sys.stderr)
    return 1 if result.misses else 0


if __name__ == "__main__":
    sys.exit(main())
