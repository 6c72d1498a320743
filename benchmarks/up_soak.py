"""``ourvidz up`` under a mixed load while its workers and engines are killed: is all done, and does it stay flat?

``python -m benchmarks.up_soak [--minutes 10] [--rate 4] [--json]``. It brings its own Redis,
storage and callback endpoint, and a plugin with two queues whose jobs cost next to nothing.
Three workers serve both queues; two of them and their engines are killed at random instants.
In the first third of the time all three are replaced by SIGHUP now and then; after that the
third is left alone, so that its memory can be watched. The number of tries of a job is raised from 3 to
50, so that a job which luck kills three times is delivered rather than reported as poison.
Ends with 1 where a row of the table is missed.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import os
import random
import signal
import statistics
import subprocess
import sys
import tempfile
import time
import uuid
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Self

import psutil
import redis
from attrs import define, field, frozen

from ourvidz_core.cli.common import table
from ourvidz_core.delivery.embedded import EmbeddedRedis
from ourvidz_core.delivery.redis_queue import RedisQueue
from ourvidz_core.orchestrator.report import OrchestratorReport, read_report
from ourvidz_core.testing.distributions import make_distribution
from ourvidz_core.testing.servers import Bucket, SupabaseServer

QUEUES = {"soak_images": "soak_image", "soak_videos": "soak_clip"}
MARK = "OURVIDZ_SOAK"
LEFT_ALONE = "worker-3"
#: Seconds between two kills, and between two rolling restarts, on average.
KILL_SECONDS = 4.0
ROLL_SECONDS = 40.0
SAMPLE_SECONDS = 2.0
#: A process that has warmed up may grow by so much.
FLAT_MB = 15.0
FLAT_SHARE = 0.1

PLUGIN = """
import time
from attrs import frozen
from PIL import Image
from ourvidz_core import Artifact, Generation, JobType, hookimpl


@frozen(kw_only=True)
class Config:
    seconds: float = 0.0
    side: int = 16


@hookimpl
def register_job_types():
    yield JobType(name="soak_image", queue="soak_images", content_type="image", preset=Config(), timeout_seconds=30)
    yield JobType(name="soak_clip", queue="soak_videos", content_type="image", preset=Config(), timeout_seconds=30)


@hookimpl
def generate(job, context):
    ends = time.monotonic() + job.config.seconds
    while (left := ends - time.monotonic()) > 0:
        time.sleep(min(left, 0.05))
        context.progress(0, 1)
    path = context.output_path("png")
    Image.effect_noise((job.config.side, job.config.side), 80).save(path)
    return Generation(artifacts=(Artifact(path=path, media_type="image/png", seed=job.seed),))
"""


@frozen(kw_only=True)
class Row:
    """One line of the table."""

    name: str
    value: str
    target: str
    is_met: bool


@define
class Samples:
    """Resident memory of one process over time, in MB."""

    pid: int
    values: list[float] = field(factory=list)

    @property
    def early(self) -> float:
        """The typical size in the first third, once everything is loaded."""
        return statistics.median(self.values[: max(len(self.values) // 3, 1)])

    @property
    def late(self) -> float:
        """The typical size in the last third."""
        return statistics.median(self.values[-max(len(self.values) // 3, 1) :])

    @property
    def is_flat(self) -> bool:
        """Whether it does not grow."""
        return self.late <= self.early + max(FLAT_MB, FLAT_SHARE * self.early)


@define
class Soak:
    """An orchestrator, what it is fed, and what is done to it."""

    directory: Path
    queue: RedisQueue
    client: redis.Redis
    supabase: SupabaseServer
    environ: dict[str, str]
    process: subprocess.Popen[bytes]
    random: random.Random = field(factory=lambda: random.Random(9))
    pushed: set[str] = field(factory=set)
    kills: Counter[str] = field(factory=Counter)
    memory: dict[str, Samples] = field(factory=dict)
    most_processes: int = 0

    @classmethod
    @contextlib.contextmanager
    def opened(cls) -> Iterator[Self]:
        """A fresh one; nothing of it is left after the block."""
        with (
            tempfile.TemporaryDirectory(prefix="ourvidz-soak-") as name,
            SupabaseServer(buckets={job_type: Bucket() for job_type in QUEUES.values()}) as supabase,
        ):
            directory = Path(name)
            make_distribution(directory / "site", "ourvidz-soak", PLUGIN)
            server = EmbeddedRedis(directory / "redis")
            client = redis.Redis.from_url(server.address)
            kept = {k: v for k, v in os.environ.items() if not k.startswith(("OURVIDZ_", "SUPABASE_", "REDIS_"))}
            environ = {
                **kept,
                MARK: uuid.uuid4().hex,
                "PYTHONPATH": os.pathsep.join([str(directory / "site"), os.getcwd()]),
                "REDIS_URL": server.address,
                "SUPABASE_URL": supabase.url,
                "SUPABASE_SERVICE_KEY": supabase.key,
                "OURVIDZ_ALLOW_PLUGINS": "ourvidz-soak",
                "OURVIDZ_STATE_DIR": str(directory / "state"),
                "OURVIDZ_WORK_DIR": str(directory / "work"),
                "OURVIDZ_DEVICE": "cpu",
                "OURVIDZ_LEASE_SECONDS": "3",
                "OURVIDZ_MAX_ATTEMPTS": "50",
                "OURVIDZ_RETRY_DELAY_SECONDS": "0.1",
                "OURVIDZ_CALLBACK_RETRY_SECONDS": "0.2",
                "OURVIDZ_CALLBACK_MIN_AGE_SECONDS": "0",
                "OURVIDZ_RESTART_FIRST_SECONDS": "0.2",
                "OURVIDZ_RESTART_LONGEST_SECONDS": "5",
                "OURVIDZ_RESTART_RESET_SECONDS": "2",
            }
            with (directory / "up.log").open("wb") as log:
                process = subprocess.Popen(
                    [sys.executable, "-m", "ourvidz_core", "up", "--workers=3"], env=environ, stderr=log
                )
            soak = cls(directory, RedisQueue(client), client, supabase, environ, process)
            try:
                yield soak
            finally:
                for left in soak.processes():
                    with contextlib.suppress(psutil.NoSuchProcess):
                        left.kill()
                process.wait()
                client.close()
                server.close()

    @property
    def report(self) -> OrchestratorReport | None:
        """What the orchestrator says of itself."""
        report, is_alive = read_report(self.directory / "state" / "up")
        return report if is_alive else None

    def processes(self) -> list[psutil.Process]:
        """Everything that this soak started and that is still there."""
        found = []
        for process in psutil.process_iter():
            with contextlib.suppress(psutil.Error, OSError):
                is_ours = process.environ().get(MARK) == self.environ[MARK]
                if is_ours and process.status() != psutil.STATUS_ZOMBIE:
                    found.append(process)
        return found

    def push(self) -> None:
        """One job of either kind, short or less short."""
        queue, job_type = self.random.choice(list(QUEUES.items()))
        job_id = f"soak-{len(self.pushed)}"
        seconds = self.random.choice([0.0, 0.05, 0.2, 0.6])
        message = {
            "id": job_id,
            "type": job_type,
            "prompt": "",
            "user_id": "u1",
            "config": {"seconds": seconds, "side": self.random.choice([16, 256])},
        }
        self.client.lpush(queue, json.dumps(message))
        self.pushed.add(job_id)

    def kill_somebody(self) -> None:
        """SIGKILL to a worker that may be killed, or to its engine."""
        report = self.report
        if report is None:
            return
        workers = [worker for worker in report.workers if worker.name != LEFT_ALONE and worker.pid is not None]
        if not workers:
            return
        with contextlib.suppress(psutil.NoSuchProcess):
            victim = psutil.Process(self.random.choice(workers).pid)
            engines = [child for child in victim.children() if "ourvidz_core.engine.server" in child.cmdline()]
            if engines and self.random.random() < 0.5:
                engines[0].kill()
                self.kills["engines"] += 1
            else:
                victim.kill()
                self.kills["workers"] += 1

    def roll(self) -> None:
        """Replace all workers, one by one."""
        self.process.send_signal(signal.SIGHUP)
        self.kills["rolling restarts"] += 1

    def sample(self) -> None:
        """Note how large the orchestrator, the worker left alone and its engine are."""
        processes = self.processes()
        self.most_processes = max(self.most_processes, len(processes))
        report = self.report
        alone = next((w.pid for w in (report.workers if report else ()) if w.name == LEFT_ALONE), None)
        roles = {"up": self.process.pid, "worker": alone}
        with contextlib.suppress(psutil.NoSuchProcess):
            if alone is not None:
                engines = [c for c in psutil.Process(alone).children() if "engine.server" in " ".join(c.cmdline())]
                roles["engine"] = engines[0].pid if engines else None
        for role, pid in roles.items():
            with contextlib.suppress(psutil.NoSuchProcess):
                if pid is not None:
                    size = psutil.Process(pid).memory_info().rss / 1e6
                    if role not in self.memory or self.memory[role].pid != pid:
                        self.memory[role] = Samples(pid)  # a successor is measured by itself
                    self.memory[role].values.append(size)

    def outcomes(self) -> dict[str, list[str]]:
        """Of each job, the terminal statuses that arrived, each callback id once."""
        seen: dict[str, dict[str, str]] = {}
        for request in list(self.supabase.callbacks):
            body = request.json()
            if body["status"] != "processing":
                seen.setdefault(body["job_id"], {})[request.headers["webhook-id"]] = body["status"]
        return {job_id: list(statuses.values()) for job_id, statuses in seen.items()}

    def wait(self, condition: Callable[[], object], seconds: float) -> bool:
        """Whether ``condition`` comes true in time."""
        deadline = time.monotonic() + seconds
        while not condition():
            if time.monotonic() >= deadline:
                return False
            time.sleep(0.1)
        return True


def run(minutes: float, rate: float) -> list[Row]:
    """Feed, kill and watch for ``minutes``; then let everything end."""
    with Soak.opened() as soak:
        started = soak.wait(
            lambda: (report := soak.report) and all(worker.state == "ready" for worker in report.workers), 60
        )
        if not started:
            return [Row(name="start", value="not ready within 60 s", target="ready", is_met=False)]
        _disturb(soak, minutes * 60, rate)
        is_done = soak.wait(lambda: len(soak.outcomes()) >= len(soak.pushed), 120)
        restarts = sum(worker.restarts for worker in soak.report.workers) if soak.report else 0
        soak.process.send_signal(signal.SIGTERM)
        code: int | None = None
        with contextlib.suppress(subprocess.TimeoutExpired):
            code = soak.process.wait(60)
        left = soak.processes()
        return _rows(soak, is_done=is_done, restarts=restarts, code=code, left=left)


def _disturb(soak: Soak, seconds: float, rate: float) -> None:
    begun = time.monotonic()
    due = {"push": begun, "kill": begun + KILL_SECONDS, "roll": begun + ROLL_SECONDS / 4, "sample": begun + 5}
    gaps = {"push": 1 / rate, "kill": KILL_SECONDS, "roll": ROLL_SECONDS, "sample": SAMPLE_SECONDS}
    do = {"push": soak.push, "kill": soak.kill_somebody, "roll": soak.roll, "sample": soak.sample}
    while (now := time.monotonic()) < begun + seconds:
        what = min(due, key=lambda name: due[name])
        time.sleep(max(due[what] - now, 0.0))
        do[what]()
        if what == "roll" and now + ROLL_SECONDS >= begun + seconds / 3:
            due[what] = math.inf
        spread = soak.random.uniform(0.5, 1.5) if what in ("push", "kill") else 1.0
        due[what] = max(due[what] + gaps[what] * spread, time.monotonic() - 1.0)


def _rows(soak: Soak, *, is_done: bool, restarts: int, code: int | None, left: list[psutil.Process]) -> list[Row]:
    outcomes = soak.outcomes()
    statuses = Counter(status for ended in outcomes.values() for status in ended)
    lost = soak.pushed - outcomes.keys()
    doubled = [job_id for job_id, ended in outcomes.items() if len(ended) > 1]
    depths = [soak.queue.depth(queue) for queue in QUEUES]
    open_jobs = sum(depth.waiting + depth.in_flight + depth.retrying + depth.callbacks for depth in depths)
    kills = soak.kills["workers"] + soak.kills["engines"]
    rows = [
        Row(name="jobs completed", value=f"{statuses['completed']} of {len(soak.pushed)}", target="all",
            is_met=is_done and statuses["completed"] == len(soak.pushed)),
        Row(name="jobs lost", value=str(len(lost)), target="0", is_met=not lost),
        Row(name="jobs with two outcomes", value=str(len(doubled)), target="0", is_met=not doubled),
        Row(name="left in the books", value=str(open_jobs), target="0", is_met=open_jobs == 0),
        Row(name="kills", value=f"{soak.kills['workers']} workers, {soak.kills['engines']} engines", target="some",
            is_met=kills > 0),
        Row(name="rolling restarts", value=str(soak.kills["rolling restarts"]), target="any", is_met=True),
        Row(name="restarts seen", value=str(restarts), target=f"at least {soak.kills['workers']}",
            is_met=restarts >= soak.kills["workers"]),
        Row(name="exit code after SIGTERM", value=str(code), target="0", is_met=code == 0),
        Row(name="processes left", value=str(len(left)), target="0", is_met=not left),
        # Three workers with an engine each, the orchestrator, a successor in each place, and what decodes or probes.
        Row(name="most processes at once", value=str(soak.most_processes), target="at most 14",
            is_met=soak.most_processes <= 14),
    ]  # fmt: skip
    for role, samples in soak.memory.items():
        rows.append(
            Row(
                name=f"memory of {role}, first and last third",
                value=f"{samples.early:.1f} and {samples.late:.1f} MB in {len(samples.values) * SAMPLE_SECONDS:.0f} s",
                target=f"at most {max(FLAT_MB, FLAT_SHARE * samples.early):.0f} MB more",
                is_met=samples.is_flat,
            )
        )
    return rows


def main() -> int:
    """Soak, print, and end with 1 where a target is missed."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--minutes", type=float, default=10.0, help="how long the load and the kills last")
    parser.add_argument("--rate", type=float, default=4.0, help="jobs a second")
    parser.add_argument("--json", action="store_true", help="print JSON")
    options = parser.parse_args()
    rows = run(options.minutes, options.rate)
    if options.json:
        print(json.dumps([{"name": r.name, "value": r.value, "target": r.target, "is_met": r.is_met} for r in rows]))
    else:
        cells = [(row.name, row.value, row.target, "met" if row.is_met else "MISSED") for row in rows]
        print(table(("what", "figure", "target", "verdict"), cells))
    return 0 if all(row.is_met for row in rows) else 1


if __name__ == "__main__":
    sys.exit(main())
