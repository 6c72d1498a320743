"""Logging, set up the same way in every process: one line an event, each with its job, nothing secret in any.

A filter on the one handler looks at every record of every library, so nobody has to remember it.
"""

from __future__ import annotations

import contextlib
import logging
import sys
import traceback
from collections.abc import Iterator
from contextvars import ContextVar
from typing import IO

from ourvidz_core.redaction import redact
from ourvidz_core.settings import LogFormat, Settings

#: What a record has of its own; everything else was added by whoever logged it.
_OWN = frozenset(vars(logging.makeLogRecord({}))) | {"message", "asctime", "taskName", "job_suffix"}
#: A line break, or an escape sequence for the terminal, in somebody's message must not look like a line of ours.
_CONTROLS = {code: f"\\x{code:02x}" for code in (*range(32), 127) if chr(code) != "\t"} | {10: "\\n", 13: "\\r"}

_ENGINE_LINE = "%(levelname)s %(name)s: %(message)s%(job_suffix)s"
_TEXT_LINE = f"%(asctime)s {_ENGINE_LINE}"

_job: ContextVar[tuple[str, str]] = ContextVar("job", default=("", ""))


@contextlib.contextmanager
def job_context(job_id: str, job_type: str = "") -> Iterator[None]:
    """Every line that this thread logs within the block is of this job."""
    token = _job.set((job_id, job_type))
    try:
        yield
    finally:
        _job.reset(token)


def set_job_type(job_type: str) -> None:
    """The job of this thread is of this type, as is known since its message was read."""
    _job.set((_job.get()[0], job_type))


def set_up(
    settings: Settings, *, level: int | None = None, is_engine: bool = False, stream: IO[str] | None = None
) -> None:
    """Log to ``stream``, stderr unless said, as the settings ask.

    An engine writes plain text without the time, whatever is asked: its worker reads each line and wraps it in one
    of its own.
    """
    redact.add_secrets(settings.secrets)
    redact.shows_prompts = settings.log_prompts
    log_format = LogFormat.TEXT if is_engine else settings.log_format
    handler = logging.StreamHandler(stream or sys.stderr)
    handler.addFilter(_CarefulFilter(is_escaped=log_format is LogFormat.TEXT))
    text = logging.Formatter(_ENGINE_LINE if is_engine else _TEXT_LINE)
    handler.setFormatter(_json_formatter() if log_format is LogFormat.JSON else text)
    chosen = logging.getLevelNamesMapping()[settings.log_level.upper()] if level is None else level
    logging.basicConfig(level=chosen, handlers=[handler], force=True)
    # Its retries are ours to report, with the job's id.
    logging.getLogger("stamina").setLevel(logging.ERROR)
    logging.getLogger("urllib3").setLevel(logging.WARNING)
    logging.getLogger("opentelemetry").setLevel(logging.ERROR)


class _CarefulFilter(logging.Filter):
    """Adds the job to each record, and takes out what must not be read."""

    def __init__(self, *, is_escaped: bool) -> None:
        super().__init__()
        self._is_escaped = is_escaped

    def filter(self, record: logging.LogRecord) -> bool:
        try:
            message = record.getMessage()
        except Exception as error:  # a library's wrong arguments must not keep its line, or ours, from the log
            message = f"{record.msg} (its arguments do not fit: {error})"
        message = redact(message)
        record.msg, record.args = message.translate(_CONTROLS) if self._is_escaped else message, None
        if record.exc_info and not record.exc_text:
            record.exc_text = "".join(traceback.format_exception(*record.exc_info)).rstrip("\n")
        if record.exc_text:
            record.exc_text = redact(record.exc_text)
        for name, value in vars(record).items():
            if name not in _OWN and isinstance(value, str):
                setattr(record, name, redact(value))
        self._add_job(record)
        return True

    @staticmethod
    def _add_job(record: logging.LogRecord) -> None:
        # Whoever logs of a job that is not this thread's own says so with ``extra``.
        own = (getattr(record, "job_id", ""), getattr(record, "job_type", ""))
        job = own if own[0] else _job.get()
        unsaid = job[0] and not all(part in record.msg for part in job)
        suffix = f" [{' '.join(filter(None, job))}]" if unsaid else ""
        record.__dict__.update(job_id=job[0], job_type=job[1], job_suffix=suffix)


def _json_formatter() -> logging.Formatter:
    from pythonjsonlogger.json import JsonFormatter

    return JsonFormatter(
        ["levelname", "name", "message", "job_id", "job_type"],
        rename_fields={"levelname": "level", "name": "logger", "exc_info": "exception"},
        timestamp="time",
        reserved_attrs=[*_OWN],
        json_ensure_ascii=False,
    )
