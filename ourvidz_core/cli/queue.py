"""``ourvidz queue`` and ``ourvidz cancel``: see what the queues hold, and put right what went wrong."""

from __future__ import annotations

import contextlib
import hashlib
import logging
import os
import socket
from collections.abc import Callable, Iterator, Sequence
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any, TypeVar

import attrs
import click

from ourvidz_core.cli.common import open_registry, open_settings, print_json, table
from ourvidz_core.errors import PayloadError, SettingsError
from ourvidz_core.wire.payloads import decode_message

if TYPE_CHECKING:
    from ourvidz_core.delivery.queue import DeadLetter, Queue, QueuedCallback

_SHOWN_CHARACTERS = 80
_LEASE_SECONDS = 60.0

Command = TypeVar("Command", bound=Callable[..., Any])
Item = TypeVar("Item")


def _common(function: Command) -> Command:
    as_json = click.option("--json", "as_json", is_flag=True, help="Print JSON.")
    queues = click.option("--queue", "queue_name", help="Only this queue; all that a plugin owns unless said.")
    return queues(as_json(function))


def _chosen(function: Command) -> Command:
    everything = click.option("--all", "is_all", is_flag=True, help="All there are.")
    return click.argument("ids", nargs=-1, metavar="[ID]...")(everything(_common(function)))


@click.group()
def queue() -> None:
    """See what the queues hold, and put right what went wrong."""


@queue.command()
@_common
def status(queue_name: str | None, as_json: bool) -> None:
    """Say how much each queue holds, and which worker has which job."""
    with _opened(queue_name) as (opened, names):
        depths = {name: opened.depth(name) for name in names}
        jobs = [job for name in names for job in opened.in_flight(name)]
    if as_json:
        print_json(
            {
                name: {
                    **attrs.asdict(depth),
                    "jobs": [attrs.asdict(job) for job in jobs if job.queue == name],
                }
                for name, depth in depths.items()
            }
        )
        return
    heads = ("waiting", "in flight", "retrying", "dead", "callbacks", "undelivered")
    click.echo(table(("queue", *heads), [(name, *attrs.astuple(depth)) for name, depth in depths.items()]))
    if jobs:
        click.echo()
        rows = [
            (job.key, job.queue, job.worker, job.attempt, "retry" if job.lease_left_seconds is None else "running")
            for job in jobs
        ]
        click.echo(table(("job", "queue", "worker", "attempt", "state"), rows))


@queue.command()
@click.option("--limit", default=10, show_default=True, help="How many of each queue.")
@_common
def peek(limit: int, queue_name: str | None, as_json: bool) -> None:
    """Show the next messages without taking them. Their ids and types; with --json the whole."""
    with _opened(queue_name) as (opened, names):
        messages = [(name, raw) for name in names for raw in opened.peek(name, limit)]
    if as_json:
        print_json([{"queue": name, "message": _message(raw)} for name, raw in messages])
        return
    rows = []
    for name, raw in messages:
        message = _message(raw)
        known = message if isinstance(message, dict) else {}
        rows.append((name, known.get("id", "-"), known.get("type", "-"), known.get("created_at", "-")))
    click.echo(table(("queue", "id", "type", "created at"), rows))


@queue.group()
def dead() -> None:
    """Messages that will not be tried again."""


@dead.command("list")
@_common
def list_dead(queue_name: str | None, as_json: bool) -> None:
    """List the messages that will not be tried again, newest first, with the reason."""
    with _opened(queue_name) as (opened, names):
        letters = [(name, letter) for name in names for letter in opened.dead_letters(name)]
    if as_json:
        print_json(
            [
                {
                    "id": _letter_id(letter),
                    "queue": name,
                    **attrs.asdict(letter, filter=lambda attribute, _: attribute.name != "raw"),
                    "message": _message(letter.raw),
                }
                for name, letter in letters
            ]
        )
        return
    rows = [
        (_letter_id(letter), name, letter.buried_at[:19], letter.error_type, _short(letter.reason))
        for name, letter in letters
    ]
    click.echo(table(("id", "queue", "buried at", "error", "reason"), rows))


@dead.command()
@_chosen
def requeue(ids: tuple[str, ...], is_all: bool, queue_name: str | None, as_json: bool) -> None:
    """Push dead messages again, byte for byte, although their ids may have ended."""
    with _opened(queue_name) as (opened, names):
        rows = [
            {"id": _letter_id(letter), "queue": name, "answer": opened.requeue(name, letter).value}
            for name, letter in _letters(opened, names, ids, is_all)
        ]
    _print_rows(rows, as_json)


@dead.command()
@_chosen
def drop(ids: tuple[str, ...], is_all: bool, queue_name: str | None, as_json: bool) -> None:
    """Throw dead messages away."""
    with _opened(queue_name) as (opened, names):
        rows = [
            {"id": _letter_id(letter), "queue": name, "answer": "done" if opened.drop(name, letter) else "absent"}
            for name, letter in _letters(opened, names, ids, is_all)
        ]
    _print_rows(rows, as_json)


@queue.group()
def outbox() -> None:
    """Callbacks that were not accepted yet."""


@outbox.command("list")
@_common
def list_outbox(queue_name: str | None, as_json: bool) -> None:
    """List the callbacks that wait and those that were given up, with the last answer's reason."""
    with _opened(queue_name) as (opened, names):
        callbacks = _callbacks(opened, names)
    if as_json:
        print_json(
            [
                {
                    **attrs.asdict(callback, filter=lambda attribute, _: attribute.name != "body"),
                    "is_given_up": is_given_up,
                    "body": _message(callback.body),
                }
                for callback, is_given_up in callbacks
            ]
        )
        return
    rows = [
        (
            callback.callback_id,
            callback.queue,
            "given up" if is_given_up else "waits",
            callback.failures,
            _moment(callback.first_tried_at),
            _short(callback.reason),
        )
        for callback, is_given_up in callbacks
    ]
    click.echo(table(("id", "queue", "state", "refusals", "first tried", "reason"), rows))


@outbox.command()
@_chosen
def replay(ids: tuple[str, ...], is_all: bool, queue_name: str | None, as_json: bool) -> None:
    """Send callbacks again now, under their own ids. IDs of callbacks or of jobs; a running worker sends them."""
    with _opened(queue_name) as (opened, names):
        known = [callback for callback, _ in _callbacks(opened, names)]
        wanted = _select(known, ids, is_all, lambda callback: (callback.callback_id, callback.job_id))
        rows = [
            {
                "id": callback.callback_id,
                "queue": callback.queue,
                "answer": "done" if opened.replay(callback) else "absent",
            }
            for callback in wanted
        ]
    _print_rows(rows, as_json)


@click.command()
@click.argument("ids", nargs=-1, required=True, metavar="ID...")
@_common
def cancel(ids: tuple[str, ...], queue_name: str | None, as_json: bool) -> int:
    """Stop jobs: a queued one at once, a running one within two seconds.

    Each is reported as failed with the error type JobCancelled. Ends with 1 when one of
    them is nowhere: it is over, or was never pushed.
    """
    delay = open_settings(at_least=logging.WARNING).callback_min_age_seconds
    with _opened(queue_name) as (opened, names):
        rows = [{"id": job_id, **_cancel(opened, names, job_id, delay)} for job_id in ids]
    _print_rows(rows, as_json)
    return 1 if any(row["answer"] == "absent" for row in rows) else 0


def _cancel(opened: Queue, names: Sequence[str], job_id: str, callback_delay: float) -> dict[str, str]:
    from ourvidz_core.delivery.queue import CancelState, QueuedCallback
    from ourvidz_core.errors import JobCancelled
    from ourvidz_core.worker.reports import unrun_report

    person = f"cancel-{socket.gethostname()}-{os.getpid()}"
    for name in names:
        cancellation = opened.cancel(name, job_id, worker=person, lease=_LEASE_SECONDS)
        if cancellation.state is CancelState.RUNNING:
            return {"queue": name, "answer": "a worker stops it"}
        claim = cancellation.claim
        if claim is not None:
            report = unrun_report(claim.raw, JobCancelled("the job was cancelled before it ran"), attempts={})
            callback = None
            if report is not None:
                callback = QueuedCallback(
                    queue=name,
                    callback_id=f"{report.job_id}-{claim.token}",
                    job_id=report.job_id,
                    body=report.to_bytes(),
                )
            opened.finish(claim, is_final=True, callback=callback, callback_delay=callback_delay)
            return {"queue": name, "answer": "taken out of the queue"}
    return {"queue": ", ".join(names), "answer": "absent"}


@contextlib.contextmanager
def _opened(queue_name: str | None) -> Iterator[tuple[Queue, Sequence[str]]]:
    from ourvidz_core.cli.wiring import make_queue

    settings = open_settings(at_least=logging.WARNING)
    # Naming a queue needs no plugin, so a machine without them can look after it, too.
    names = (queue_name,) if queue_name else open_registry(settings).queues
    if not names:
        raise SettingsError("no plugin with job types is loaded; name a queue with --queue")
    opened = make_queue(settings)
    try:
        yield opened, names
    finally:
        opened.close()


def _letters(opened: Queue, names: Sequence[str], ids: Sequence[str], is_all: bool) -> list[tuple[str, DeadLetter]]:
    known = [(name, letter) for name in names for letter in opened.dead_letters(name)]
    return _select(known, ids, is_all, lambda item: (_letter_id(item[1]),))


def _select(
    known: Sequence[Item], ids: Sequence[str], is_all: bool, ids_of: Callable[[Item], Sequence[str]]
) -> list[Item]:
    if is_all == bool(ids):
        raise click.UsageError("name ids, or give --all")
    if missing := set(ids) - {each for item in known for each in ids_of(item)}:
        raise SettingsError(f"there is no {', '.join(sorted(missing))}; the list command shows what there is")
    return [item for item in known if is_all or set(ids_of(item)) & set(ids)]


def _callbacks(opened: Queue, names: Sequence[str]) -> list[tuple[QueuedCallback, bool]]:
    waiting = [(callback, False) for name in names for callback in opened.waiting_callbacks(name)]
    return waiting + [(callback, True) for name in names for callback in opened.undelivered(name)]


def _letter_id(letter: DeadLetter) -> str:
    """The job's id, or something that a person can type where the message has none."""
    return letter.job_id or f"sha1:{hashlib.sha1(letter.raw, usedforsecurity=False).hexdigest()[:12]}"


def _message(raw: bytes) -> Any:
    try:
        return dict(decode_message(raw))
    except PayloadError:
        return raw.decode("utf-8", "replace")


def _moment(seconds: float) -> str:
    return datetime.fromtimestamp(seconds, UTC).isoformat(timespec="seconds") if seconds else "-"


def _short(text: str) -> str:
    return text if len(text) <= _SHOWN_CHARACTERS else text[: _SHOWN_CHARACTERS - 3] + "..."


def _print_rows(rows: Sequence[dict[str, str]], as_json: bool) -> None:
    if as_json:
        print_json(list(rows))
    else:
        for row in rows:
            click.echo(f"{row['id']} ({row['queue']}): {row['answer']}")
