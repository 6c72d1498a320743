"""Set-ups that the dashboard is looked at with, and their pictures: ``python -m tests.dashboard.scenes DIRECTORY``.

The pictures need a Chromium; that of the how-to page is ``working-wide.png``.
"""

from __future__ import annotations

import contextlib
import io
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import redis
from attrs import frozen
from PIL import Image, ImageDraw, ImageFilter

from ourvidz_core.dashboard.access import Access
from ourvidz_core.dashboard.feed import Feed
from ourvidz_core.dashboard.overview import Reader
from ourvidz_core.dashboard.previews import Previews
from ourvidz_core.dashboard.server import Dashboard, DashboardServer
from ourvidz_core.delivery.board import DeviceMemory, FinishedJob, RedisBoard, RunningJob, StoredAsset, WorkerStatus
from ourvidz_core.delivery.embedded import EmbeddedRedis
from ourvidz_core.delivery.queue import Claim, DeadLetter
from ourvidz_core.delivery.redis_queue import RedisQueue
from ourvidz_core.delivery.storage import DirectoryStorage, Storage
from ourvidz_core.wire.callbacks import JobStatus
from ourvidz_core.wire.states import EngineState, WorkerState

QUEUES = ("sdxl_queue", "wan_queue")
USER = "11111111-1111-4111-8111-111111111111"


@frozen(kw_only=True)
class Scene:
    """A dashboard that is served, and all that it looks at."""

    url: str
    redis_url: str
    queue: RedisQueue
    board: RedisBoard
    feed: Feed
    #: Where assets lie.
    root: Path

    def finish(self, job_id: str, *, ago: float = 5.0, **changes: Any) -> FinishedJob:
        """Put a job that completed on the board; ``assets`` are (media type, bytes)."""
        assets = []
        for number, (media_type, content) in enumerate(changes.pop("assets", ())):
            path = f"{USER}/{job_id}_{number}.{media_type.partition('/')[2]}"
            target = self.root / "toys" / path
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(content)
            assets.append(StoredAsset(bucket="toys", path=path, media_type=media_type, size_bytes=len(content)))
        record = FinishedJob(
            **{
                "id": job_id,
                "type": "sdxl_image_fast",
                "status": JobStatus.COMPLETED,
                "finished_at": time.time() - ago,
                "worker": "gpu-1",
                "seconds": {"waiting": 0.8, "generate": 5.5, "store": 0.6, "total": 7.0},
                "assets": tuple(assets),
                **changes,
            }
        )
        self.board.finished(record)
        return record

    def fail(self, job_id: str, reason: str, *, error_type: str = "OutOfMemory", **changes: Any) -> None:
        """Put a job that failed on the board."""
        self.finish(job_id, status=JobStatus.FAILED, error_type=error_type, reason=reason, **changes)

    def bury(self, raw: bytes, job_id: str | None, reason: str, *, queue: str = QUEUES[0], ago: float = 60.0) -> None:
        """Leave a dead letter."""
        buried_at = time.strftime("%Y-%m-%dT%H:%M:%S+00:00", time.gmtime(time.time() - ago))
        letter = DeadLetter(
            raw=raw, job_id=job_id, error_type="PayloadError", reason=reason, buried_at=buried_at, worker="gpu-1"
        )
        self.queue.push(queue, raw)
        self.queue.finish(self.claim(queue), is_final=False, dead_letter=letter)

    def claim(self, queue: str) -> Claim:
        """Take a job, as a worker does."""
        taken = self.queue.claim((queue,), worker="gpu-1", lease=60)
        assert taken is not None
        return taken

    def publish(self, name: str = "gpu-1", **changes: Any) -> None:
        """Put a worker on the board."""
        status = WorkerStatus(
            **{
                "name": name,
                "host": "render-01",
                "pid": 4242,
                "version": "1.0",
                "queues": QUEUES,
                "state": WorkerState.WORKING,
                "started_at": time.time() - 7200,
                "engine": EngineState.READY,
                **changes,
            }
        )
        self.board.publish(status)


@contextlib.contextmanager
def opened(directory: Path, server: EmbeddedRedis, *, storage: Storage | None = None, **access: Any) -> Iterator[Scene]:
    """A dashboard on an emptied Redis; both ends of it are closed with the block."""
    with redis.Redis.from_url(server.address) as client:
        client.flushall()
    origins, request_seconds = access.pop("media_origins", ()), access.pop("request_seconds", 10.0)
    with (
        contextlib.closing(RedisQueue.connect(server.address)) as queue,
        contextlib.closing(RedisBoard.connect(server.address)) as board,
    ):
        reader = Reader(queue, board, QUEUES)
        with contextlib.closing(Feed(reader, interval_seconds=0.2)) as feed:
            parts = Dashboard(
                feed=feed,
                access=Access(**access),
                previews=Previews(feed, storage or DirectoryStorage(directory), reader.preview),
                requeue=reader.requeue,
                media_origins=origins,
            )
            with contextlib.closing(
                DashboardServer(("127.0.0.1", 0), parts, request_seconds=request_seconds)
            ) as served:
                yield Scene(
                    url=served.url, redis_url=server.address, queue=queue, board=board, feed=feed, root=directory
                )


def picture(number: int, size: tuple[int, int] = (480, 480)) -> Image.Image:
    """A landscape of hills that one can tell from the others."""
    width, height = size
    sky, ground = _PALETTES[number % len(_PALETTES)]
    image = Image.new("RGB", size, sky)
    draw = ImageDraw.Draw(image)
    left, top = width * (0.2 + 0.13 * (number % 5)), height * 0.14
    draw.ellipse((left, top, left + width * 0.22, top + width * 0.22), fill=(255, 244, 214))
    for layer in range(4):
        shade = tuple(int(part * (1 - 0.2 * layer)) for part in ground)
        base = height * (0.5 + 0.12 * layer)
        for hill in range(-1, 5):
            x = width * (hill * 0.29 + 0.11 * ((layer + number) % 3))
            draw.ellipse((x, base, x + width * 0.52, base + height), fill=shade)
    return image.filter(ImageFilter.GaussianBlur(1.2))


_PALETTES = (
    ((246, 178, 140), (140, 84, 120)),
    ((150, 204, 236), (74, 140, 110)),
    ((188, 170, 230), (72, 76, 140)),
    ((250, 214, 150), (190, 110, 70)),
    ((160, 220, 206), (44, 110, 130)),
)


def png(number: int, size: tuple[int, int] = (480, 480)) -> bytes:
    """One of the pictures as a file."""
    buffer = io.BytesIO()
    picture(number, size).save(buffer, "PNG")
    return buffer.getvalue()


def mp4(number: int, frames: int = 24) -> bytes:
    """A video that pans over one of the pictures."""
    import av

    wide = picture(number, (480, 270))
    buffer = io.BytesIO()
    with av.open(buffer, "w", format="mp4") as container:
        stream = container.add_stream("libx264", rate=12, options={"threads": "1"})
        stream.width, stream.height, stream.pix_fmt = 320, 240, "yuv420p"
        for index in range(frames):
            left = 5 * index
            frame = av.VideoFrame.from_image(wide.crop((left, 0, left + 320, 240)))
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return buffer.getvalue()


def empty(scene: Scene) -> None:
    """A Redis on which nothing has happened, and no worker."""


def working(scene: Scene) -> None:
    """Two workers at work on a good day."""
    now = time.time()
    _history(scene, failures=0)
    scene.finish(_id(1), assets=[("image/png", png(0))], ago=95)
    scene.finish(
        _id(2), type="sdxl_image_high", assets=[("image/png", png(index)) for index in (1, 2, 3)], ago=60,
        seconds={"references": 0.9, "waiting": 2.0, "generate": 19.5, "store": 1.6, "total": 24.4},
    )  # fmt: skip
    video = {"references": 0.6, "waiting": 11.0, "generate": 141.2, "store": 2.9, "total": 156.0}
    scene.finish(_id(3), type="video_fast", worker="gpu-2", assets=[("video/mp4", mp4(4))], ago=41, seconds=video)
    scene.finish(_id(4), assets=[("image/png", png(3))], ago=22)
    scene.finish(_id(5), type="video_fast", worker="gpu-2", assets=[("video/mp4", mp4(2))], ago=8, seconds=video)
    for number in range(7):
        scene.queue.push(QUEUES[number % 2], _message(_id(20 + number), now - 40 + 5 * number))
    for queue in QUEUES:
        scene.claim(queue)
    jobs = (
        RunningJob(
            id=_id(20), type="sdxl_image_high", attempt=1, stage="denoise", step=17, total=25,
            claimed_at=now - 12, started_at=now - 11,
        ),
    )  # fmt: skip
    films = (
        RunningJob(
            id=_id(21), type="video_high", attempt=2, stage="denoise", step=9, total=50,
            claimed_at=now - 74, started_at=now - 60,
        ),
        RunningJob(id=_id(22), type="video_fast", attempt=1, stage="waiting", claimed_at=now - 9),
    )  # fmt: skip
    scene.publish(jobs=jobs, completed=214, failed=1, retried=3, device=DeviceMemory(used_gb=11.3, total_gb=24.0))
    scene.publish(
        "gpu-2",
        queues=QUEUES[1:],
        jobs=films,
        completed=61,
        retried=1,
        device=DeviceMemory(used_gb=23.1, total_gb=24.0),
    )


def troubled(scene: Scene) -> None:
    """A bad night: failures, dead letters, an engine that does not start."""
    now = time.time()
    _history(scene, failures=4)
    scene.finish(_id(1), assets=[("image/png", png(1))], ago=500)
    scene.finish(_id(2), type="video_fast", assets=[("video/mp4", b"this is no video")], ago=400)
    scene.fail(
        _id(9), "the GPU has too little memory for 1280x720 at 81 frames: 21.4 GiB were needed and 19.8 free",
        type="video_high", ago=120, attempt=2, worker="gpu-2",
    )  # fmt: skip
    scene.fail(_id(10), "the reference 'start' answers 404", error_type="ReferenceUnavailable", ago=75)
    scene.fail(
        _id(11), "policy acme-safety refused the prompt", error_type="PolicyRefused", type="sdxl_image_high", ago=31
    )
    for number, reason in enumerate((
        "seed must be a whole number, not 'x'; num_images must be 1, 3 or 6, not 7",
        "the prompt is missing",
    )):  # fmt: skip
        raw = _message(_id(12 + number), now)
        scene.bury(raw, _id(12 + number), reason, queue=QUEUES[number], ago=200 - 90 * number)
    scene.bury(b'{"id": ', None, "the message is no JSON: it ends too early", ago=33)
    for number in range(41):
        scene.queue.push(QUEUES[1], _message(_id(60 + number), now - 1900))
    scene.publish(
        "gpu-2", queues=QUEUES[1:], state=WorkerState.IDLE, engine=EngineState.FAILED, completed=31, failed=6,
        retried=9, device=DeviceMemory(used_gb=4.2, total_gb=24.0),
    )  # fmt: skip
    scene.publish(state=WorkerState.DRAINING, completed=102, failed=2, device=DeviceMemory(used_gb=9.9, total_gb=24.0))


def _history(scene: Scene, *, failures: int) -> None:
    for number in range(120):
        ago = 3500 - 28 * number + 11 * (number % 4)
        if failures and number > 80 and number % 9 < failures:
            scene.fail(f"{number:04d}-old", "the engine ended with signal 9", error_type="EngineCrashed", ago=ago)
        elif number % 5 == 0:
            scene.finish(
                f"{number:04d}-old", type="video_fast", ago=ago,
                seconds={"references": 0.7, "waiting": 9.0, "generate": 138 + number % 7, "store": 2.8, "total": 151},
            )  # fmt: skip
        else:
            scene.finish(f"{number:04d}-old", ago=ago)


def _id(number: int) -> str:
    return f"{0x7F3A91C0 + 7919 * number:08x}-4e1d-4b6a-9c55-{0x3D2F10AA5E00 + 104729 * number:012x}"


def _message(job_id: str, created: float) -> bytes:
    created_at = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(created))
    return f'{{"id": "{job_id}", "type": "sdxl_image_fast", "prompt": "a", "created_at": "{created_at}"}}'.encode()


SCENES = {"empty": empty, "working": working, "troubled": troubled}
WIDTHS = {"wide": (1280, 900), "phone": (390, 844)}


def chromium() -> str | None:
    """The program of a browser that is installed, or None."""
    named = os.environ.get("CHROMIUM")
    return named or next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


def take_pictures(directory: Path) -> None:
    """Every scene at every width, light; that of a good day dark, too."""
    from playwright.sync_api import sync_playwright

    directory.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as scratch, sync_playwright() as playwright:
        server = EmbeddedRedis(Path(scratch) / "redis")
        browser = playwright.chromium.launch(executable_path=chromium(), args=["--no-sandbox"])
        for name, prepare in SCENES.items():
            with opened(Path(scratch) / name, server) as scene:
                prepare(scene)
                for width, (across, down) in WIDTHS.items():
                    for scheme in ("light", "dark") if name != "empty" else ("light",):
                        page = browser.new_page(
                            viewport={"width": across, "height": down}, color_scheme=scheme, device_scale_factor=1
                        )
                        page.on("console", lambda message: print(message.type, message.text))
                        page.on("pageerror", lambda error: print("error", error))
                        page.goto(scene.url)
                        page.wait_for_selector("[data-state=live]")
                        page.wait_for_timeout(1200)
                        suffix = "" if scheme == "light" else "-dark"
                        page.screenshot(path=directory / f"{name}-{width}{suffix}.png", full_page=True)
                        overflow = page.evaluate("document.documentElement.scrollWidth - innerWidth")
                        print(name, width, scheme, "overflow", overflow)
                        page.close()
        browser.close()
        server.close()


if __name__ == "__main__":
    take_pictures(Path(sys.argv[1]))
