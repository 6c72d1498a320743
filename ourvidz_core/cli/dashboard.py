"""``ourvidz dashboard``: a page that shows queues, workers and jobs as they go, for a browser."""

from __future__ import annotations

import contextlib
import logging
import signal
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

import click

from ourvidz_core.cli.common import open_registry, open_settings
from ourvidz_core.errors import SettingsError
from ourvidz_core.settings import Settings

if TYPE_CHECKING:
    from ourvidz_core.dashboard.overview import Reader


@click.command()
@click.option("--listen", default="127.0.0.1:8765", show_default=True, metavar="HOST:PORT", help="Where it is served.")
@click.option(
    "--token-file",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    help="File with the token that visitors must know; needed wherever others than this machine can connect.",
)
@click.option(
    "--host",
    "hosts",
    multiple=True,
    metavar="NAME",
    help="A name under which browsers reach it, such as that of a proxy; may be given repeatedly.",
)
@click.option(
    "--queues", help="Queues to show, comma-separated; all that a plugin owns or a worker serves unless said."
)
def dashboard(listen: str, token_file: Path | None, hosts: tuple[str, ...], queues: str | None) -> None:
    """Serve a page with queues, running jobs, results, failures and dead letters, until Ctrl-C.

    It reads Redis and storage by the settings of the workers. The one thing that it changes
    is what a visitor asks for: a dead letter runs again.
    """
    from ourvidz_core.cli.wiring import make_storage
    from ourvidz_core.dashboard.access import Access, check_token, is_loopback, parse_address
    from ourvidz_core.dashboard.feed import Feed
    from ourvidz_core.dashboard.previews import Previews
    from ourvidz_core.dashboard.server import Dashboard, DashboardServer
    from ourvidz_core.redaction import redact

    address = parse_address(listen)
    token = check_token(token_file.read_text("utf-8"), str(token_file)) if token_file else ""
    if not token and not is_loopback(address[0]):
        raise SettingsError(
            f"--listen {listen} opens the dashboard to others than this machine, so it needs a --token-file"
        )
    settings = open_settings(at_least=logging.WARNING)
    redact.add_secrets([token])
    with opened_reader(settings, queues) as reader, contextlib.closing(make_storage(settings)) as storage:
        feed = Feed(reader)
        parts = Dashboard(
            feed=feed,
            access=Access(token=token, hosts=hosts),
            previews=Previews(feed, storage, reader.preview),
            requeue=reader.requeue,
            media_origins=_origins(settings),
        )
        try:
            with contextlib.closing(feed), contextlib.closing(DashboardServer(address, parts)) as server:
                click.echo(f"the dashboard is at {server.url}/ (Ctrl-C ends it)")
                _wait_for_a_signal()
        except OSError as error:
            raise SettingsError(f"--listen {listen} cannot be had: {error.strerror or error}") from None


def _wait_for_a_signal() -> None:
    ended = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        # A thread of its own: a handler that takes a lock its own thread holds would wait for ever.
        signal.signal(number, lambda *_: threading.Thread(target=ended.set).start())
    ended.wait()


@contextlib.contextmanager
def opened_reader(settings: Settings, queues: str | None) -> Iterator[Reader]:
    """A reader of the queues that are named with commas between, or of those that plugins own."""
    from ourvidz_core.cli.wiring import make_board, make_queue
    from ourvidz_core.dashboard.overview import Reader

    names: Sequence[str] = [name.strip() for name in (queues or "").split(",") if name.strip()]
    with (
        contextlib.closing(make_queue(settings)) as queue,
        contextlib.closing(make_board(settings)) as board,
    ):
        yield Reader(queue, board, names or open_registry(settings).queues)


def _origins(settings: Settings) -> tuple[str, ...]:
    """Where a browser may be sent for a preview."""
    if not settings.supabase_url:
        return ()
    parts = urlsplit(settings.supabase_url)
    return (f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}",)
