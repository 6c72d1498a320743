"""One line of the log for each thing that happens to a job, with its facts beside the text."""

from __future__ import annotations

import logging
from typing import Any

import attrs

from ourvidz_core.wire import events

logger = logging.getLogger("ourvidz_core.jobs")

_LINES: dict[type[events.Event], tuple[int, str]] = {
    events.JobStarted: (logging.INFO, "started, attempt {attempt}"),
    events.ReferencesFetched: (logging.INFO, "has its references after {seconds:.1f} s"),
    events.GenerationStarted: (logging.DEBUG, "has the engine after {waited_seconds:.1f} s"),
    events.GenerationFinished: (logging.INFO, "was generated in {seconds:.1f} s"),
    events.AssetStored: (logging.DEBUG, "stored {size_bytes} bytes in {bucket} in {seconds:.1f} s"),
    events.JobCompleted: (logging.INFO, "completed in {seconds:.1f} s"),
    events.JobRetried: (
        logging.WARNING,
        "runs again in {delay_seconds:.1f} s after attempt {attempt}: {error_type}: {message}",
    ),
    events.JobReleased: (logging.WARNING, "was {reason}; nothing is reported"),
    events.JobFailed: (logging.ERROR, "failed: {error_type}: {message}"),
    events.CallbackDelivered: (logging.INFO, "was reported as {status}"),
}


def log_event(*, event: events.Event) -> None:
    """Log one event. Steps of a generation are not worth a line each."""
    known = _LINES.get(type(event))
    if known is None:
        return
    level, text = known
    if logger.isEnabledFor(level):
        facts: dict[str, Any] = attrs.asdict(event)
        # ``message`` is the text of the line itself.
        beside = {"reason" if name == "message" else name: value for name, value in facts.items()}
        logger.log(
            level,
            "job %s (%s) %s",
            event.job_id,
            event.job_type,
            text.format_map(facts),
            extra={"event": type(event).__name__, **beside},
        )
