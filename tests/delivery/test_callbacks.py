"""Callbacks: the bytes that go out, and what each answer means."""

from __future__ import annotations

import base64
import hashlib
import hmac
import json
import time
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from pathlib import Path
from random import Random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ourvidz_core.delivery.callbacks import (
    CallbackClient,
    DirectoryCallbacks,
    HttpCallbacks,
    RecordingCallbacks,
    SentCallback,
    retry_after,
    retry_delay,
    signature,
    webhook_signature,
)
from ourvidz_core.errors import CallbackRejected, CallbackUndelivered, SettingsError
from ourvidz_core.testing.servers import Answer, FileServer, SupabaseServer
from ourvidz_core.wire.callbacks import Callback, JobStatus

BODY = Callback(job_id="job-1", status=JobStatus.COMPLETED, assets=("u/job-1_0.png",)).to_bytes()


def client_for(
    server: SupabaseServer, *, secret: str = "", previous_secret: str = "", timeout_seconds: float = 5
) -> HttpCallbacks:
    return HttpCallbacks(
        server.callback_url,
        key=server.key,
        secret=secret,
        previous_secret=previous_secret,
        timeout_seconds=timeout_seconds,
    )


def send(client: CallbackClient, body: bytes = BODY) -> None:
    client.send("callback-1", "job-1", body)


def undelivered(client: CallbackClient) -> CallbackUndelivered:
    with pytest.raises(CallbackUndelivered) as caught:
        send(client)
    return caught.value


def test_a_callback_arrives_byte_for_byte(supabase: SupabaseServer) -> None:
    body = json.dumps({"job_id": "job-1", "prompt": "Köln \u2028 \U0001f600"}, ensure_ascii=False).encode()

    send(client_for(supabase), body)

    (received,) = supabase.callbacks
    assert received.body == body
    assert received.headers["content-type"] == "application/json"
    assert received.headers["authorization"] == f"Bearer {supabase.key}"
    assert received.headers["apikey"] == supabase.key
    assert received.headers["x-callback-id"] == "callback-1"
    assert not {"x-callback-signature", "webhook-signature"} & set(received.headers)


def test_a_secret_signs_the_raw_body(supabase: SupabaseServer) -> None:
    send(client_for(supabase, secret="s3cret"))

    (received,) = supabase.callbacks
    expected = hmac.new(b"s3cret", received.body, hashlib.sha256).hexdigest()
    assert received.headers["x-callback-signature"] == f"sha256={expected}" == signature("s3cret", BODY)


def test_a_standard_webhooks_library_accepts_the_callback(supabase: SupabaseServer) -> None:
    key = b"\x00\xffa key of any bytes"
    send(client_for(supabase, secret="whsec_" + base64.b64encode(key).decode()))

    (received,) = supabase.callbacks
    headers = received.headers
    assert headers["webhook-id"] == "callback-1"
    assert abs(int(headers["webhook-timestamp"]) - time.time()) < 5
    signed = b".".join([headers["webhook-id"].encode(), headers["webhook-timestamp"].encode(), received.body])
    expected = base64.b64encode(hmac.new(key, signed, hashlib.sha256).digest()).decode()
    assert headers["webhook-signature"] == f"v1,{expected}"


def test_a_webhook_id_has_no_dots_and_stays_the_same(supabase: SupabaseServer) -> None:
    client = client_for(supabase, secret="s3cret")
    for _ in range(2):
        client.send("a.b", "job-1", BODY)

    assert [received.headers["webhook-id"] for received in supabase.callbacks] == ["a-b", "a-b"]


def test_both_secrets_sign_while_one_takes_the_others_place(supabase: SupabaseServer) -> None:
    send(client_for(supabase, secret="new", previous_secret="old"))

    (received,) = supabase.callbacks
    headers = received.headers
    stamp = int(headers["webhook-timestamp"])
    assert headers["webhook-signature"].split() == [
        webhook_signature(secret, "callback-1", stamp, BODY) for secret in ("new", "old")
    ]
    assert headers["x-callback-signature"] == signature("new", BODY)


def test_an_endpoint_that_only_knows_the_old_secret_gets_it_at_once(supabase: SupabaseServer) -> None:
    supabase.fail_next("callback", status=401)
    send(client_for(supabase, secret="new", previous_secret="old"))

    tried = [request.headers["x-callback-signature"] for request in supabase.requests]
    assert tried == [signature("new", BODY), signature("old", BODY)]


def test_a_secret_that_was_copied_in_part_is_a_setting_error() -> None:
    with pytest.raises(SettingsError, match="no base64"):
        HttpCallbacks("http://127.0.0.1:1", secret="whsec_abc%")


def test_what_may_not_be_sent_any_more_when_the_connection_is_open_is_not_taken(supabase: SupabaseServer) -> None:
    with pytest.raises(CallbackUndelivered):
        client_for(supabase).send("callback-1", "job-1", BODY, may_send=lambda: False)

    assert supabase.callbacks == []


def test_an_endpoint_without_a_key_gets_none(supabase: SupabaseServer) -> None:
    with FileServer({"/hook": b"ok"}) as server:
        send(HttpCallbacks(f"{server.url}/hook"))

    assert not {"authorization", "apikey"} & set(server.requests[0].headers)


@pytest.mark.parametrize("status", [200, 201, 202, 204])
def test_any_success_is_success(status: int, supabase: SupabaseServer) -> None:
    supabase.fail_next("callback", status=status)

    send(client_for(supabase))


@pytest.mark.parametrize("status", [400, 401, 403, 404, 409, 422, 429, 500, 503])
def test_every_other_answer_may_pass(status: int, supabase: SupabaseServer) -> None:
    supabase.fail_next("callback", status=status, body=b'{"error": "no  linked\\n row"}')

    error = undelivered(client_for(supabase))

    assert f"({status})" in str(error)
    assert "job-1" in str(error)
    assert "linked" in str(error)
    assert error.retry_after_seconds is None
    send(client_for(supabase))


@pytest.mark.parametrize("status", [400, 500])
@pytest.mark.parametrize(
    "said", ["job_id is required", 'new row for relation "jobs" violates check constraint "jobs_status_check"']
)
def test_two_answers_are_final(status: int, said: str, supabase: SupabaseServer) -> None:
    supabase.fail_next("callback", status=status, body=json.dumps({"error": said}).encode())

    with pytest.raises(CallbackRejected, match="for good"):
        send(client_for(supabase))


def test_success_is_success_whatever_its_body_says(supabase: SupabaseServer) -> None:
    supabase.fail_next("callback", status=200, body=b"job_id is required")

    send(client_for(supabase))


def test_a_redirect_is_not_followed(supabase: SupabaseServer) -> None:
    with FileServer({"/": b"ok"}) as elsewhere:
        supabase.fail_next("callback", status=307, headers={"Location": elsewhere.url + "/"})

        error = undelivered(client_for(supabase))

        assert not elsewhere.requests
    assert "it redirects" in str(error)


def test_a_lost_answer_is_undelivered(supabase: SupabaseServer) -> None:
    supabase.drop_next("callback", after_commit=True)

    undelivered(client_for(supabase))

    # Then the endpoint may see the callback twice, under one id
    send(client_for(supabase))
    assert [received.headers["x-callback-id"] for received in supabase.callbacks] == ["callback-1"] * 2


def test_a_silent_endpoint_gets_the_time_limit_and_no_more(supabase: SupabaseServer) -> None:
    supabase.hang_next("callback")
    began = time.monotonic()

    undelivered(client_for(supabase, timeout_seconds=0.3))

    assert time.monotonic() - began < 2


def test_an_endless_answer_is_read_for_the_time_limit_and_no_more() -> None:
    drip = Answer(status=400, body=b"x" * 10_000, piece_bytes=1, piece_delay_seconds=0.02)
    flood = Answer(status=400, body=b"job_id" + b"x" * 10_000_000)
    with FileServer({"/drip": drip, "/flood": flood}) as server:
        for path in server.files:
            began = time.monotonic()

            error = undelivered(HttpCallbacks(server.url + path, timeout_seconds=0.3))

            assert time.monotonic() - began < 2
            assert len(str(error)) < 400


def test_neither_key_nor_query_is_ever_shown(supabase: SupabaseServer) -> None:
    url = f"{supabase.callback_url}?token=canary-query"
    client = HttpCallbacks(url, key="canary-key", secret="canary-secret", timeout_seconds=0.3)
    supabase.fail_next("callback", status=401, body=b"wrong key canary-key signed by canary-secret")
    supabase.fail_next("callback", status=302, headers={"Location": "/?token=canary-query"})
    supabase.drop_next("callback")
    supabase.hang_next("callback")

    messages = [str(undelivered(client)) for _ in range(4)]
    with SupabaseServer() as closed:
        pass
    messages.append(str(undelivered(HttpCallbacks(f"{closed.url}/?token=canary-query"))))

    assert not [message for message in messages if "canary" in message]


# -- when to try again


def test_the_endpoint_says_when_to_come_back(supabase: SupabaseServer) -> None:
    supabase.fail_next("callback", status=503, headers={"Retry-After": "7"})

    assert undelivered(client_for(supabase)).retry_after_seconds == 7


NOW = datetime(2026, 1, 2, 3, 4, 5, tzinfo=UTC)


@pytest.mark.parametrize(
    ("header", "seconds"),
    [
        (None, None),
        ("", None),
        ("0", 0),
        (" 30 ", 30),
        ("999999999999", 3600),
        ("-5", None),
        ("1.5", None),
        ("soon", None),
        ("\u0663", None),
        (format_datetime(NOW + timedelta(seconds=90), usegmt=True), 90),
        (format_datetime(NOW - timedelta(seconds=90), usegmt=True), 0),
        (format_datetime(NOW + timedelta(days=400), usegmt=True), 3600),
        ("Fri, 02 Jan 2026 03:05:05 -0000", 60),
        ("Fri, 99 Jan 2026 03:05:05 GMT", None),
    ],
)
def test_a_retry_after_is_read_as_seconds_or_a_date(header: str | None, seconds: float | None) -> None:
    assert retry_after(header, NOW) == seconds


@given(st.text(max_size=40))
def test_no_retry_after_is_outside_an_hour(header: str) -> None:
    seconds = retry_after(header, NOW)
    assert seconds is None or 0 <= seconds <= 3600


@given(st.integers(min_value=0, max_value=10**6), st.integers())
def test_waits_double_up_to_the_ceiling_with_half_of_them_random(failures: int, seed: int) -> None:
    whole = min(300, 5 * 2 ** min(max(failures - 1, 0), 10))

    wait = retry_delay(failures, first_seconds=5, random=Random(seed))

    assert whole / 2 <= wait <= whole


# -- the doubles


def test_a_directory_keeps_each_jobs_callbacks_in_order(tmp_path: Path) -> None:
    callbacks = DirectoryCallbacks(tmp_path / "callbacks")
    first = Callback(job_id="job-1", status=JobStatus.PROCESSING).to_bytes()

    send(callbacks, first)
    send(callbacks, BODY)
    callbacks.send("callback-2", "job-2", b'{\n  "job_id": "job-2"\r\n}')

    assert (tmp_path / "callbacks" / "job-1.jsonl").read_bytes() == first + b"\n" + BODY + b"\n"
    (line,) = (tmp_path / "callbacks" / "job-2.jsonl").read_text().splitlines()
    assert json.loads(line) == {"job_id": "job-2"}


def test_a_line_that_a_crash_cut_does_not_spoil_the_next(tmp_path: Path) -> None:
    (tmp_path / "job-1.jsonl").write_bytes(b'{"job_id":')

    send(DirectoryCallbacks(tmp_path))

    assert (tmp_path / "job-1.jsonl").read_bytes().splitlines() == [b'{"job_id":', BODY]


@pytest.mark.parametrize("job_id", ["", "..", "../x", "a/b", ".", "a\0b", "x" * 10_000, "a\n"])
def test_an_id_that_is_a_path_is_refused(job_id: str, tmp_path: Path) -> None:
    root = tmp_path / "callbacks"

    with pytest.raises(CallbackRejected):
        DirectoryCallbacks(root).send("callback-1", job_id, BODY)

    assert not root.exists()


def test_a_directory_that_cannot_be_written_is_tried_again(tmp_path: Path) -> None:
    (tmp_path / "callbacks").write_text("a file where the directory should be")

    undelivered(DirectoryCallbacks(tmp_path / "callbacks"))


def test_a_full_disk_is_tried_again(tmp_path: Path) -> None:
    if not Path("/dev/full").exists():
        pytest.skip("needs /dev/full")
    (tmp_path / "job-1.jsonl").symlink_to("/dev/full")

    undelivered(DirectoryCallbacks(tmp_path))


def test_a_recording_keeps_tries_and_what_was_accepted() -> None:
    callbacks = RecordingCallbacks([CallbackUndelivered("asleep"), None, CallbackRejected("no")])

    undelivered(callbacks)
    send(callbacks)
    with pytest.raises(CallbackRejected):
        send(callbacks)
    send(callbacks)

    sent = SentCallback(callback_id="callback-1", job_id="job-1", body=BODY)
    assert callbacks.attempts == [sent] * 4
    assert callbacks.accepted == [sent] * 2
