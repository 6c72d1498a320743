"""Run OurVidz workers on a Ray cluster: one actor a GPU, each the keeper of one ``ourvidz up``.

    python ourvidz_ray.py --workers 8 -- --queues wan_queue

Ray decides on which machine a worker runs, starts machines where its autoscaler may, and starts an actor again when
its node is gone. It carries no job: those go through Redis as ever, so a worker that Ray loses leaves its job to the
others. Settings and keys come from each node's own environment, or from a file that every node has; what is passed to
an actor would be in Ray's own books, and keys do not belong there.
"""

from __future__ import annotations

import argparse
import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Sequence
from pathlib import Path

import ray
from ray.actor import ActorHandle

#: A worker that is told to stop has its OURVIDZ_DRAIN_SECONDS, and its keeper a little more.
MARGIN_SECONDS = 30.0


class WorkerKeeper:
    """An actor that holds one GPU, and runs a worker on it in a process of its own.

    Not in the actor's process: a worker drains by SIGTERM, which Ray has uses of its own for, and a process can be
    started again, as ``ourvidz up`` does, without Ray.
    """

    def __init__(self, name: str, arguments: Sequence[str]) -> None:
        # Several share a machine: each has its own name and spool, and any free port.
        state = Path(os.environ.get("OURVIDZ_STATE_DIR", "~/.local/state/ourvidz")).expanduser() / name
        environ = {
            "OURVIDZ_HEALTH_ADDRESS": "127.0.0.1:0",
            **os.environ,
            "OURVIDZ_STATE_DIR": str(state),
            "OURVIDZ_WORKER_NAME": f"{socket.gethostname()}-{name}",
        }
        self._process = subprocess.Popen(
            # However this actor ends, what it started ends: the kernel kills `up`, and its workers see that.
            ["setpriv", "--pdeathsig", "KILL", sys.executable, "-m", "ourvidz_core", "up", *arguments],
            env=environ,
        )

    def node(self) -> str:
        """The id of the node that it runs on."""
        return str(ray.get_runtime_context().get_node_id())

    def drain(self, seconds: float) -> int:
        """Let the worker finish what it has, for up to ``seconds``; answers the exit status of ``ourvidz up``."""
        self._process.terminate()
        try:
            return self._process.wait(seconds)
        except subprocess.TimeoutExpired:
            self._process.kill()
            return self._process.wait()


def start(count: int, arguments: Sequence[str] = (), **resources: float) -> list[ActorHandle]:
    """Ask Ray for ``count`` workers, each with ``resources``; one GPU unless said otherwise.

    Where the cluster has less, the rest waits until there are more nodes. A worker whose node
    dies is started elsewhere as soon as there is room.
    """
    keeper = ray.remote(WorkerKeeper).options(
        max_restarts=-1, scheduling_strategy="SPREAD", **(resources or {"num_gpus": 1})
    )
    return [keeper.remote(f"ray-{number}", list(arguments)) for number in range(count)]


def stop(workers: Sequence[ActorHandle], drain_seconds: float) -> list[int | None]:
    """Drain all at once, then let their GPUs go; answers their exit statuses, None for one that did not answer."""
    endings = [worker.drain.remote(drain_seconds + MARGIN_SECONDS) for worker in workers]
    answered, _ = ray.wait(endings, num_returns=len(endings), timeout=drain_seconds + 2 * MARGIN_SECONDS)
    statuses: list[int | None] = []
    for worker, ending in zip(workers, endings, strict=True):
        try:
            statuses.append(ray.get(ending) if ending in answered else None)
        except ray.exceptions.RayActorError:
            statuses.append(None)
        ray.kill(worker)
    return statuses


def main() -> int:
    """Start workers, and drain them on SIGTERM or Ctrl-C."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument(
        "--address", default="auto", help="the cluster; the one that this machine is part of unless said"
    )
    parser.add_argument("--workers", type=int, help="how many; the cluster's GPUs of this moment unless said")
    parser.add_argument("--drain-seconds", type=float, default=30.0, help="OURVIDZ_DRAIN_SECONDS of the nodes")
    parser.add_argument("arguments", nargs="*", help="what ourvidz up is given on each, after --")
    options = parser.parse_args()
    ray.init(address=options.address)
    stopped = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: stopped.set())
    count = options.workers or int(ray.cluster_resources().get("GPU", 0))
    if not count:
        print("the cluster has no GPU; say with --workers how many to wait for", file=sys.stderr)
        return 2
    workers = start(count, options.arguments)
    stopped.wait()
    # One that was only just started is ended by the signal itself; it had nothing to drain.
    return 0 if all(status in (0, -signal.SIGTERM) for status in stop(workers, options.drain_seconds)) else 1


if __name__ == "__main__":
    sys.exit(main())
