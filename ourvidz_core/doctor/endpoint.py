"""What the doctor asks of the callback endpoint: whether somebody answers, with nothing that could be a callback."""

from __future__ import annotations

import ipaddress
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import urlsplit

import requests
from urllib3.exceptions import HTTPError

from ourvidz_core.delivery.storage import writing_to
from ourvidz_core.errors import StorageError
from ourvidz_core.wire.findings import Check, Finding

#: A POST might be taken for a job's callback, whatever it says; OPTIONS asks what may be sent and is no message.
METHOD = "OPTIONS"
_NOT_IMPLEMENTED = 501


def endpoint_checks(url: str | None, directory: Path, *, is_signed: bool, timeout_seconds: float) -> list[Check]:
    """The check of the endpoint at ``url``, or of the directory that stands in for one."""
    if url is None:
        return [Check(name="callback endpoint", run=lambda: _look_at_directory(directory))]
    return [
        Check(
            name="callback endpoint",
            run=lambda: _ask(url, is_signed=is_signed, timeout_seconds=timeout_seconds),
            timeout_seconds=timeout_seconds + 5.0,
        )
    ]


def _ask(url: str, *, is_signed: bool, timeout_seconds: float) -> Iterator[Finding]:
    shown = urlsplit(url)._replace(query="", fragment="", netloc=urlsplit(url).netloc.rpartition("@")[2]).geturl()
    try:
        with requests.request(METHOD, url, timeout=timeout_seconds, allow_redirects=False, stream=True) as response:
            status = response.status_code
    except requests.exceptions.SSLError:
        yield Finding.red(
            f"{shown}: its certificate is not accepted",
            cure="renew the endpoint's certificate, or name the host that it is for in OURVIDZ_CALLBACK_URL",
        )
        return
    except (requests.RequestException, HTTPError, OSError, UnicodeError) as error:
        # The library's messages hold the URL, whose query may hold a token.
        yield Finding.red(
            f"{shown} does not answer ({type(error).__name__}); callbacks wait in the queue's books meanwhile",
            cure="start the endpoint, or correct OURVIDZ_CALLBACK_URL (or SUPABASE_URL)",
        )
        return
    yield _judged(shown, status)
    if shown.startswith("http://") and not _is_local(urlsplit(url).hostname or ""):
        yield Finding.yellow(
            "callbacks and the key go out unencrypted", cure="use an https:// address in OURVIDZ_CALLBACK_URL"
        )
    if not is_signed:
        yield Finding.yellow(
            "callbacks are not signed: an endpoint cannot tell them from anybody else's",
            cure="set OURVIDZ_CALLBACK_SECRET to the secret that the endpoint checks X-Callback-Signature with",
        )


def _judged(shown: str, status: int) -> Finding:
    if 300 <= status < 400:
        return Finding.red(
            f"{shown} redirects ({status}), and callbacks follow no redirect",
            cure="set OURVIDZ_CALLBACK_URL to the final address",
        )
    if status >= 500 and status != _NOT_IMPLEMENTED:
        return Finding.yellow(
            f"{shown} answers {METHOD} with {status}", cure="look at the endpoint's own log; callbacks are tried again"
        )
    if status == 404:
        return Finding.yellow(
            f"{shown} answers {METHOD} with 404: the function may not be deployed",
            cure="deploy the endpoint, or correct the path in OURVIDZ_CALLBACK_URL",
        )
    return Finding.green(
        f"{shown} answers {METHOD} with {status}; nothing was posted, so its key and signature were not tried"
    )


def _look_at_directory(directory: Path) -> Iterator[Finding]:
    try:
        with writing_to(directory, "a callback"):
            directory.mkdir(parents=True, exist_ok=True)
    except StorageError as error:
        yield Finding.red(error.message, cure="name a directory in OURVIDZ_CALLBACK_DIR that this user may write to")
        return
    yield Finding.green(f"callbacks are written to {directory}; set OURVIDZ_CALLBACK_URL to send them")


def _is_local(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
