"""What a receiver can tell of a callback with the Standard Webhooks library: forged, changed, replayed, or ours."""

from __future__ import annotations

import base64
import json
from collections.abc import Iterator, Mapping
from datetime import UTC, datetime, timedelta

import pytest
from standardwebhooks.webhooks import Webhook, WebhookVerificationError

from ourvidz_core.delivery.callbacks import HttpCallbacks, signature, webhook_signature
from ourvidz_core.testing.servers import ReceivedRequest, SupabaseServer

OLD, NEW, OTHER = ("whsec_" + base64.b64encode(key * 4).decode() for key in (b"old key.", b"new key.", b"strange."))
BODY = b'{"job_id": "job-1", "status": "completed"}'


@pytest.fixture
def supabase() -> Iterator[SupabaseServer]:
    with SupabaseServer() as server:
        yield server


def received(server: SupabaseServer, secret: str, previous: str = "", body: bytes = BODY) -> ReceivedRequest:
    HttpCallbacks(server.callback_url, key=server.key, secret=secret, previous_secret=previous).send(
        "callback-1", "job-1", body
    )
    return server.callbacks[-1]


def accepts(secret: str, body: bytes, headers: Mapping[str, str]) -> bool:
    try:
        Webhook(secret).verify(body, dict(headers))
    except WebhookVerificationError:
        return False
    return True


def test_a_receiver_of_standard_webhooks_accepts_what_we_send(supabase: SupabaseServer) -> None:
    request = received(supabase, NEW)
    assert Webhook(NEW).verify(request.body, dict(request.headers)) == json.loads(BODY)


@pytest.mark.parametrize("known", [OLD, NEW], ids=["the old secret", "the new secret"])
def test_during_a_rotation_either_secret_verifies_and_no_other(supabase: SupabaseServer, known: str) -> None:
    request = received(supabase, NEW, previous=OLD)
    assert accepts(known, request.body, request.headers)
    assert not accepts(OTHER, request.body, request.headers)


def test_after_a_rotation_the_old_secret_verifies_no_more(supabase: SupabaseServer) -> None:
    request = received(supabase, NEW)
    assert not accepts(OLD, request.body, request.headers)


@pytest.mark.parametrize("header", ["webhook-id", "webhook-timestamp"])
def test_a_callback_cannot_be_sent_again_as_another_one(supabase: SupabaseServer, header: str) -> None:
    request = received(supabase, NEW)
    later = str(int(request.headers["webhook-timestamp"]) + 60)
    changed = {"webhook-id": "callback-2", "webhook-timestamp": later}[header]
    assert not accepts(NEW, request.body, {**request.headers, header: changed})


def test_a_callback_that_was_kept_for_a_day_is_refused_for_its_age(supabase: SupabaseServer) -> None:
    yesterday = int((datetime.now(UTC) - timedelta(days=1)).timestamp())
    kept = {
        "webhook-id": "callback-1",
        "webhook-timestamp": str(yesterday),
        "webhook-signature": webhook_signature(NEW, "callback-1", yesterday, BODY),
    }
    with pytest.raises(WebhookVerificationError, match="too old"):
        Webhook(NEW).verify(BODY, kept)


@pytest.mark.parametrize("change", [b" ", b"completed", b"job-1"])
def test_a_body_that_was_changed_is_refused_by_either_signature(supabase: SupabaseServer, change: bytes) -> None:
    request = received(supabase, NEW)
    changed = request.body.replace(change, change.swapcase() if change.strip() else b"  ")
    assert changed != request.body
    assert not accepts(NEW, changed, request.headers)
    assert request.headers["x-callback-signature"] != signature(NEW, changed)


def test_a_try_that_comes_late_is_signed_for_its_own_time(supabase: SupabaseServer) -> None:
    first, second = (received(supabase, NEW) for _ in range(2))
    assert first.headers["webhook-id"] == second.headers["webhook-id"]
    assert accepts(NEW, second.body, second.headers)
