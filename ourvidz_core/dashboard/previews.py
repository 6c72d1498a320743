"""Shows the assets of recent jobs and the previews of running ones, and nothing else that storage or Redis holds."""

from __future__ import annotations

import contextlib
import os
import re
import stat
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO

from attrs import frozen

from ourvidz_core.dashboard.feed import Feed
from ourvidz_core.dashboard.sections import SHOWN_MEDIA
from ourvidz_core.delivery.storage import Storage, ViewableStorage
from ourvidz_core.errors import StorageError
from ourvidz_core.wire.previews import is_preview

_RANGE = re.compile(r"bytes=(\d{0,18})-(\d{0,18})")


@frozen(kw_only=True)
class Preview:
    """An asset that may be shown."""

    media_type: str
    #: A file of this machine, or an address that shows it for a while.
    source: Path | str


class Previews:
    """Finds assets and previews by the way that the page names them."""

    def __init__(self, feed: Feed, storage: Storage, preview: Callable[[str], bytes | None]) -> None:
        self._feed = feed
        self._storage = storage
        self._preview = preview

    def find(self, bucket: str, path: str) -> Preview | None:
        """The asset, or None where no recent job left one there, or its storage cannot show it."""
        asset = self._feed.asset(bucket, path)
        if asset is None or asset.media_type not in SHOWN_MEDIA or not isinstance(self._storage, ViewableStorage):
            return None
        try:
            # The board is as trustworthy as whoever can write to Redis: storage checks the place again.
            return Preview(media_type=asset.media_type, source=self._storage.view(bucket, path))
        except StorageError:
            return None

    def of_running(self, job_id: str) -> bytes | None:
        """The newest preview of a job, a JPEG; None where it has none or runs no more.

        :raises QueueError: Redis does not answer.
        """
        content = self._preview(job_id) if self._feed.runs(job_id) else None
        return content if content is not None and is_preview(content) else None


@contextlib.contextmanager
def opened(path: Path) -> Iterator[tuple[IO[bytes], int]]:
    """A plain file and its size in bytes.

    :raises OSError: it is not there, or is something else.
    """
    descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
    with os.fdopen(descriptor, "rb") as file:
        facts = os.fstat(file.fileno())
        if not stat.S_ISREG(facts.st_mode):
            raise OSError(f"{path.name} is no plain file")
        yield file, facts.st_size


def wanted_range(header: str, size: int) -> tuple[int, int] | None:
    """First byte and the one after the last of a Range header, or None where the whole is to be sent.

    :raises ValueError: nothing of the file lies in it.
    """
    found = _RANGE.fullmatch(header.strip())
    if found is None or not (found[1] or found[2]):
        return None
    if found[1]:
        first, end = int(found[1]), min(int(found[2]) + 1, size) if found[2] else size
        if found[2] and int(found[2]) < first:
            return None
    else:
        first, end = max(size - int(found[2]), 0), size
    if first >= size or first >= end:
        raise ValueError(f"the file has {size} bytes")
    return first, end
