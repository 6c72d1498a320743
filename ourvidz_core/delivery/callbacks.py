"""Send a callback once and say truthfully what became of it. When to try again is the outbox's to decide."""

from __future__ import annotations

import base64
import errno
import hashlib
import hmac
import io
import os
import re
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from pathlib import Path
from random import Random
from typing import Protocol
from urllib.parse import parse_qsl, quote, urlsplit

import requests
from attrs import field, frozen
from requests.auth import AuthBase
from urllib3.exceptions import HTTPError

from ourvidz_core.delivery.deadlines import Deadline, read_start
from ourvidz_core.errors import CallbackError, CallbackRejected, CallbackUndelivered, SettingsError
from ourvidz_core.wire.payloads import ID_PATTERN

SIGNATURE_HEADER = "X-Callback-Signature"
#: The endpoint answers 400 to what may go through in a minute, too; only these are final.
PERMANENT_REFUSALS = ("job_id is required", "violates check constraint")
MAX_RETRY_AFTER_SECONDS = 3600.0
_LONGEST_WAIT_SECONDS = 300.0
#: Standard Webhooks: secrets of this form are base64 of the key's bytes; others are the key as text.
WEBHOOK_SECRET_PREFIX = "whsec_"  # noqa: S105 - the beginning of every such secret
#: An endpoint that answers one of these may know the other of two secrets.
_WRONG_SIGNATURE = (401, 403)
_ANSWER_BYTES = 64 * 1024
_SHOWN_CHARACTERS = 200
#: A shorter value, such as ``v=2``, is found in many a word by chance.
_SHORTEST_TOKEN = 6


MaySend = Callable[[], bool]


def always() -> bool:
    """For callbacks that may go out at any time."""
    return True


class CallbackClient(Protocol):
    """The way to the endpoint that learns of each job's outcome."""

    def send(self, callback_id: str, job_id: str, body: bytes, *, may_send: MaySend = always) -> None:
        """Send ``body`` as it is. Returns when it was accepted.

        ``callback_id`` is the same for every try of one callback. ``may_send`` is asked at the last
        moment; where it says no, the endpoint gets nothing that it could understand.

        :raises CallbackRejected: it never will be accepted.
        :raises CallbackUndelivered: it may be later; ``retry_after_seconds`` where the endpoint said when.
        """
        ...


def signature(secret: str, body: bytes) -> str:
    """The value of ``X-Callback-Signature`` for ``body``.

    >>> signature("secret", b"{}")[:20]
    'sha256=77325902caca8'
    """
    return "sha256=" + hmac.new(secret.encode(), body, hashlib.sha256).hexdigest()


def webhook_signature(secret: str, callback_id: str, timestamp: int, body: bytes) -> str:
    """One entry of ``webhook-signature``, as Standard Webhooks defines it.

    >>> webhook_signature("whsec_" + base64.b64encode(b"key").decode(), "msg_1", 1700000000, b"{}")
    'v1,XaXLFEFQ69Q4+demDWPEv5ydXczDW2mM5crCUEFcFBA='
    """
    key = secret.encode()
    if secret.startswith(WEBHOOK_SECRET_PREFIX):
        key = base64.b64decode(secret.removeprefix(WEBHOOK_SECRET_PREFIX))
    signed = hmac.new(key, f"{callback_id}.{timestamp}.".encode() + body, hashlib.sha256).digest()
    return "v1," + base64.b64encode(signed).decode()


def retry_delay(
    failures: int, *, first_seconds: float, ceiling_seconds: float = _LONGEST_WAIT_SECONDS, random: Random
) -> float:
    """How long to wait after ``failures`` tries in a row: doubling, somewhere between half and the whole of it.

    The spread keeps workers whose endpoint came back from all calling at once.
    """
    doublings = min(max(failures, 1) - 1, 64)
    whole = min(ceiling_seconds, first_seconds * 2**doublings)
    return random.uniform(whole / 2, whole)


class HttpCallbacks:
    """Callbacks as HTTP POSTs."""

    def __init__(
        self,
        url: str,
        *,
        key: str = "",
        secret: str = "",
        previous_secret: str = "",
        timeout_seconds: float = 15.0,
        session: requests.Session | None = None,
    ) -> None:
        self._url = url
        self._key = key
        self._secrets = tuple(value for value in (secret, previous_secret) if value)
        for value in self._secrets:
            _check_secret(value)
        #: An endpoint may repeat what it was sent; an error message may not.
        self._hidden = tuple(value for value in (key, *self._secrets, *_tokens_of(url)) if value)
        self._timeout_seconds = timeout_seconds
        self._session = session or requests.Session()

    def send(self, callback_id: str, job_id: str, body: bytes, *, may_send: MaySend = always) -> None:
        """See :meth:`CallbackClient.send`."""
        try:
            status, answer, retry_after = self._post(callback_id, body, self._secrets, may_send)
            if status in _WRONG_SIGNATURE and len(self._secrets) > 1:
                # X-Callback-Signature has room for one: an endpoint that was not told of the new secret gets the old.
                status, answer, retry_after = self._post(callback_id, body, self._secrets[::-1], may_send)
        except (requests.RequestException, HTTPError, OSError) as error:
            # The library's messages hold the URL, whose query may hold a token.
            raise CallbackUndelivered(
                f"the callback of job {job_id} was not delivered: the endpoint did not answer ({type(error).__name__})"
            ) from None
        if 200 <= status < 300:
            return
        said = " ".join(answer.decode("utf-8", "replace").split())
        for hidden in self._hidden:
            said = said.replace(hidden, "[hidden]")
        for refusal in PERMANENT_REFUSALS:
            if refusal in said:
                raise CallbackRejected(
                    f"the callback of job {job_id} is refused for good ({status}): {said[:_SHOWN_CHARACTERS]}"
                )
        if 300 <= status < 400:
            said = "it redirects, and callbacks follow no redirect; set OURVIDZ_CALLBACK_URL to the final address"
        reason = said[:_SHOWN_CHARACTERS] or "no reason given"
        raise CallbackUndelivered(
            f"the callback of job {job_id} was not accepted ({status}): {reason}",
            retry_after_seconds=retry_after,
        )

    def close(self) -> None:
        """Give up connections."""
        self._session.close()

    def _post(
        self, callback_id: str, body: bytes, secrets: Sequence[str], may_send: MaySend
    ) -> tuple[int, bytes, float | None]:
        headers = {"Content-Type": "application/json", "X-Callback-Id": callback_id}
        with (
            Deadline(self._timeout_seconds) as deadline,
            self._session.post(
                self._url,
                data=_LateBody(body, may_send),
                headers=headers,
                auth=_CallbackAuth(self._key, secrets, callback_id, body),
                timeout=self._timeout_seconds,
                allow_redirects=False,
                stream=True,
            ) as response,
        ):
            answer = read_start(response, limit_bytes=_ANSWER_BYTES, deadline=deadline)
            return response.status_code, answer, retry_after(response.headers.get("Retry-After"), datetime.now(UTC))


def retry_after(value: str | None, now: datetime) -> float | None:
    """The seconds that a ``Retry-After`` header asks for, at most an hour; None where it asks nothing sensible.

    >>> retry_after("120", datetime.now(UTC))
    120.0
    """
    text = (value or "").strip()
    if re.fullmatch(r"[0-9]{1,20}", text):
        return min(float(text), MAX_RETRY_AFTER_SECONDS)
    try:
        moment = parsedate_to_datetime(text)
    except (ValueError, TypeError, IndexError, OverflowError):
        return None
    if moment.tzinfo is None:
        moment = moment.replace(tzinfo=UTC)
    return min(max((moment - now).total_seconds(), 0.0), MAX_RETRY_AFTER_SECONDS)


@frozen
class DirectoryCallbacks:
    """Callbacks as files: each job's in ``{job_id}.jsonl``, a line each, in the order they came."""

    root: Path

    def send(
        self,
        callback_id: str,  # noqa: ARG002 - the protocol's
        job_id: str,
        body: bytes,
        *,
        may_send: MaySend = always,  # noqa: ARG002 - the protocol's
    ) -> None:
        """See :meth:`CallbackClient.send`."""
        if not ID_PATTERN.fullmatch(job_id):
            raise CallbackRejected(f"the job id {ascii(job_id)[:80]} cannot be the name of a file")
        # Between JSON's tokens a line break is a blank; inside a string it is never bare.
        line = b" ".join(body.splitlines()) + b"\n"
        try:
            self.root.mkdir(parents=True, exist_ok=True)
            _append(self.root / f"{job_id}.jsonl", line)
        except OSError as error:
            raise CallbackUndelivered(
                f"the callback of job {job_id} cannot be written to {self.root} ({error.strerror})"
            ) from None


@frozen(kw_only=True)
class SentCallback:
    """A callback as a client was given it."""

    callback_id: str
    job_id: str
    body: bytes


def _in_order(answers: Iterable[CallbackError | None]) -> Iterator[CallbackError | None]:
    return iter(answers)


@frozen
class RecordingCallbacks:
    """Callbacks in memory, for tests. ``answers`` scripts the first tries: an error is raised, None accepts.

    >>> callbacks = RecordingCallbacks([CallbackUndelivered("asleep"), None])
    """

    answers: Iterator[CallbackError | None] = field(default=(), converter=_in_order)
    #: Every try, accepted or not.
    attempts: list[SentCallback] = field(factory=list, init=False)
    accepted: list[SentCallback] = field(factory=list, init=False)

    def send(
        self,
        callback_id: str,
        job_id: str,
        body: bytes,
        *,
        may_send: MaySend = always,  # noqa: ARG002 - the protocol's
    ) -> None:
        """See :meth:`CallbackClient.send`."""
        sent = SentCallback(callback_id=callback_id, job_id=job_id, body=body)
        self.attempts.append(sent)
        error = next(self.answers, None)
        if error is not None:
            raise error
        self.accepted.append(sent)


class _CallbackAuth(AuthBase):
    """Key and signatures. As an auth object, since a netrc would overwrite a plain Authorization header."""

    def __init__(self, key: str, secrets: Sequence[str], callback_id: str, body: bytes) -> None:
        self._key = key
        self._body = body
        self._secrets = secrets
        # Standard Webhooks joins what it signs with dots; ours has none, and other clients' may.
        self._webhook_id = callback_id.replace(".", "-")

    def __call__(self, request: requests.PreparedRequest) -> requests.PreparedRequest:
        if self._key:
            request.headers["Authorization"] = f"Bearer {self._key}"
            request.headers["apikey"] = self._key
        timestamp = int(time.time())
        request.headers["webhook-id"] = self._webhook_id
        request.headers["webhook-timestamp"] = str(timestamp)
        if self._secrets:
            request.headers[SIGNATURE_HEADER] = signature(self._secrets[0], self._body)
            request.headers["webhook-signature"] = " ".join(
                webhook_signature(secret, self._webhook_id, timestamp, self._body) for secret in self._secrets
            )
        return request


class _LateBody:
    """A body that is asked for when the connection is open and the headers are out.

    A process that was frozen until then would send what is no longer true.
    """

    def __init__(self, body: bytes, may_send: MaySend) -> None:
        self._stream = io.BytesIO(body)
        self._size_bytes = len(body)
        self._may_send = may_send

    def __len__(self) -> int:
        return self._size_bytes

    def __iter__(self) -> Iterator[bytes]:
        yield self.read()

    def read(self, size: int = -1) -> bytes:
        if not self._may_send():
            raise OSError(errno.ECANCELED, "the callback may no longer be sent")
        return self._stream.read(size)


def _tokens_of(url: str) -> Iterator[str]:
    """What of an address is not for everybody: its query, and each value in it as it is and unescaped."""
    query = urlsplit(url).query
    yield query
    for _, value in parse_qsl(query):
        if len(value) >= _SHORTEST_TOKEN:
            yield from (value, quote(value, safe=""))


def _check_secret(secret: str) -> None:
    if secret.startswith(WEBHOOK_SECRET_PREFIX):
        try:
            base64.b64decode(secret.removeprefix(WEBHOOK_SECRET_PREFIX), validate=True)
        except ValueError:
            raise SettingsError(
                f"a callback secret begins with {WEBHOOK_SECRET_PREFIX} and the rest is no base64;"
                " copy it whole, or choose one without that beginning"
            ) from None


def _append(file: Path, line: bytes) -> None:
    descriptor = os.open(file, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o644)
    try:
        size = os.fstat(descriptor).st_size
        if size and os.pread(descriptor, 1, size - 1) != b"\n":
            line = b"\n" + line  # a crash or a full disk cut the line before this one
        if os.write(descriptor, line) != len(line):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
