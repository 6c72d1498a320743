"""Keeps the page's sections up to date while somebody looks, and wakes those who wait for a change."""

from __future__ import annotations

import contextlib
import json
import logging
import threading
import time
from collections.abc import Iterator, Mapping

from ourvidz_core.dashboard.overview import Reader
from ourvidz_core.dashboard.sections import sections_of
from ourvidz_core.delivery.board import StoredAsset
from ourvidz_core.errors import QueueError
from ourvidz_core.redaction import redact

logger = logging.getLogger(__name__)

INTERVAL_SECONDS = 1.0
#: A section that says why the others are as old as they are; empty text while all is well.
TROUBLE = "trouble"


class Feed:
    """Sections with a version each, which rises when one changes. Thread-safe.

    Redis is asked by one thread however many look on, and by none while nobody does.
    """

    def __init__(self, reader: Reader, *, interval_seconds: float = INTERVAL_SECONDS) -> None:
        self._reader = reader
        self._interval_seconds = interval_seconds
        self._reading = threading.Lock()
        self._read_at = float("-inf")
        self._changed = threading.Condition()
        self._sections: dict[str, tuple[int, bytes]] = {}
        self._assets: dict[tuple[str, str], StoredAsset] = {}
        self._queues: frozenset[str] = frozenset()
        self._running: frozenset[str] = frozenset()
        self._watchers = 0
        self._is_closed = False
        self._thread = threading.Thread(target=self._follow, name="feed", daemon=True)
        self._thread.start()

    @contextlib.contextmanager
    def watched(self) -> Iterator[None]:
        """Keep up to date for as long as the block runs."""
        self._refresh()
        with self._changed:
            self._watchers += 1
            self._changed.notify_all()
        try:
            yield
        finally:
            with self._changed:
                self._watchers -= 1

    def changes(self, seen: Mapping[str, int], timeout_seconds: float) -> dict[str, tuple[int, bytes]] | None:
        """Sections of another version than ``seen``, waited for; none after the time, None when the feed has ended."""
        with self._changed:
            self._changed.wait_for(lambda: self._is_closed or self._newer(seen), timeout_seconds)
            return None if self._is_closed else self._newer(seen)

    def sections(self) -> dict[str, bytes]:
        """All sections, as they are now."""
        self._refresh()
        with self._changed:
            return {name: body for name, (_, body) in self._sections.items()}

    def queues(self) -> frozenset[str]:
        """The queues that are looked at."""
        self._refresh()
        return self._queues

    def asset(self, bucket: str, path: str) -> StoredAsset | None:
        """The asset of a recent job that lies there, if one does."""
        if (bucket, path) not in self._assets:
            self._refresh()
        return self._assets.get((bucket, path))

    def runs(self, job_id: str) -> bool:
        """Whether a worker has the job."""
        self._refresh()
        return job_id in self._running

    def look_again(self) -> None:
        """Something was changed through us: read it at once."""
        self._refresh(at_least_after=0.0)

    def close(self) -> None:
        """Ask Redis no more, and let everybody go who waits."""
        with self._changed:
            self._is_closed = True
            self._changed.notify_all()
        self._thread.join(timeout=5.0)

    def _newer(self, seen: Mapping[str, int]) -> dict[str, tuple[int, bytes]]:
        return {name: (version, body) for name, (version, body) in self._sections.items() if seen.get(name) != version}

    def _follow(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._is_closed or self._watchers)
                if self._is_closed:
                    return
            self._refresh()
            with self._changed:
                self._changed.wait_for(lambda: self._is_closed, self._interval_seconds)

    def _refresh(self, at_least_after: float | None = None) -> None:
        """Read, unless somebody else has just done so."""
        pause = self._interval_seconds / 2 if at_least_after is None else at_least_after
        with self._reading:
            if time.monotonic() - self._read_at < pause:
                return
            try:
                overview = self._reader.read()
                sections = {**sections_of(overview), TROUBLE: b'""'}
                self._queues = frozenset(overview.queues)
                self._running = frozenset(job.id for worker in overview.workers for job in worker.jobs)
                self._assets = {(asset.bucket, asset.path): asset for job in overview.recent for asset in job.assets}
            except QueueError as error:
                logger.warning("the dashboard shows what was true before: %s", error)
                said = f"{redact(str(error))}. What is shown was true before."
                sections = {TROUBLE: json.dumps(said).encode()}
            self._read_at = time.monotonic()
            with self._changed:
                for name, body in sections.items():
                    version, known = self._sections.get(name, (0, b""))
                    if body != known:
                        self._sections[name] = (version + 1, body)
                self._changed.notify_all()
