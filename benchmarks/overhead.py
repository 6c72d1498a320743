"""What a job costs beside its work, on one Redis and beside other queues.

``python benchmarks/overhead.py [--quick] [--json] [--systems rq,celery,...]``. The other queues
are installed into environments of their own below ``--environments``, since no one environment
holds them all; with ``--systems ''`` only our own figures are taken, and nothing is installed.

The target is at most twice the bare BLMOVE + LREM loop, two round trips a job, 3 ms from the push
to the start of a job on an idle worker, and the same cost with a million messages waiting. It
stands for the queue layer, which is what the others are, too. The whole worker, which gives each
job a thread, a turn at the engine process, an upload with a check, a spool and a callback, is
measured beside it. Ends with 1 where a target is missed.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import attrs
import redis
from attrs import field, frozen

from ourvidz_core.cli.common import table
from ourvidz_core.delivery.embedded import _server_program
from ourvidz_core.delivery.redis_queue import RedisQueue
from ourvidz_core.testing.distributions import make_distribution

HERE = Path(__file__).parent
TARGET_RATIO, TARGET_ROUND_TRIPS, TARGET_IDLE_MS, TARGET_GROWTH = 2.0, 2.0, 3.0, 1.5
#: What each needs, in an environment of its own where two do not agree on the version of the client.
REQUIREMENTS = {
    "rq": ("rq", "redis"),
    "celery": ("celery[redis]",),
    "dramatiq": ("dramatiq[redis]",),
    "saq": ("saq[redis]",),
    "taskiq": ("taskiq", "taskiq-redis"),
    "arq": ("arq",),
}
WHOLE = "ourvidz worker"
PLUGIN = """
import json, os, time
from attrs import frozen
from PIL import Image
from ourvidz_core import Artifact, Generation, JobType, hookimpl

MARKS = os.open(os.environ["OVERHEAD_MARKS"], os.O_WRONLY | os.O_APPEND | os.O_CREAT)


@frozen(kw_only=True)
class Config:
    pushed_at: float = 0.0


@hookimpl
def register_job_types():
    yield JobType(name="noop", queue="bench", content_type="image", preset=Config())


@hookimpl
def generate(job, context):
    os.write(MARKS, f"{job.config.pushed_at} {time.time()}\\n".encode())
    path = context.output_path("png")
    Image.linear_gradient("L").resize((16, 16)).save(path)
    return Generation(artifacts=(Artifact(path=path, media_type="image/png"),))
"""


@frozen(kw_only=True)
class Cost:
    """What a job costs in one system."""

    system: str
    jobs_per_second: float
    slower: float = field(default=1.0)
    idle_p50_ms: float
    idle_p95_ms: float
    round_trips: float


@contextlib.contextmanager
def redis_server(directory: Path) -> Iterator[str]:
    """A server on a free port that keeps nothing on disk: what is compared is the clients."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    process = subprocess.Popen(
        [_server_program(), "--port", str(port), "--save", "", "--appendonly", "no", "--dir", str(directory)],
        stdout=subprocess.DEVNULL,
    )
    address = f"redis://127.0.0.1:{port}"
    client = redis.Redis.from_url(address)
    while True:
        with contextlib.suppress(redis.ConnectionError):
            client.ping()
            break
        time.sleep(0.02)
    try:
        yield address
    finally:
        process.kill()
        process.wait()


@frozen(kw_only=True)
class Bench:
    """Runs producers and workers of one system on one Redis."""

    directory: Path
    address: str
    environments: Path

    def python(self, system: str) -> str:
        """The interpreter that has the system; its environment is made where it is not there."""
        if system not in REQUIREMENTS:
            return sys.executable
        home = self.environments / system
        if not (home / "bin/python").exists():
            subprocess.run([sys.executable, "-m", "venv", home], check=True)
            needs = [*REQUIREMENTS[system], "hiredis"]
            subprocess.run([home / "bin/python", "-m", "pip", "install", "--quiet", *needs], check=True)
        return str(home / "bin/python")

    def environ(self, address: str) -> dict[str, str]:
        """The environment of every process."""
        kept = {k: v for k, v in os.environ.items() if not k.startswith(("OURVIDZ_", "SUPABASE_", "REDIS_"))}
        return {
            **kept,
            "PYTHONPATH": os.pathsep.join([str(HERE), str(HERE.parent), str(self.directory / "site")]),
            "OVERHEAD_REDIS": address,
            "OVERHEAD_MARKS": str(self.directory / "marks"),
            "REDIS_URL": address,
            "OURVIDZ_ALLOW_PLUGINS": "ourvidz-overhead",
            "OURVIDZ_STATE_DIR": str(self.directory / "state"),
            "OURVIDZ_WORK_DIR": str(self.directory / "work"),
            "OURVIDZ_CALLBACK_MIN_AGE_SECONDS": "0",
            "OURVIDZ_LOG_LEVEL": "error",
            "OURVIDZ_DEVICE": "cpu",
        }

    def push(self, system: str, count: int, pause: float = 0.0) -> None:
        """Push jobs."""
        if system == WHOLE:
            client = redis.Redis.from_url(self.address)
            for _ in range(count):
                message = {"id": f"job-{time.time_ns()}", "type": "noop", "prompt": "x" * 500, "user_id": "u"}
                client.lpush("bench", json.dumps({**message, "config": {"pushed_at": time.time()}}))
                time.sleep(pause)
            return
        command = [self.python(system), str(HERE / "overhead_systems.py"), system, "push", str(count), str(pause)]
        subprocess.run(command, env=self.environ(self.address), check=True)

    @contextlib.contextmanager
    def worker(self, system: str, address: str) -> Iterator[None]:
        """A worker while the block lasts."""
        command = [self.python(system), str(HERE / "overhead_systems.py"), system, "work"]
        if system == WHOLE:
            command = [sys.executable, "-m", "ourvidz_core", "worker", "--queues", "bench"]
        process = subprocess.Popen(
            command,
            env=self.environ(address),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
        try:
            yield
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, 9)
            process.wait()

    def marks(self) -> list[tuple[float, float]]:
        """When each job was pushed, and when it began."""
        with contextlib.suppress(FileNotFoundError):
            *lines, _ = (self.directory / "marks").read_text().split("\n")  # the last may be half written
            return [(float(line.split()[0]), float(line.split()[1])) for line in lines]
        return []

    def wait_for(self, count: int, seconds: float = 60.0) -> None:
        """Wait until so many jobs have begun."""
        deadline = time.monotonic() + seconds
        while len(self.marks()) < count:
            if time.monotonic() > deadline:
                raise TimeoutError(f"{len(self.marks())} of {count} jobs ran in {seconds:g} s")
            time.sleep(0.02)

    def fresh(self) -> None:
        """Forget everything."""
        redis.Redis.from_url(self.address).flushall()
        (self.directory / "marks").unlink(missing_ok=True)

    def measure(self, system: str, count: int, idle_count: int) -> Cost:
        """The figures of one system."""
        from benchmarks.chaos import CutProxy

        self.fresh()
        self.push(system, count)
        with self.worker(system, self.address):
            self.wait_for(count)
        begun = sorted(at for _, at in self.marks())
        # The first tenth warms it up.
        warm = begun[len(begun) // 10 :]
        rate = (len(warm) - 1) / (warm[-1] - warm[0])

        self.fresh()
        with self.worker(system, self.address):
            self.push(system, 1)
            self.wait_for(1)
            time.sleep(1.0)
            self.push(system, idle_count, 0.1)
            self.wait_for(1 + idle_count)
        waits = sorted((at - pushed_at) * 1000 for pushed_at, at in self.marks()[1:])

        self.fresh()
        counted = max(count // 10, 50)
        self.push(system, counted)
        proxy = CutProxy(self.address)
        with self.worker(system, proxy.address):
            self.wait_for(5)
            before, done = proxy.round_trips, len(self.marks())
            self.wait_for(counted - 5)
            trips = (proxy.round_trips - before) / (len(self.marks()) - done)
        proxy.close()
        return Cost(
            system=system,
            jobs_per_second=round(rate, 1),
            idle_p50_ms=round(statistics.median(waits), 2),
            idle_p95_ms=round(waits[int(len(waits) * 0.95)], 2),
            round_trips=round(trips, 2),
        )


def cost_at_depth(address: str, depth: int) -> tuple[float, float]:
    """Microseconds for a claim and a finish, and bytes of Redis for a message, with ``depth`` messages waiting."""
    client = redis.Redis.from_url(address)
    client.flushall()
    for start in range(0, depth, 10_000):
        client.lpush("bench", *[json.dumps({"id": f"job-{n}", "type": "noop"}) for n in range(start, start + 10_000)])
    used = client.info("memory")["used_memory"] / depth
    queue = RedisQueue(client)
    taken = []
    for _ in range(2000):
        started = time.perf_counter()
        claim = queue.claim(("bench",), worker="w", lease=60)
        assert claim is not None
        queue.finish(claim, is_final=True)
        taken.append(time.perf_counter() - started)
    client.flushall()
    return statistics.median(taken) * 1e6, used


def main() -> int:
    """Measure, print, and end with 1 where a target is missed."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="fewer jobs, and a tenth of the queued messages")
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.add_argument("--systems", default=",".join(REQUIREMENTS), help="the other queues, comma-separated")
    parser.add_argument("--environments", type=Path, default=Path(tempfile.gettempdir()) / "ourvidz-overhead")
    options = parser.parse_args()
    count, repeats = (500, 1) if options.quick else (3000, 3)
    others = [name for name in options.systems.split(",") if name]
    with tempfile.TemporaryDirectory() as name, redis_server(Path(name)) as address:
        bench = Bench(directory=Path(name), address=address, environments=options.environments)
        make_distribution(Path(name) / "site", "ourvidz-overhead", PLUGIN)
        pairs = [(bench.measure("floor", count, 30), bench.measure("ourvidz queue", count, 30)) for _ in range(repeats)]
        floor, ours = sorted(pairs, key=lambda pair: pair[0].jobs_per_second / pair[1].jobs_per_second)[repeats // 2]
        costs = [floor, ours, bench.measure(WHOLE, count // 10, 20)]
        for system in others:
            try:
                costs.append(bench.measure(system, 60 if system == "arq" else count // 5, 20))
            except (TimeoutError, subprocess.CalledProcessError) as error:
                print(f"{system} was not measured: {error}", file=sys.stderr)
        costs = [attrs.evolve(cost, slower=round(floor.jobs_per_second / cost.jobs_per_second, 2)) for cost in costs]
        shallow, deep = 10_000, 100_000 if options.quick else 1_000_000
        (few_us, few_bytes), (many_us, many_bytes) = cost_at_depth(address, shallow), cost_at_depth(address, deep)
    misses = []
    ours = costs[1]
    if ours.slower > TARGET_RATIO:
        misses.append(f"the queue takes {ours.slower} times as long as the bare loop; target {TARGET_RATIO}")
    if ours.round_trips > TARGET_ROUND_TRIPS + 0.1:
        misses.append(f"{ours.round_trips} round trips a job; target {TARGET_ROUND_TRIPS}")
    for cost in costs[1:3]:
        if cost.system == "ourvidz queue" and cost.idle_p50_ms > TARGET_IDLE_MS:
            misses.append(f"{cost.system}: {cost.idle_p50_ms} ms from push to start; target {TARGET_IDLE_MS}")
    if many_us > few_us * TARGET_GROWTH:
        misses.append(f"a job costs {many_us:.0f} us with {deep} waiting and {few_us:.0f} us with {shallow}")
    if options.json:
        at_depth = {shallow: [few_us, few_bytes], deep: [many_us, many_bytes]}
        print(json.dumps({"costs": [attrs.asdict(cost) for cost in costs], "at_depth": at_depth}, indent=2))
    else:
        head = ("system", "jobs/s", "x slower than the bare loop", "idle p50 ms", "idle p95 ms", "round trips a job")
        print(table(head, [attrs.astuple(cost) for cost in costs]))
        print(f"\nclaim and finish with {shallow} waiting: {few_us:.0f} us; {few_bytes:.0f} bytes of Redis a message")
        print(f"claim and finish with {deep} waiting: {many_us:.0f} us; {many_bytes:.0f} bytes of Redis a message")
    for miss in misses:
        print(f"MISSED {miss}", file=sys.stderr)
    return 1 if misses else 0


if __name__ == "__main__":
    sys.path.insert(0, str(HERE.parent))
    sys.exit(main())
