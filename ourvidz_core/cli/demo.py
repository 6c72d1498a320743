"""``ourvidz demo``: real messages through a real worker, and a sheet of what came out.

The queue is an embedded Redis, storage and callbacks are directories, and reference
images come from a server on this machine: everything real, nothing needed.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
import uuid
from collections.abc import Iterable, Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import click
from attrs import frozen

from ourvidz_core.cli.common import open_registry, open_settings, print_json, table
from ourvidz_core.errors import SettingsError
from ourvidz_core.plugins.registry import Registry
from ourvidz_core.wire.job_types import JobType

#: The host of the producer's example messages; the demo serves its paths itself.
EXAMPLE_HOST = "https://storage.example.test"
_USER = "11111111-1111-4111-8111-111111111111"


@frozen(kw_only=True)
class DemoResult:
    """What became of one message."""

    name: str
    job_id: str
    job_type: str
    status: str
    seconds: float | None
    assets: tuple[Path, ...]
    error: str = ""


@click.command()
@click.option(
    "--messages",
    type=click.Path(exists=True, file_okay=False, path_type=Path),
    help="Directory of messages, *.json; the job types' own samples unless said.",
)
@click.option(
    "--out", type=click.Path(file_okay=False, path_type=Path), default=Path("demo-output"), help="Where results go."
)
@click.option("--json", "as_json", is_flag=True, help="Print JSON instead of a table.")
def demo(messages: Path | None, out: Path, as_json: bool) -> int:
    """Push messages of all installed job types through a worker and show what they made.

    Ends with 0 when every job completed that can: a message whose reference nobody can
    fetch (a browser's blob: URL) must fail.
    """
    registry = open_registry(open_settings())
    chosen = list(_from_files(registry, messages) if messages else _samples(registry.job_types))
    if not chosen:
        raise SettingsError("there is no message for any installed job type; ourvidz plugins list shows what is there")
    results = _work(registry, out, chosen)
    sheet = out / "contact-sheet.png"
    _draw_sheet(results, sheet)
    if as_json:
        print_json({"jobs": [_as_json(result) for result in results], "contact_sheet": str(sheet)})
    else:
        rows = [
            (
                result.name,
                result.job_type,
                result.status,
                f"{result.seconds:.1f}" if result.seconds is not None else "-",
                len(result.assets),
                result.error or ", ".join(str(path.relative_to(out)) for path in result.assets[:1]),
            )
            for result in results
        ]
        click.echo(table(("MESSAGE", "JOB TYPE", "STATUS", "SECONDS", "ASSETS", "FIRST ASSET OR REASON"), rows))
        click.echo(f"\ncontact sheet: {sheet}")
    unexpected = [result for result in results if result.status != "completed" and "blob" not in result.name]
    return 1 if unexpected else 0


def _from_files(registry: Registry, directory: Path) -> Iterable[tuple[str, dict[str, Any]]]:
    known = {job_type.name for job_type in registry.job_types}
    for path in sorted(directory.glob("*.json")):
        message = json.loads(path.read_text("utf-8"))
        if message["type"] in known:
            yield path.stem, message


def _samples(job_types: Iterable[JobType]) -> Iterable[tuple[str, dict[str, Any]]]:
    for job_type in job_types:
        yield job_type.name, {"prompt": "", **job_type.sample, "type": job_type.name}


def _work(registry: Registry, out: Path, messages: list[tuple[str, dict[str, Any]]]) -> list[DemoResult]:
    from ourvidz_core.cli.wiring import make_queue
    from ourvidz_core.settings import load
    from ourvidz_core.testing.servers import FileServer

    out.mkdir(parents=True, exist_ok=True)
    paths = {path for _, message in messages for path in _example_paths(message)}
    pictures = {path: _reference_png(number) for number, path in enumerate(sorted(paths))}
    with FileServer(pictures) as server:
        environ = {
            **{name: value for name, value in os.environ.items() if name not in _SERVICES},
            "OURVIDZ_STATE_DIR": str(out.resolve()),
            "OURVIDZ_WORK_DIR": str(out.resolve() / "work"),
            "OURVIDZ_REFERENCE_ALLOWED_HOSTS": server.host,
            "OURVIDZ_CALLBACK_MIN_AGE_SECONDS": "0",
        }
        sent = [(name, _renewed(message, server.url)) for name, message in messages]
        queue = make_queue(load(environ))
        try:
            for _, message in sent:
                queue.push(registry.get(message["type"]).job_type.queue, json.dumps(message).encode())
            started = time.monotonic()
            worker = subprocess.run(
                [sys.executable, "-m", "ourvidz_core", "worker", "--drain"], env=environ, check=False
            )
            click.echo(f"worker ended with {worker.returncode} after {time.monotonic() - started:.1f} s", err=True)
        finally:
            queue.close()
    return [_result(out, name, message) for name, message in sent]


#: The demo leaves what these name alone, whatever they are set to.
_SERVICES = {
    "REDIS_URL",
    "OURVIDZ_REDIS_URL",
    "UPSTASH_REDIS_REST_URL",
    "OURVIDZ_UPSTASH_REDIS_REST_URL",
    "SUPABASE_URL",
    "OURVIDZ_SUPABASE_URL",
    "OURVIDZ_STORAGE_DIR",
    "OURVIDZ_CALLBACK_URL",
    "OURVIDZ_CALLBACK_DIR",
}


def _renewed(message: Mapping[str, Any], server_url: str) -> dict[str, Any]:
    """The message under a new id, so that it is no duplicate, with its references served from here."""
    text = json.dumps({"user_id": _USER, **message}).replace(EXAMPLE_HOST, server_url)
    renewed: dict[str, Any] = json.loads(text)
    return {**renewed, "id": str(uuid.uuid4()), "created_at": datetime.now(UTC).isoformat()}


def _example_paths(value: Any) -> set[str]:
    if isinstance(value, str):
        url = value.partition("?")[0]
        return {url.removeprefix(EXAMPLE_HOST)} if url.startswith(f"{EXAMPLE_HOST}/") else set()
    children: Iterable[Any] = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return {path for child in children for path in _example_paths(child)}


def _reference_png(number: int) -> bytes:
    """A picture with a shape at a place that one can recognise in a result."""
    import io

    from PIL import Image, ImageDraw

    sky, shape = (((70, 130, 200), (230, 60, 50)), ((250, 200, 90), (40, 60, 160)), ((60, 160, 90), (250, 230, 60)))[
        number % 3
    ]
    image = Image.new("RGB", (480, 832), sky)
    draw = ImageDraw.Draw(image)
    left = 60 + 120 * (number % 3)
    draw.ellipse((left, 300, left + 180, 480), fill=shape)
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()


def _result(out: Path, name: str, message: Mapping[str, Any]) -> DemoResult:
    job_id, job_type = message["id"], message["type"]
    record = out / "callbacks" / f"{job_id}.jsonl"
    bodies = [json.loads(line) for line in record.read_text("utf-8").splitlines()] if record.exists() else []
    final = next((body for body in reversed(bodies) if body["status"] != "processing"), None)
    if final is None:
        return DemoResult(name=name, job_id=job_id, job_type=job_type, status="unfinished", seconds=None, assets=())
    metadata = final["metadata"]
    return DemoResult(
        name=name,
        job_id=job_id,
        job_type=job_type,
        status=final["status"],
        seconds=metadata.get("generation_time"),
        assets=tuple(out / "assets" / metadata["bucket"] / asset for asset in final["assets"]),
        error=final.get("error_message", "")[:100],
    )


def _as_json(result: DemoResult) -> dict[str, Any]:
    return {
        "message": result.name,
        "job_id": result.job_id,
        "job_type": result.job_type,
        "status": result.status,
        "seconds": result.seconds,
        "assets": [str(path) for path in result.assets],
        "error": result.error,
    }


# -- the contact sheet

_THUMB = 160
_LABEL = 28
_COLUMNS = 6


def _draw_sheet(results: Iterable[DemoResult], path: Path) -> None:
    """All results as thumbnails with their names; of a video its first, middle and last frame."""
    from PIL import Image, ImageDraw

    cells = [
        (f"{result.name}\n{label}", picture)
        for result in results
        for asset in result.assets
        for label, picture in _pictures(asset)
    ]
    rows = max(1, -(-len(cells) // _COLUMNS))
    sheet = Image.new("RGB", (_COLUMNS * _THUMB, rows * (_THUMB + _LABEL)), "white")
    draw = ImageDraw.Draw(sheet)
    for number, (label, picture) in enumerate(cells):
        left, top = number % _COLUMNS * _THUMB, number // _COLUMNS * (_THUMB + _LABEL)
        scale = min((_THUMB - 8) / picture.width, (_THUMB - 8) / picture.height)
        thumb = picture.resize((max(1, int(picture.width * scale)), max(1, int(picture.height * scale))))
        sheet.paste(thumb, (left + (_THUMB - thumb.width) // 2, top + (_THUMB - thumb.height) // 2))
        draw.multiline_text((left + 4, top + _THUMB - 2), label, fill="black", spacing=1, font_size=10)
    sheet.save(path)


def _pictures(asset: Path) -> Iterable[tuple[str, Any]]:
    from PIL import Image

    if asset.suffix == ".png":
        with Image.open(asset) as image:
            yield asset.name.rpartition("_")[2], image.convert("RGB")
        return
    import av

    with av.open(str(asset)) as container:
        frames = [frame.to_image() for frame in container.decode(video=0)]
    for index in sorted({0, len(frames) // 2, len(frames) - 1}):
        yield f"frame {index}", frames[index]
