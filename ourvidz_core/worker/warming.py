"""Make models ready before the first job comes: what a worker does at its start with ``--preload``."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Sequence

from ourvidz_core.errors import JobCancelled, JobError
from ourvidz_core.worker.parts import WorkerParts

logger = logging.getLogger(__name__)


def warm_up(parts: WorkerParts, queues: Sequence[str], stopped: threading.Event) -> None:
    """Have each plugin make ready what the job types of ``queues`` need, one after another.

    What fails is logged, and its jobs are taken all the same: they load what they need, or say
    what is wrong with it. A job type may take as long as one of its jobs. Returns soon after ``stopped`` is set.
    """
    limits = {
        job_type.name: parts.settings.job_timeouts_seconds.get(job_type.name, job_type.timeout_seconds)
        for job_type in parts.registry.job_types
        if job_type.queue in queues and job_type.name not in parts.impossible
    }
    for distribution, names in parts.registry.warmed_by(tuple(limits)).items():
        logger.info("%s makes ready what %s need", distribution, ", ".join(names))
        started = time.monotonic()
        try:
            parts.slot.warm_up(
                distribution,
                names,
                timeout_seconds=max(limits[name] for name in names),
                on_doing=_note_of(distribution, started),
                cancelled=stopped,
            )
        except JobCancelled:
            return
        except JobError as error:
            logger.error(
                "%s could not make ready what %s need; their jobs are taken all the same: %s",
                distribution,
                ", ".join(names),
                error,
            )
        else:
            logger.info("%s is warm after %.1f s", distribution, time.monotonic() - started)


def _note_of(distribution: str, started: float) -> Callable[[str], None]:
    """Logs what the engine is about, so that the log is a timeline of the start."""

    def note(text: str) -> None:
        seconds = time.monotonic() - started
        logger.info("%s, %.2f s: %s", distribution, seconds, text, extra={"warming_seconds": round(seconds, 3)})

    return note
