"""Outcomes on this machine's disk until the queue has them.

A generation that took minutes must not be lost because Redis went away for good just then,
or because the worker died between the last upload and the finish.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import logging
import os
import shutil
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Protocol

from attrs import frozen

from ourvidz_core.delivery.queue import Claim, DeadLetter, FinishAnswer, Queue, QueuedCallback
from ourvidz_core.delivery.rows import decode_callback, decode_dead_letter, encode_callback, encode_dead_letter

logger = logging.getLogger(__name__)


@frozen(kw_only=True)
class Ending:
    """How a job ended: what the queue is told of it."""

    claim: Claim
    is_final: bool
    callback: QueuedCallback | None = None
    callback_delay: float = 0.0
    dead_letter: DeadLetter | None = None

    def tell(self, queue: Queue) -> FinishAnswer:
        """Finish the job. Can be repeated: the queue knows a claim that it has finished."""
        return queue.finish(
            self.claim,
            is_final=self.is_final,
            callback=self.callback,
            callback_delay=self.callback_delay,
            dead_letter=self.dead_letter,
        )


class Spool(Protocol):
    """Where endings wait for the queue."""

    def keep(self, ending: Ending) -> None:
        """Put an ending where a crash does not reach it."""
        ...

    def forget(self, ending: Ending) -> None:
        """The queue has it."""
        ...

    def replay(self, queue: Queue) -> None:
        """Tell the queue what dead workers of this machine did not get to tell.

        :raises QueueError: it does not answer; everything is still there.
        """
        ...

    def free_mb(self) -> float:
        """Free disk space, in MB of 10**6 bytes."""
        ...

    def close(self) -> None:
        """Leave; what the queue does not have stays for the next worker of this machine."""
        ...


class DirectorySpool:
    """A file for each worker, a line for each ending. Thread-safe.

    It holds no more than the jobs that one worker has at once: the file is emptied
    whenever the queue has everything in it.
    """

    def __init__(self, directory: Path) -> None:
        directory.mkdir(parents=True, exist_ok=True)
        self._directory = directory
        self._lock = threading.Lock()
        self._waiting: set[tuple[str, int]] = set()
        with self._alone():
            # Making a file and locking it are two steps; a replay between them would remove it.
            descriptor, name = tempfile.mkstemp(prefix="worker-", suffix=".jsonl", dir=directory)
            self._file = os.fdopen(descriptor, "ab", buffering=0)
            fcntl.flock(self._file, fcntl.LOCK_EX)
        self._path = Path(name)
        _sync_directory(directory)

    def keep(self, ending: Ending) -> None:
        """See :meth:`Spool.keep`. A disk that takes nothing is said, and no reason not to tell the queue."""
        with self._lock:
            try:
                self._file.write(_encode(ending))
                os.fsync(self._file.fileno())
            except OSError as error:
                logger.warning("job %s is not in the spool: %s", ending.claim.key, error)
            self._waiting.add((ending.claim.queue, ending.claim.token))

    def forget(self, ending: Ending) -> None:
        with self._lock:
            self._waiting.discard((ending.claim.queue, ending.claim.token))
            if not self._waiting:
                self._file.truncate(0)  # after a crash a line is told twice, which the queue knows

    def replay(self, queue: Queue) -> None:
        for path in sorted(self._directory.glob("worker-*.jsonl")):
            with self._alone(), _abandoned(path) as lines:
                if lines is None:
                    continue
                for ending in filter(None, map(_decode, lines)):
                    answer = ending.tell(queue)
                    logger.warning("job %s ended before its worker did: %s", ending.claim.key, answer.value)
                path.unlink()

    def free_mb(self) -> float:
        return shutil.disk_usage(self._directory).free / 1e6

    def close(self) -> None:
        with self._alone(), self._lock:
            if not self._waiting:
                self._path.unlink(missing_ok=True)
            self._file.close()

    @contextlib.contextmanager
    def _alone(self) -> Iterator[None]:
        with (self._directory / "lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            yield


class NoSpool:
    """Keeps nothing: for tests, and for a queue that lives no longer than this process."""

    def keep(self, ending: Ending) -> None:
        """It is told to the queue, and that is all."""

    def forget(self, ending: Ending) -> None:
        """There is nothing to forget."""

    def replay(self, queue: Queue) -> None:
        """There is nothing to tell."""

    def free_mb(self) -> float:
        return float("inf")

    def close(self) -> None:
        """There is nothing to leave."""


@contextlib.contextmanager
def _abandoned(path: Path) -> Iterator[list[bytes] | None]:
    """The lines of a worker that is no more; None where it lives."""
    with path.open("rb") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield None
        else:
            yield file.read().splitlines()


def _encode(ending: Ending) -> bytes:
    claim, callback, letter = ending.claim, ending.callback, ending.dead_letter
    fields = {
        "queue": claim.queue,
        "key": claim.key,
        "token": claim.token,
        "attempt": claim.attempt,
        "is_final": ending.is_final,
        "callback": encode_callback(callback).decode() if callback else None,
        "dead_letter": encode_dead_letter(letter).decode() if letter else None,
    }
    return json.dumps(fields).encode() + b"\n"


def _decode(line: bytes) -> Ending | None:
    """The ending of a line; None for one that a crash or a full disk cut: its job runs again."""
    try:
        fields = json.loads(line)
    except ValueError:
        return None
    callback, letter = fields["callback"], fields["dead_letter"]
    return Ending(
        claim=Claim(
            queue=fields["queue"], key=fields["key"], token=fields["token"], attempt=fields["attempt"], raw=b""
        ),
        is_final=fields["is_final"],
        callback=decode_callback(fields["queue"], callback.encode()) if callback else None,
        dead_letter=decode_dead_letter(letter.encode()) if letter else None,
    )


def _sync_directory(directory: Path) -> None:
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
