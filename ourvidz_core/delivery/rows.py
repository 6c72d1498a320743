"""Callbacks and dead letters as the bytes that Redis and the spool keep."""

from __future__ import annotations

import base64
import json

import attrs

from ourvidz_core.delivery.queue import DeadLetter, QueuedCallback


def encode_callback(callback: QueuedCallback) -> bytes:
    """Everything of a callback but its queue, as JSON."""
    fields = attrs.asdict(callback, filter=lambda attribute, _: attribute.name not in ("queue", "body"))
    return json.dumps({**fields, "body": callback.body.decode()}).encode()


def decode_callback(queue: str, row: bytes) -> QueuedCallback:
    """The callback that :func:`encode_callback` wrote."""
    fields = json.loads(row)
    return QueuedCallback(queue=queue, **{**fields, "body": fields["body"].encode()})


def encode_dead_letter(letter: DeadLetter) -> bytes:
    """A dead letter as JSON, readable where the message is text."""
    # The message is whatever a producer sent: text where it is text, so that a person can read it.
    try:
        raw = {"raw": letter.raw.decode()}
    except UnicodeDecodeError:
        raw = {"raw_base64": base64.b64encode(letter.raw).decode()}
    fields = attrs.asdict(letter, filter=lambda attribute, _: attribute.name != "raw")
    return json.dumps({**fields, **raw}).encode()


def decode_dead_letter(entry: bytes) -> DeadLetter:
    """The dead letter that :func:`encode_dead_letter` wrote."""
    fields = json.loads(entry)
    encoded = fields.pop("raw_base64", None)
    raw = base64.b64decode(encoded) if encoded is not None else fields["raw"].encode()
    return DeadLetter(**{**fields, "raw": raw})
