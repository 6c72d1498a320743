"""``ourvidz demo``: real messages through real workers, and a sheet of what came out.

The queue is an embedded Redis, storage and callbacks are directories, and reference
images come from a server on this machine: everything real, nothing needed.
"""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Iterable, Iterator, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import click

from ourvidz_core.cli.common import open_registry, open_settings, print_json, table
from ourvidz_core.cli.demo_pages import DemoResult, draw_sheet, write_page
from ourvidz_core.errors import SettingsError
from ourvidz_core.plugins.registry import Registry
from ourvidz_core.wire.job_types import JobType

#: The host of the producer's example messages; the demo serves its paths itself.
EXAMPLE_HOST = "https://storage.example.test"
_USER = "11111111-1111-4111-8111-111111111111"


@click.command()
@click.option(
    "--messages",
    type=click.Path(exists=True, file_okay=False, path_type=Path),
    help="Directory of messages, *.json, and their references; the job types' own samples unless said.",
)
@click.option(
    "--out", type=click.Path(file_okay=False, path_type=Path), default=Path("demo-output"), help="Where results go."
)
@click.option(
    "--workers", type=click.IntRange(min=1), default=1, show_default=True, help="How many workers share the jobs."
)
@click.option("--json", "as_json", is_flag=True, help="Print JSON instead of a table.")
def demo(messages: Path | None, out: Path, workers: int, as_json: bool) -> int:
    """Push messages of all installed job types through workers and show what they made.

    Ends with 0 when every job completed that can: a message whose reference nobody can
    fetch (a browser's blob: URL) must fail.
    """
    registry = open_registry(open_settings())
    chosen = list(_from_files(registry, messages) if messages else _samples(registry.job_types))
    if not chosen:
        raise SettingsError("there is no message for any installed job type; ourvidz plugins list shows what is there")
    began = time.monotonic()
    results = _work(registry, out, chosen, references=messages / "references" if messages else None, workers=workers)
    sheet, page = out / "contact-sheet.png", out / "index.html"
    draw_sheet(results, sheet)
    write_page(results, page)
    if as_json:
        jobs = [_as_json(result) for result in results]
        print_json({"jobs": jobs, "contact_sheet": str(sheet), "page": str(page)})
    else:
        click.echo(_table(results))
        by = f"{workers} workers" if workers > 1 else "one worker"
        click.echo(f"\n{len(results)} messages by {by} in {time.monotonic() - began:.0f} s")
        click.echo(f"contact sheet: {sheet}\nall results, videos playing: {page}")
    return 1 if any(result.status != "completed" and "blob" not in result.name for result in results) else 0


def _table(results: Iterable[DemoResult]) -> str:
    rows = [
        (
            result.name,
            result.job_type,
            result.status,
            f"{result.metadata['generation_time']:.1f}" if result.assets else "-",
            result.error if result.error else f"{len(result.assets)} in {result.metadata['bucket']}",
        )
        for result in results
    ]
    return table(("MESSAGE", "JOB TYPE", "STATUS", "SECONDS", "ASSETS OR REASON"), rows)


def _from_files(registry: Registry, directory: Path) -> Iterable[tuple[str, dict[str, Any]]]:
    known = {job_type.name for job_type in registry.job_types}
    for path in sorted(directory.glob("*.json")):
        message = json.loads(path.read_text("utf-8"))
        if message["type"] in known:
            yield path.stem, message


def _samples(job_types: Iterable[JobType]) -> Iterable[tuple[str, dict[str, Any]]]:
    for job_type in job_types:
        yield job_type.name, {"prompt": "", **job_type.sample, "type": job_type.name}


def _work(
    registry: Registry, out: Path, messages: list[tuple[str, dict[str, Any]]], *, references: Path | None, workers: int
) -> list[DemoResult]:
    from ourvidz_core.cli.wiring import make_queue
    from ourvidz_core.settings import load
    from ourvidz_core.testing.servers import FileServer

    out.mkdir(parents=True, exist_ok=True)
    paths = {path for _, message in messages for _, path in _example_references(message)}
    pictures = {path: _reference(path, number, references) for number, path in enumerate(sorted(paths))}
    with (
        FileServer(pictures) as server,
        # Of this run alone: jobs that an interrupted one left are not done in the next.
        tempfile.TemporaryDirectory(prefix="ourvidz-demo-") as state_dir,
    ):
        environ = {
            "OURVIDZ_KERNELS_DIR": str(out.resolve() / "kernels"),
            **{name: value for name, value in os.environ.items() if name not in _SERVICES},
            "OURVIDZ_STATE_DIR": state_dir,
            "OURVIDZ_WORK_DIR": str(Path(state_dir) / "work"),
            "OURVIDZ_STORAGE_DIR": str(out.resolve() / "assets"),
            "OURVIDZ_CALLBACK_DIR": str(out.resolve() / "callbacks"),
            "OURVIDZ_HEALTH_ADDRESS": "off",
            "OURVIDZ_REFERENCE_ALLOWED_HOSTS": server.host,
            "OURVIDZ_CALLBACK_MIN_AGE_SECONDS": "0",
        }
        kept = {path: _keep(out / "references", path, picture) for path, picture in pictures.items()}
        sent = [(name, _renewed(message, server.url)) for name, message in messages]
        with contextlib.closing(make_queue(load(environ))) as queue:
            for _, message in sent:
                queue.push(registry.get(message["type"]).job_type.queue, json.dumps(message).encode())
            with _running(workers, environ, out / "worker.log") as processes:
                _watch(processes, out, [message["id"] for _, message in sent])
    given = {
        name: tuple((role, kept[path]) for role, path in _example_references(message)) for name, message in messages
    }
    return [_result(out, name, message, given[name]) for name, message in sent]


def _keep(directory: Path, path: str, picture: bytes) -> Path:
    """Where the page shows ``picture`` from."""
    directory.mkdir(exist_ok=True)
    kept = directory / path.rpartition("/")[2]
    kept.write_bytes(picture)
    return kept


@contextlib.contextmanager
def _running(workers: int, environ: Mapping[str, str], log: Path) -> Iterator[Sequence[subprocess.Popen[bytes]]]:
    """Workers that end when the jobs are done, or with the block: at the latest when this process does."""
    from ourvidz_core.orchestrator.link import OrchestratorEnd

    with log.open("wb") as file, contextlib.ExitStack() as stack:
        processes = []
        for _ in range(workers):
            line = OrchestratorEnd()
            command = [sys.executable, "-m", "ourvidz_core", "worker", "--drain"]
            command += ["--supervisor", str(line.their_descriptor)]
            process = subprocess.Popen(command, env=environ, stderr=file, pass_fds=[line.their_descriptor])
            line.passed_on()
            stack.callback(process.wait)
            stack.callback(line.close)
            processes.append(process)
        yield processes


def _watch(workers: Sequence[subprocess.Popen[bytes]], out: Path, job_ids: list[str]) -> None:
    """Show how many jobs are over until all workers end; off a terminal, silently."""
    from rich.console import Console
    from rich.progress import Progress

    console = Console(stderr=True)
    with Progress(console=console, transient=True, disable=not console.is_terminal) as progress:
        task = progress.add_task("jobs", total=len(job_ids))
        while any(worker.poll() is None for worker in workers):
            over = sum(
                '"status":"processing"' not in _last_line(out / "callbacks" / f"{job_id}.jsonl") for job_id in job_ids
            )
            progress.update(task, completed=over)
            time.sleep(0.2)
    if failed := [worker.returncode for worker in workers if worker.returncode != 0]:
        raise SettingsError(f"a worker ended with {failed[0]}; {out / 'worker.log'} says why")


def _last_line(record: Path) -> str:
    if not record.exists():
        return '"status":"processing"'
    return record.read_text("utf-8").rstrip("\n").rpartition("\n")[2]


#: The demo leaves what these name alone, whatever they are set to.
_SERVICES = {
    "REDIS_URL",
    "OURVIDZ_REDIS_URL",
    "UPSTASH_REDIS_REST_URL",
    "OURVIDZ_UPSTASH_REDIS_REST_URL",
    "SUPABASE_URL",
    "OURVIDZ_SUPABASE_URL",
    "OURVIDZ_STORAGE_BACKEND",
    "OURVIDZ_CALLBACK_URL",
}


def _renewed(message: Mapping[str, Any], server_url: str) -> dict[str, Any]:
    """The message under a new id, so that it is no duplicate, with its references served from here."""
    text = json.dumps({"user_id": _USER, **message}).replace(EXAMPLE_HOST, server_url)
    renewed: dict[str, Any] = json.loads(text)
    return {**renewed, "id": str(uuid.uuid4()), "created_at": datetime.now(UTC).isoformat()}


def _example_references(value: Any, role: str = "") -> Iterator[tuple[str, str]]:
    """The references in a message, in its order: as what each is given, in words, and its path on the host."""
    if isinstance(value, str) and value.startswith(f"{EXAMPLE_HOST}/"):
        yield role.removesuffix("_url").replace("_", " "), value.partition("?")[0].removeprefix(EXAMPLE_HOST)
    elif isinstance(value, dict):
        for key, child in value.items():
            yield from _example_references(child, key)
    elif isinstance(value, list):
        for child in value:
            yield from _example_references(child, role)


#: Background and shape of the references that the demo serves, one after the other.
_REFERENCE_COLOURS = (
    ((245, 245, 242), (222, 40, 38)),
    ((26, 34, 84), (250, 222, 50)),
    ((176, 226, 196), (40, 86, 225)),
)


def _reference(path: str, number: int, directory: Path | None) -> bytes:
    """The file of that name beside the messages; a drawn one where there is none."""
    file = directory / path.rpartition("/")[2] if directory else None
    return file.read_bytes() if file and file.is_file() else _drawn_reference(number)


def _drawn_reference(number: int) -> bytes:
    """A disc at a place of its own, that one can recognise in a result."""
    import io

    from PIL import Image, ImageDraw

    background, colour = _REFERENCE_COLOURS[number % len(_REFERENCE_COLOURS)]
    image = Image.new("RGB", (480, 832), background)
    left = 40 + 110 * (number % 3)
    ImageDraw.Draw(image).ellipse((left, 320, left + 180, 500), fill=colour)
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()


def _result(out: Path, name: str, message: Mapping[str, Any], references: tuple[tuple[str, Path], ...]) -> DemoResult:
    record = out / "callbacks" / f"{message['id']}.jsonl"
    bodies = [json.loads(line) for line in record.read_text("utf-8").splitlines()] if record.exists() else []
    final = next((body for body in reversed(bodies) if body["status"] != "processing"), None)
    if final is None:
        final = {"status": "unfinished", "assets": [], "metadata": {}}
    metadata = final["metadata"]
    return DemoResult(
        name=name,
        job_id=message["id"],
        job_type=message["type"],
        prompt=message["prompt"],
        enhanced_prompt=final.get("enhancedPrompt"),
        status=final["status"],
        assets=tuple(out / "assets" / metadata["bucket"] / asset for asset in final["assets"]),
        references=references,
        callbacks=record,
        error=final.get("error_message", "")[:100],
        metadata=metadata,
    )


def _as_json(result: DemoResult) -> dict[str, Any]:
    return {
        "message": result.name,
        "job_id": result.job_id,
        "job_type": result.job_type,
        "status": result.status,
        "assets": [str(path) for path in result.assets],
        "error": result.error,
    }
