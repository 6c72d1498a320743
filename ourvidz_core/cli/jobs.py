"""``ourvidz run`` and ``ourvidz enqueue``: one job in front of you, or many onto their queue."""

from __future__ import annotations

import json
import logging
import random
import signal
import sys
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import attrs
import click

from ourvidz_core.cli.common import open_registry, open_settings, print_json
from ourvidz_core.errors import CallbackUndelivered, JobError, SettingsError
from ourvidz_core.plugins.registry import Registry
from ourvidz_core.wire.payloads import converter, decode_message, structure_payload

if TYPE_CHECKING:
    from ourvidz_core.cli.progress import Show
    from ourvidz_core.delivery.callbacks import CallbackClient
    from ourvidz_core.settings import Settings
    from ourvidz_core.wire.callbacks import Callback
    from ourvidz_core.wire.jobs import Job
    from ourvidz_core.worker.runner import Outcome

_JOB_FILE = click.Path(exists=True, dir_okay=False, path_type=Path, allow_dash=True)
#: A person waits for this command, so it does not insist as long as a worker.
_CALLBACK_TRIES = 4


@click.command()
@click.argument("job_file", type=_JOB_FILE, metavar="JOB.json")
@click.option("--plan", is_flag=True, help="Show what would run, without running it.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object; no progress bar.")
def run(job_file: Path, plan: bool, as_json: bool) -> int:
    """Run one job here and now, without a queue; then send its callback.

    Ends with 0 when the job completed and 1 when it failed.
    """
    settings = open_settings(at_least=logging.WARNING)
    registry = open_registry(settings)
    raw = _read(job_file)
    if plan:
        print_json(_plan(registry, settings, raw))
        return 0
    outcome = _run(settings, registry, raw, show=None if as_json else _progress())
    if as_json:
        print_json(
            {
                "callback": outcome.callback.to_json() if outcome.callback else None,
                "assets": [converter.unstructure(asset) for asset in outcome.assets],
                "error": outcome.error.message if outcome.error else None,
                "seconds": round(outcome.seconds, 3),
            }
        )
    else:
        _print_outcome(outcome)
    return 0 if outcome.error is None else 1


@click.command()
@click.argument("job_files", type=_JOB_FILE, metavar="JOB.json...", nargs=-1, required=True)
@click.option("--queue", "queue_name", help="The queue; that of the job's type unless said.")
@click.option("--fresh-ids", is_flag=True, help="Give each job a new id and time, so that it is no duplicate.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def enqueue(job_files: tuple[Path, ...], queue_name: str | None, fresh_ids: bool, as_json: bool) -> None:
    """Push messages onto their queues, byte for byte, the way the producer does."""
    from ourvidz_core.cli.wiring import make_queue

    settings = open_settings(at_least=logging.WARNING)
    registry = open_registry(settings)
    messages = [_renewed(_read(path)) if fresh_ids else _read(path) for path in job_files]
    # All are looked at before the first is pushed: half a batch is worse than none.
    targets = [queue_name or _queue_of(registry, path, raw) for path, raw in zip(job_files, messages, strict=True)]
    queue = make_queue(settings)
    try:
        for target, raw in zip(targets, messages, strict=True):
            queue.push(target, raw)
    finally:
        queue.close()
    rows = [{"file": str(path), "queue": target} for path, target in zip(job_files, targets, strict=True)]
    if as_json:
        print_json(rows)
    else:
        for row in rows:
            click.echo(f"{row['file']} -> {row['queue']}")


def _read(path: Path) -> bytes:
    return sys.stdin.buffer.read() if str(path) == "-" else path.read_bytes()


def _queue_of(registry: Registry, path: Path, raw: bytes) -> str:
    try:
        return registry.get(structure_payload(decode_message(raw)).type).job_type.queue
    except JobError as error:
        raise SettingsError(f"{path}: {error.message}; name a queue with --queue to push it all the same") from error


def _renewed(raw: bytes) -> bytes:
    import uuid
    from datetime import UTC, datetime

    message = {**decode_message(raw), "id": str(uuid.uuid4()), "created_at": datetime.now(UTC).isoformat()}
    return json.dumps(message, ensure_ascii=False).encode()


def _plan(registry: Registry, settings: Settings, raw: bytes) -> dict[str, Any]:
    """What would run: the job as its plugin understands it, and its command line, if it has one."""
    from ourvidz_core.engine.context import EngineContext
    from ourvidz_core.engine.models import ModelCache
    from ourvidz_core.engine.protocol import encode_job

    payload = structure_payload(decode_message(raw))
    owned = registry.get(payload.type)
    job = owned.parse_job(payload)
    context = EngineContext(
        work_dir=settings.work_dir / "plan",
        models=ModelCache(),
        timeout_seconds=settings.job_timeouts_seconds.get(job.job_type, owned.job_type.timeout_seconds),
        device=settings.device,
    )
    command = owned.build_command(_as_if_fetched(job, context.work_dir), context)
    return {
        "job": encode_job(job),
        "job_type": converter.unstructure(owned.job_type),
        "plugin": owned.distribution,
        "reference_mode": job.reference_mode.value,
        "command": list(command.argv) if command else None,
        "runs": "as a command" if command else "in the engine process",
        "assets": [
            f"{owned.job_type.bucket}/{job.user_id}/{job.id}_{index}.{owned.job_type.file_extension}"
            for index in range(job.asset_count or 1)
        ],
    }


def _as_if_fetched(job: Job, directory: Path) -> Job:
    paths = {
        role: attrs.evolve(reference, path=directory / f"reference_{role}.png") for role, reference in job.references
    }
    return attrs.evolve(job, references=job.references.replace(paths))


def _progress() -> Show:
    from ourvidz_core.cli.progress import Show

    return Show()


def _run(settings: Settings, registry: Registry, raw: bytes, show: Show | None) -> Outcome:
    from ourvidz_core.cli.wiring import make_callbacks, make_machine
    from ourvidz_core.worker.reports import attempt_facts
    from ourvidz_core.worker.runner import Watch

    cancelled = threading.Event()
    signal.signal(signal.SIGINT, lambda *_: cancelled.set())
    signal.signal(signal.SIGTERM, lambda *_: cancelled.set())
    watch = Watch(cancelled=cancelled)
    with make_machine(settings, registry) as machine:
        if show is None:
            outcome = machine.runner.run(raw, attempts=attempt_facts(1, ()), watch=watch)
        else:
            with show:
                watch = attrs.evolve(watch, on_progress=show.step, on_job=show.job)
                outcome = machine.runner.run(raw, attempts=attempt_facts(1, ()), watch=watch)
    registry.report(outcome.as_event())
    if outcome.callback is not None:
        _deliver(make_callbacks(settings), outcome.callback, settings.callback_retry_seconds)
    return outcome


def _deliver(client: CallbackClient, callback: Callback, first_seconds: float) -> None:
    from ourvidz_core.delivery.callbacks import retry_delay

    for tried in range(1, _CALLBACK_TRIES + 1):
        try:
            client.send(f"{callback.job_id}-run", callback.job_id, callback.to_bytes())
            return
        except CallbackUndelivered as error:
            if tried == _CALLBACK_TRIES:
                raise
            delay = error.retry_after_seconds or retry_delay(tried, first_seconds=first_seconds, random=random.Random())
            click.echo(f"the callback was not accepted, next try in {delay:.0f} s: {error}", err=True)
            time.sleep(delay)


def _print_outcome(outcome: Outcome) -> None:
    if outcome.callback is not None:
        print_json(outcome.callback.to_json())
    for asset in outcome.assets:
        click.echo(f"{asset.bucket}/{asset.path}  {asset.size_bytes} bytes")
    if outcome.error is not None:
        click.echo(f"{outcome.error.error_type}: {outcome.error.message}", err=True)
