"""A thread that keeps a worker's entry on the board up to date."""

from __future__ import annotations

import logging
import threading
from collections import deque
from collections.abc import Callable

from ourvidz_core.delivery.board import HEARTBEAT_SECONDS, Board, FinishedJob, WorkerStatus
from ourvidz_core.wire.states import WorkerState

logger = logging.getLogger(__name__)

#: A job that counts ten steps a second is worth one word a second.
INTERVAL_SECONDS = 1.0
#: A model that loads says nothing, and fills the device meanwhile.
WORKING_SECONDS = 2.0
#: Ended jobs that wait while the board is away; of more, the oldest are not told.
_WAITING_RECORDS = 200
#: The end of a worker waits no longer for a board that does not answer.
_END_SECONDS = 4.0


class Publisher:
    """Says what the worker does when it has changed, and that it lives when it has not. Costs a job nothing."""

    def __init__(
        self,
        board: Board,
        status: Callable[[], WorkerStatus],
        *,
        tell_previews: Callable[[], None] = lambda: None,
        interval_seconds: float = INTERVAL_SECONDS,
        heartbeat_seconds: float = HEARTBEAT_SECONDS,
    ) -> None:
        self._board = board
        self._status = status
        self._tell_previews = tell_previews
        self._interval_seconds = interval_seconds
        self._heartbeat_seconds = heartbeat_seconds
        self._changed = threading.Event()
        self._closed = threading.Event()
        self._records: deque[FinishedJob] = deque(maxlen=_WAITING_RECORDS)
        self._is_away = False
        self._wait_seconds = heartbeat_seconds
        self._thread = threading.Thread(target=self._publish, name="board", daemon=True)

    def start(self) -> None:
        """Begin to publish."""
        self._thread.start()

    def note_change(self) -> None:
        """Something is not as it was."""
        self._changed.set()

    def add_finished(self, record: FinishedJob) -> None:
        """A job is over."""
        self._records.append(record)

    def close(self) -> None:
        """Tell what is left to be told, and take the worker off the board."""
        self._closed.set()
        self._changed.set()
        if self._thread.is_alive():
            self._thread.join(timeout=_END_SECONDS)

    def _publish(self) -> None:
        while not self._closed.is_set():
            self._changed.clear()
            self._say(self._tell_status)
            self._tell_finished()
            if not self._closed.wait(self._interval_seconds):
                self._changed.wait(max(self._wait_seconds - self._interval_seconds, 0.0))
        self._tell_finished()
        self._say(lambda: self._board.withdraw(self._status().name))

    def _tell_status(self) -> None:
        self._tell_previews()
        status = self._status()
        is_busy = status.jobs or status.state is WorkerState.STARTING
        self._wait_seconds = min(WORKING_SECONDS, self._heartbeat_seconds) if is_busy else self._heartbeat_seconds
        self._board.publish(status)

    def _tell_finished(self) -> None:
        while self._records:
            record = self._records[0]
            if not self._say(lambda record=record: self._board.finished(record)):  # type: ignore[misc]
                return
            if self._records and self._records[0] is record:
                self._records.popleft()

    def _say(self, say: Callable[[], None]) -> bool:
        try:
            say()
        except Exception as error:  # whatever ails the board is no trouble of the worker's
            if not self._is_away:
                logger.warning("the board is not up to date, jobs go on: %s", error)
            self._is_away = True
            return False
        self._is_away = False
        return True
