"""A rank beside the engine, as it sees itself: does what rank 0 asks for, and ends when rank 0 is gone.

Its program is ``follow(descriptor, work)``; :class:`ourvidz_core.engine.ranks.Followers` starts it.
"""

from __future__ import annotations

import json
import os
import queue
import sys
import threading
import time
import traceback
from collections.abc import Callable, Sequence
from contextlib import suppress
from multiprocessing.connection import Connection
from typing import Any, NoReturn

#: Says that the process is there and not stopped.
BEAT_SECONDS = 1.0

Message = dict[str, Any]


class Follower:
    """What the work of a rank has to do with rank 0."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection
        self._sending = threading.Lock()
        self._messages: queue.SimpleQueue[Message] = queue.SimpleQueue()
        threading.Thread(target=self._listen, name="follower-listen", daemon=True).start()
        threading.Thread(target=self._beat, name="follower-beat", daemon=True).start()

    def take(self) -> Message:
        """What rank 0 says next; waits for it."""
        return self._messages.get()

    @property
    def is_called(self) -> bool:
        """Whether rank 0 has said more than was taken."""
        return not self._messages.empty()

    def say(self, *, blobs: Sequence[bytes] = (), **message: Any) -> None:
        """Answer rank 0. Any thread may."""
        with self._sending:
            say(self._connection, blobs=blobs, **message)

    def give_up(self, error: BaseException) -> None:
        """Tell rank 0 that there is no going on, and why. Any thread may."""
        with suppress(OSError):
            self.say(kind="failed", error_type=type(error).__name__, message=str(error))

    def _listen(self) -> None:
        while True:
            try:
                self._messages.put(hear(self._connection))
            except (EOFError, OSError):
                # Rank 0 is gone, and an exchange with it would never end.
                os._exit(0)

    def _beat(self) -> None:
        while True:
            time.sleep(BEAT_SECONDS)
            try:
                self.say(kind="alive")
            except OSError:
                os._exit(0)


def follow(descriptor: int, work: Callable[[Follower], None]) -> NoReturn:
    """Be a rank for the process that has the other end of the pipe ``descriptor``, and end with ``work``.

    What goes wrong is said, and ends the process.
    """
    os.set_inheritable(descriptor, False)
    follower = Follower(Connection(descriptor))
    try:
        work(follower)
    except BaseException as error:
        follower.give_up(error)
        traceback.print_exc()
        sys.stderr.flush()
        # At once: an interpreter that ends in order waits for exchanges that nobody joins any more.
        os._exit(1)
    os._exit(0)


def say(connection: Connection, *, blobs: Sequence[bytes] = (), **message: Any) -> None:
    """Send one message, and bytes that come along with it; an ``OSError`` says that the other end is gone."""
    counted = {**message, "blobs": len(blobs)} if blobs else message
    connection.send_bytes(json.dumps(counted).encode())
    for blob in blobs:
        connection.send_bytes(blob)


def hear(connection: Connection, *, on_piece: Callable[[], None] = lambda: None) -> Message:
    """Read one message, its ``blobs`` as bytes; an ``EOFError`` or ``OSError`` says that the other end is gone.

    ``on_piece`` is told of the message and of each of its blobs as it has come.
    """
    message: Message = json.loads(connection.recv_bytes())
    on_piece()
    if "blobs" in message:
        blobs = message["blobs"] = [b""] * message["blobs"]
        for index in range(len(blobs)):
            blobs[index] = connection.recv_bytes()
            on_piece()
    return message
