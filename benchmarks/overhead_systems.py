"""One producer and one worker of each queue, for ``overhead.py``, which runs this file in an environment that has it.

``python overhead_systems.py SYSTEM work`` works until it is killed; ``... push COUNT`` pushes jobs.
Each job notes when it was pushed and when it began, and does nothing else. Every worker does one
job at a time, as one that owns a GPU does, except for arq, which then does two a second.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable
from typing import Any

URL = os.environ["OVERHEAD_REDIS"]
MARKS = os.open(os.environ["OVERHEAD_MARKS"], os.O_WRONLY | os.O_APPEND | os.O_CREAT)
#: About as much as a producer's message holds.
PAD = "x" * 600


def note(pushed_at: float) -> None:
    """What every job does."""
    os.write(MARKS, f"{pushed_at} {time.time()}\n".encode())


def noop(pushed_at: float, pad: str) -> None:  # noqa: ARG001 - it is carried, not read
    """The job of queues that import it by name."""
    note(pushed_at)


class System:
    """A queue: how to push to it, and how to work on it."""

    def push(self) -> None:
        """Push one job."""
        raise NotImplementedError

    def work(self) -> None:
        """Work until killed."""
        raise NotImplementedError


class Floor(System):
    """The least that does not lose a job at once: BLMOVE to a list of one's own, work, LREM."""

    def __init__(self) -> None:
        import redis

        self._client = redis.Redis.from_url(URL)

    def push(self) -> None:
        message = {"id": f"{time.time_ns()}", "type": "noop", "pushed_at": time.time(), "pad": PAD}
        self._client.lpush("bench", json.dumps(message))

    def work(self) -> None:
        while True:
            raw: Any = self._client.blmove("bench", "bench:mine", 5, "RIGHT", "LEFT")
            if raw is not None:
                note(json.loads(raw)["pushed_at"])
                self._client.lrem("bench:mine", 1, raw)


class OurQueue(Floor):
    """Claim, work, finish: what this framework's worker asks of Redis for a job without a callback."""

    def work(self) -> None:
        from ourvidz_core.delivery.redis_queue import RedisQueue

        queue = RedisQueue.connect(URL)
        while True:
            claim = queue.claim(("bench",), worker="w", lease=60)
            if claim is None:
                queue.wait(("bench",), 2.0)
                continue
            note(json.loads(claim.raw)["pushed_at"])
            queue.finish(claim, is_final=True)


class Rq(System):
    """RQ without a fork for each job."""

    def __init__(self) -> None:
        import redis
        import rq

        self._queue = rq.Queue("bench", connection=redis.Redis.from_url(URL))

    def push(self) -> None:
        import overhead_systems

        self._queue.enqueue(overhead_systems.noop, time.time(), PAD, result_ttl=0)

    def work(self) -> None:
        import rq

        rq.SimpleWorker([self._queue], connection=self._queue.connection).work(logging_level="ERROR")


class CelerySolo(System):
    """Celery in one process, acknowledging late."""

    def __init__(self) -> None:
        from celery import Celery

        self._app = Celery("bench", broker=URL)
        self._app.conf.update(
            task_acks_late=True, worker_prefetch_multiplier=1, task_ignore_result=True, worker_hijack_root_logger=False
        )
        self._task = self._app.task(name="noop")(noop)

    def push(self) -> None:
        self._task.delay(time.time(), PAD)

    def work(self) -> None:
        quiet = ["--without-gossip", "--without-mingle", "--without-heartbeat", "--loglevel", "ERROR"]
        self._app.worker_main(["worker", "--pool", "solo", *quiet])


class Dramatiq(System):
    """Dramatiq with one thread."""

    def __init__(self) -> None:
        import dramatiq
        from dramatiq.brokers.redis import RedisBroker

        self._broker = RedisBroker(url=URL)
        dramatiq.set_broker(self._broker)
        self._actor = dramatiq.actor(noop, broker=self._broker)

    def push(self) -> None:
        self._actor.send(time.time(), PAD)

    def work(self) -> None:
        import dramatiq

        dramatiq.Worker(self._broker, worker_threads=1).start()
        while True:
            time.sleep(60)


class Saq(System):
    """SAQ with a concurrency of one."""

    def push(self) -> None:
        import asyncio

        if not hasattr(self, "_queue"):
            from saq import Queue

            self._loop = asyncio.new_event_loop()
            self._queue = Queue.from_url(URL)
            self._loop.run_until_complete(self._queue.connect())
        self._loop.run_until_complete(self._queue.enqueue("saq_noop", pushed_at=time.time(), pad=PAD))

    def work(self) -> None:
        import asyncio

        from saq import Queue, Worker

        async def saq_noop(context: Any, *, pushed_at: float, pad: str) -> None:  # noqa: ARG001
            note(pushed_at)

        async def run() -> None:
            await Worker(Queue.from_url(URL), functions=[("saq_noop", saq_noop)], concurrency=1).start()

        asyncio.run(run())


class Arq(System):
    """arq with its default of ten jobs at once."""

    def push(self) -> None:
        import asyncio

        from arq import create_pool
        from arq.connections import RedisSettings

        if not hasattr(self, "_pool"):
            self._loop = asyncio.new_event_loop()
            asyncio.set_event_loop(self._loop)
            self._pool = self._loop.run_until_complete(create_pool(RedisSettings.from_dsn(URL)))
        self._loop.run_until_complete(self._pool.enqueue_job("arq_noop", time.time(), PAD))

    def work(self) -> None:
        import asyncio

        from arq.connections import RedisSettings
        from arq.worker import Worker, func

        async def arq_noop(context: Any, pushed_at: float, pad: str) -> None:  # noqa: ARG001
            note(pushed_at)

        asyncio.set_event_loop(asyncio.new_event_loop())
        Worker([func(arq_noop, name="arq_noop")], redis_settings=RedisSettings.from_dsn(URL)).run()


class Taskiq(System):
    """Taskiq on a Redis stream, with one task at a time."""

    def __init__(self) -> None:
        from taskiq_redis import RedisStreamBroker

        self.broker = RedisStreamBroker(URL)

        async def taskiq_noop(pushed_at: float, pad: str) -> None:  # noqa: ARG001
            note(pushed_at)

        self._task = self.broker.register_task(taskiq_noop, task_name="taskiq_noop")

    def push(self) -> None:
        import asyncio

        if not hasattr(self, "_loop"):
            self._loop = asyncio.new_event_loop()
            self._loop.run_until_complete(self.broker.startup())
        self._loop.run_until_complete(self._task.kiq(time.time(), PAD))

    def work(self) -> None:
        command = ["worker", "overhead_systems:taskiq_broker", "--workers", "1", "--max-async-tasks", "1"]
        os.execv(sys.executable, [sys.executable, "-m", "taskiq", *command, "--log-level", "ERROR"])


SYSTEMS: dict[str, Callable[[], System]] = {
    "floor": Floor,
    "ourvidz queue": OurQueue,
    "rq": Rq,
    "celery": CelerySolo,
    "dramatiq": Dramatiq,
    "saq": Saq,
    "taskiq": Taskiq,
    "arq": Arq,
}


def __getattr__(name: str) -> Any:
    """The broker that the command of taskiq asks for."""
    if name == "taskiq_broker":
        return Taskiq().broker
    raise AttributeError(name)


def main() -> None:
    """Push or work."""
    system = SYSTEMS[sys.argv[1]]()
    if sys.argv[2] == "work":
        system.work()
        return
    count, pause = int(sys.argv[3]), float(sys.argv[4]) if len(sys.argv) > 4 else 0.0
    for _ in range(count):
        system.push()
        time.sleep(pause)


if __name__ == "__main__":
    main()
