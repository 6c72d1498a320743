"""A log of one line an event, each with its job, and nothing in it that opens a door or repeats a prompt."""

from __future__ import annotations

import io
import json
import logging
import threading
import time
from collections.abc import Callable, Iterator

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ourvidz_core.logs import job_context, set_up
from ourvidz_core.redaction import Redactor, without_queries
from ourvidz_core.settings import LogFormat, load

logger = logging.getLogger("somebody.else")
PROMPT = 'A "red" fox, standing in deep snow at dawn\nlooking straight at the camera'


@pytest.fixture
def log_of() -> Iterator[Callable[..., io.StringIO]]:
    """Sets the root logger up as a worker does, onto a stream; it is as it was after the test."""
    root = logging.getLogger()
    before, level = root.handlers[:], root.level

    def make(**environ: str) -> io.StringIO:
        stream = io.StringIO()
        set_up(load({f"OURVIDZ_{name.upper()}": value for name, value in environ.items()}), stream=stream)
        return stream

    root.handlers = []
    yield make
    root.handlers, root.level = before, level
    from ourvidz_core.redaction import redact

    redact.shows_prompts = False


@pytest.mark.parametrize(
    "text",
    [
        "GET https://host/storage/v1/object/sign/a.png?token=CANARY failed",
        "https://host/a?x=1&sig=CANARY#CANARY",
        "/storage/v1/object/sign/a.png?token=CANARY&width=3",
        "redis://default:CANARY@host:6379/0 does not answer",
        "https://CANARY@host/",
        "Authorization: Bearer CANARYCANARY",
        "{'Authorization': 'Basic CANARYCANARY=='}",
        "HTTPS://HOST/A?TOKEN=CANARY",
    ],
)
def test_whatever_opens_a_door_is_taken_out_of_a_text(text: str) -> None:
    assert "CANARY" not in without_queries(text)


def test_what_opens_no_door_stays() -> None:
    for text in (
        "https://host/a.png failed: 404",
        "is it there? a=b",
        "job a failed: expected x=1, got 3",
        "a@b.example",
    ):
        assert without_queries(text) == text


def test_a_hostile_line_is_looked_at_in_no_time() -> None:
    started = time.monotonic()
    without_queries("http://" * 8_000 + "?" * 8_000 + "bearer " * 8_000)
    assert time.monotonic() - started < 2.0


@given(st.text(min_size=8, max_size=40).filter(lambda text: text.strip() == text))
def test_a_secret_is_hidden_in_whatever_spelling(secret: str) -> None:
    redact = Redactor()
    redact.add_secrets([secret])
    for spelt in (secret, json.dumps(secret), json.dumps(secret, ensure_ascii=False)):
        assert secret not in redact(f"<{spelt}>")
        assert "[secret]" in redact(f"<{spelt}>")


def test_secrets_of_the_settings_are_in_no_line_nor_in_a_traceback(log_of: Callable[..., io.StringIO]) -> None:
    stream = log_of(
        callback_secret="CANARY-callback", redis_url="redis://:CANARY%2Fredis@host", otlp_headers="x-key=CANARY-otlp"
    )
    logger.warning("%s and %s", "CANARY-callback", {"x": "CANARY/redis"}, extra={"where": "CANARY-otlp"})
    try:
        raise ValueError("https://host/a?token=CANARY-token CANARY-callback")
    except ValueError:
        logger.exception("it failed")
    assert "CANARY" not in stream.getvalue()
    assert "ValueError: https://host/a?..." in stream.getvalue()


def test_a_line_names_the_job_of_its_thread_and_no_other(log_of: Callable[..., io.StringIO]) -> None:
    stream = log_of()
    with job_context("job-1", "sdxl_image_fast"):
        logger.warning("a step")
        other = threading.Thread(target=logger.warning, args=["elsewhere"])
        other.start()
        other.join()
    logger.warning("after it")
    logger.warning("of another", extra={"job_id": "job-2", "job_type": "t"})
    lines = [line.partition(" WARNING ")[2] for line in stream.getvalue().splitlines()]
    assert lines == [
        "somebody.else: a step [job-1 sdxl_image_fast]",
        "somebody.else: elsewhere",
        "somebody.else: after it",
        "somebody.else: of another [job-2 t]",
    ]


def test_a_message_with_line_breaks_and_escapes_is_one_line(log_of: Callable[..., io.StringIO]) -> None:
    stream = log_of()
    logger.warning("a\n2026-01-01 ERROR forged: line\r\x1b[31mred")
    assert len(stream.getvalue().splitlines()) == 1
    assert "\\n2026-01-01 ERROR forged: line\\r\\x1b[31mred" in stream.getvalue()


def test_json_has_an_object_a_line_with_the_job_and_what_was_added(log_of: Callable[..., io.StringIO]) -> None:
    stream = log_of(log_format=LogFormat.JSON)
    with job_context("job-1", "t"):
        logger.warning("two\nlines: %s", "ä", extra={"event": "JobStarted", "attempt": 2})
    try:
        raise ValueError("why")
    except ValueError:
        logger.exception("it failed")
    first, second = [json.loads(line) for line in stream.getvalue().splitlines()]
    assert first.pop("time").startswith("20")
    assert first == {
        "level": "WARNING",
        "logger": "somebody.else",
        "message": "two\nlines: ä",
        "job_id": "job-1",
        "job_type": "t",
        "event": "JobStarted",
        "attempt": 2,
    }
    assert second["exception"].endswith("ValueError: why")


@pytest.mark.parametrize("log_format", list(LogFormat))
def test_a_running_jobs_prompt_is_in_no_line_unless_asked_for(
    log_of: Callable[..., io.StringIO], log_format: LogFormat
) -> None:
    from ourvidz_core.redaction import redact

    def log() -> None:
        logger.warning("made %s", PROMPT)
        logger.warning("truncated: ['standing in deep snow at dawn'] of %r", PROMPT, extra={"text": PROMPT})

    stream = log_of(log_format=log_format)
    with redact.without_prompts(PROMPT, None, "", "cat"):
        log()
        logger.warning("concatenated")
    assert "snow" not in stream.getvalue()
    assert "camera" not in stream.getvalue()
    assert "concatenated" in stream.getvalue()
    stream = log_of(log_format=log_format, log_prompts="true")
    with redact.without_prompts(PROMPT):
        log()
    assert "standing in deep snow" in stream.getvalue()


def test_a_prompt_is_hidden_for_as_long_as_any_job_with_it_runs() -> None:
    redact = Redactor()
    with redact.without_prompts("a red fox"):
        with redact.without_prompts("a red fox"):
            pass
        assert redact("a red fox") == "[prompt]"
    assert redact("a red fox") == "a red fox"


def test_a_library_that_logs_wrongly_costs_no_line(log_of: Callable[..., io.StringIO]) -> None:
    stream = log_of()
    logger.warning("%d pictures", "three")
    assert "%d pictures (its arguments do not fit" in stream.getvalue()
