"""How busy the device is while many short jobs go through Redis, the worker, its engine and storage.

``python benchmarks/overlap.py [--jobs 30] [--json]``. No device is needed: a generation sleeps, and so does the
writing of its files; references, storage and callbacks are real and slow. The same jobs go through twice: with
files that are written before ``generate`` returns, and with files that ``Generation.finish`` writes. The share is
the time in which a job has the device, from the first job's beginning to the last one's end. Ends with 1 where it
misses the target.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import os
import statistics
import subprocess
import sys
import tempfile
from itertools import pairwise
from pathlib import Path

from attrs import asdict, evolve, frozen
from PIL import Image

from ourvidz_core.cli.common import table
from ourvidz_core.delivery.embedded import EmbeddedRedis
from ourvidz_core.delivery.redis_queue import RedisQueue
from ourvidz_core.testing.distributions import make_distribution
from ourvidz_core.testing.servers import Answer, FileServer, ReceivedRequest, SupabaseServer

TARGET_SHARE = 0.95
#: A batch of one, three and six images, as a fast GPU draws and a CPU writes them (seconds).
DEVICE_SECONDS = (0.4, 0.8, 1.2)
FINISH_SECONDS = 0.3
#: What storage takes for each request, and the server of references for an image.
STORAGE_SECONDS = 0.25
REFERENCE_SECONDS = 0.5
QUEUE = "sdxl_queue"
PLUGIN = """
import os, time
from attrs import frozen
from PIL import Image
from ourvidz_core import Artifact, Generation, JobType, hookimpl

MARKS = os.open(os.environ["OVERLAP_MARKS"], os.O_WRONLY | os.O_APPEND | os.O_CREAT)
STEPS = 25


@frozen(kw_only=True)
class Config:
    device_seconds: float = 0.0
    finish_seconds: float = 0.0
    is_finished_beside: bool = True


@hookimpl
def register_job_types():
    where = {"queue": "sdxl_queue", "bucket": "sdxl_image_fast", "max_asset_mb": 5}
    yield JobType(name="acme_image", content_type="image", preset=Config(), **where)


@hookimpl
def generate(job, context):
    config, begun_at = job.config, time.monotonic()
    for step in range(STEPS):
        context.progress(step, STEPS)
        time.sleep(max(begun_at + config.device_seconds * (step + 1) / STEPS - time.monotonic(), 0))
    os.write(MARKS, f"{begun_at} {time.monotonic()}\\n".encode())

    def finish():
        time.sleep(config.finish_seconds)
        path = context.output_path("png")
        Image.linear_gradient("L").save(path)
        return (Artifact(path=path, media_type="image/png"),)

    return Generation(finish=finish) if config.is_finished_beside else Generation(artifacts=finish())
"""


@frozen(kw_only=True)
class Share:
    """What one way of writing files leaves of the device."""

    way: str
    jobs: int
    wall_seconds: float
    device_seconds: float
    busy_share: float
    median_gap_ms: float
    longest_gap_ms: float


class SlowSupabase(SupabaseServer):
    """Takes its time for each request."""

    def answer(self, request: ReceivedRequest) -> Answer:
        """As ever, later."""
        return evolve(super().answer(request), delay_seconds=STORAGE_SECONDS)


def measure(way: str, jobs: int, *, is_finished_beside: bool) -> Share:
    """Send ``jobs`` jobs through a worker and look when they had the device."""
    reference = Answer(body=_picture(), headers={"Content-Type": "image/png"}, delay_seconds=REFERENCE_SECONDS)
    with (
        tempfile.TemporaryDirectory() as name,
        SlowSupabase() as supabase,
        FileServer({"/reference.png": reference}) as files,
        contextlib.closing(EmbeddedRedis(Path(name) / "redis")) as server,
    ):
        directory = Path(name)
        make_distribution(directory / "site", "ourvidz-overlap", PLUGIN)
        queue = RedisQueue.connect(server.address)
        for index in range(jobs):
            # Every fourth job brings a reference.
            image = f"{files.url}/reference.png" if index % 4 == 0 else None
            config = {
                "device_seconds": DEVICE_SECONDS[index % len(DEVICE_SECONDS)],
                "finish_seconds": FINISH_SECONDS,
                "is_finished_beside": is_finished_beside,
                "image": image,
            }
            message = {"id": f"job-{index}", "type": "acme_image", "prompt": "", "user_id": "u", "config": config}
            queue.push(QUEUE, json.dumps(message).encode())
        kept = {key: value for key, value in os.environ.items() if not key.startswith(("OURVIDZ_", "SUPABASE_"))}
        environ = {
            **kept,
            "PYTHONPATH": os.pathsep.join([str(directory / "site"), os.environ.get("PYTHONPATH", "")]).rstrip(":"),
            "OVERLAP_MARKS": str(directory / "marks"),
            "REDIS_URL": server.address,
            "SUPABASE_URL": supabase.url,
            "SUPABASE_SERVICE_KEY": supabase.key,
            "OURVIDZ_ALLOW_PLUGINS": "ourvidz-overlap",
            "OURVIDZ_STATE_DIR": str(directory / "state"),
            "OURVIDZ_WORK_DIR": str(directory / "work"),
            "OURVIDZ_CALLBACK_MIN_AGE_SECONDS": "0",
            "OURVIDZ_REFERENCE_ALLOWED_HOSTS": "127.0.0.1",
            "OURVIDZ_DEVICE": "cpu",
            "OURVIDZ_LOG_LEVEL": "warning",
        }
        command = [sys.executable, "-m", "ourvidz_core", "worker", "--queues", QUEUE, "--drain"]
        subprocess.run(command, env=environ, check=True, stdout=subprocess.DEVNULL)
        queue.close()
        spans = sorted((float(begun), float(end)) for begun, end in map(str.split, _lines(directory / "marks")))
        statuses = [json.loads(callback.body)["status"] for callback in supabase.callbacks]
    if statuses.count("completed") != jobs:
        raise SystemExit(f"{statuses.count('completed')} of {jobs} jobs were completed")
    wall, busy = spans[-1][1] - spans[0][0], sum(end - begun for begun, end in spans)
    gaps = [begun - end for (_, end), (begun, _) in pairwise(spans)]
    return Share(
        way=way,
        jobs=jobs,
        wall_seconds=round(wall, 2),
        device_seconds=round(busy, 2),
        busy_share=round(busy / wall, 4),
        median_gap_ms=round(statistics.median(gaps) * 1000, 1),
        longest_gap_ms=round(max(gaps) * 1000, 1),
    )


def _lines(path: Path) -> list[str]:
    return path.read_text().splitlines()


def _picture() -> bytes:
    content = io.BytesIO()
    Image.linear_gradient("L").convert("RGB").save(content, "PNG")
    return content.getvalue()


def main() -> int:
    """Measure both ways, print, and end with 1 where the device waits too long."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--jobs", type=int, default=30)
    parser.add_argument("--json", action="store_true", help="print JSON")
    options = parser.parse_args()
    before = measure("files within generate", options.jobs, is_finished_beside=False)
    beside = measure("files beside the next job", options.jobs, is_finished_beside=True)
    ratio = before.wall_seconds / beside.wall_seconds
    if options.json:
        print(json.dumps({"ways": [asdict(before), asdict(beside)], "ratio": round(ratio, 3)}, indent=2))
    else:
        head = ("way", "jobs", "wall s", "device s", "busy", "median gap ms", "longest gap ms")
        print(table(head, [tuple(asdict(share).values()) for share in (before, beside)]))
        print(f"\n{ratio:.2f} times as many jobs an hour")
    if beside.busy_share < TARGET_SHARE:
        print(f"MISSED the device was busy {beside.busy_share:.1%}; target {TARGET_SHARE:.0%}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
