"""Directories for jobs: one each, removed at the end, never anybody else's."""

from __future__ import annotations

import contextlib
import fcntl
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path


class Workspace:
    """A worker's own directory below the work root. What dead workers left there is removed."""

    def __init__(self, root: Path) -> None:
        root.mkdir(parents=True, exist_ok=True)
        with (root / "lock").open("w") as lock:
            # Making a directory and locking it are two steps; a sweep between them would remove it.
            fcntl.flock(lock, fcntl.LOCK_EX)
            _sweep(root)
            self.path = Path(tempfile.mkdtemp(prefix="worker-", dir=root))
            self._lock = (self.path / ".lock").open("w")
            fcntl.flock(self._lock, fcntl.LOCK_EX)

    @contextlib.contextmanager
    def job_directory(self) -> Iterator[Path]:
        """A new empty directory for one attempt at one job. Its name says nothing of the job's id."""
        directory = Path(tempfile.mkdtemp(prefix="job-", dir=self.path))
        try:
            yield directory
        finally:
            shutil.rmtree(directory, ignore_errors=True)

    def free_mb(self) -> float:
        """Free disk space, in MB of 10**6 bytes."""
        return shutil.disk_usage(self.path).free / 1e6

    def close(self) -> None:
        """Remove the worker's directory with all that is in it."""
        shutil.rmtree(self.path, ignore_errors=True)
        self._lock.close()


def _sweep(root: Path) -> None:
    for directory in root.glob("worker-*"):
        try:
            with (directory / ".lock").open("r+") as lock:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)  # a living worker holds it
        except BlockingIOError:
            continue
        except FileNotFoundError:
            pass
        shutil.rmtree(directory, ignore_errors=True)
