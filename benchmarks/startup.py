"""How fast the commands answer, and how much memory an idle worker takes, beside bare Python.

``python benchmarks/startup.py [--json]``. A figure of ours stands beside what the same
interpreter needs to start and do nothing, and beside the same command with torch imported,
which is what a worker that keeps its models in its own process pays.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import psutil

REPEATS = 7
TARGET_SECONDS = 0.4
TARGET_MB = 100.0


def seconds_of(*command: str) -> float:
    """The median wall time of ``command``, after one run that fills the caches."""
    taken = []
    for _ in range(REPEATS + 1):
        started = time.perf_counter()
        subprocess.run(command, check=True, capture_output=True)
        taken.append(time.perf_counter() - started)
    return statistics.median(taken[1:])


def idle_worker_mb() -> float:
    """Resident memory of a worker that waits for jobs, in MB of 10**6 bytes."""
    with tempfile.TemporaryDirectory() as directory:
        environ = {
            **os.environ,
            "OURVIDZ_STATE_DIR": directory,
            "OURVIDZ_WORK_DIR": str(Path(directory) / "work"),
            "REDIS_URL": "",
        }
        worker = subprocess.Popen([sys.executable, "-m", "ourvidz_core", "worker"], env=environ, stderr=subprocess.PIPE)
        try:
            assert worker.stderr is not None
            while b"takes jobs" not in (line := worker.stderr.readline()):
                assert line, "the worker ended before it took jobs"
            time.sleep(3.0)
            return psutil.Process(worker.pid).memory_info().rss / 1e6
        finally:
            worker.terminate()
            worker.wait()


def main() -> int:
    """Measure, print, and end with 1 where a target is missed."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    bare = seconds_of(sys.executable, "-c", "pass")
    figures = {
        "bare python": bare,
        "ourvidz job-types": seconds_of(sys.executable, "-m", "ourvidz_core", "job-types"),
        "ourvidz plugins list": seconds_of(sys.executable, "-m", "ourvidz_core", "plugins", "list"),
        "import torch": seconds_of(sys.executable, "-c", "import torch"),
    }
    memory = idle_worker_mb()
    is_met = memory < TARGET_MB and all(
        taken < TARGET_SECONDS for name, taken in figures.items() if name.startswith("ourvidz")
    )
    if arguments.json:
        print(json.dumps({"seconds": figures, "idle_worker_mb": memory, "is_met": is_met}))
    else:
        for name, taken in figures.items():
            print(f"{name:22} {taken:6.3f} s   {taken / bare:5.1f} x bare python")
        print(f"{'idle worker':22} {memory:6.1f} MB")
        print(f"targets (under {TARGET_SECONDS} s, under {TARGET_MB:.0f} MB): {'met' if is_met else 'MISSED'}")
    return 0 if is_met else 1


if __name__ == "__main__":
    sys.exit(main())
