"""POSTs the specification's worker and completion records, beside the work: what is not taken is dropped."""

from __future__ import annotations

import json
import logging
import queue
import threading
from collections.abc import Mapping
from typing import Any, Protocol

import requests
from attrs import field, frozen
from requests.auth import AuthBase

logger = logging.getLogger(__name__)

#: Records that wait; of more, the newest are dropped.
_WAITING_RECORDS = 1000
_TIMEOUT_SECONDS = 5.0


class UsageSink(Protocol):
    """What takes records."""

    #: Records that were not taken.
    dropped: int

    def put(self, record: Mapping[str, Any]) -> None:
        """Take one. Returns at once and never fails."""
        ...


class NoUsage:
    """Takes records to nowhere."""

    dropped = 0

    def put(self, record: Mapping[str, Any]) -> None:
        """It is not wanted."""


class HttpUsage:
    """A thread that POSTs records to one URL, one at a time and each once."""

    def __init__(self, url: str, *, key: str = "", timeout_seconds: float = _TIMEOUT_SECONDS) -> None:
        self._url = url
        self._timeout_seconds = timeout_seconds
        self._session = requests.Session()
        self._session.headers["Content-Type"] = "application/json"
        if key:
            # As an auth object, since a netrc would overwrite a plain header.
            self._session.auth = _Bearer(key)
        self._waiting: queue.Queue[Mapping[str, Any] | None] = queue.Queue(_WAITING_RECORDS)
        self._is_away = False
        self._closed = threading.Event()
        #: Those that the endpoint did not take, and those that found no room to wait.
        self.dropped = 0
        self._thread = threading.Thread(target=self._send_all, name="usage", daemon=True)
        self._thread.start()

    def put(self, record: Mapping[str, Any]) -> None:
        """See :meth:`UsageSink.put`."""
        try:
            self._waiting.put_nowait(record)
        except queue.Full:
            self.dropped += 1

    def close(self, timeout: float = 3.0) -> None:
        """Send what waits, for as long as the time allows."""
        try:
            self._waiting.put_nowait(None)
        except queue.Full:
            self._closed.set()
        self._thread.join(timeout)
        self._closed.set()
        self._session.close()

    def _send_all(self) -> None:
        while not self._closed.is_set() and (record := self._waiting.get()) is not None:
            try:
                answer = self._session.post(
                    self._url, data=json.dumps(record), timeout=self._timeout_seconds, allow_redirects=False
                )
                answer.raise_for_status()
                if answer.is_redirect:
                    raise requests.HTTPError(f"it answered {answer.status_code}, and redirects are not followed")
                self._is_away = False
            except (requests.RequestException, ValueError) as error:
                self.dropped += 1
                if not self._is_away:
                    logger.warning("records of usage are dropped: %s", error)
                self._is_away = True


@frozen
class _Bearer(AuthBase):
    """The key of each request."""

    key: str = field(repr=False)

    def __call__(self, request: requests.PreparedRequest) -> requests.PreparedRequest:
        request.headers["Authorization"] = f"Bearer {self.key}"
        return request
