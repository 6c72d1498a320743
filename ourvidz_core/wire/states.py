"""What a worker and its engine are doing, in the words that other processes read."""

from __future__ import annotations

from enum import StrEnum


class WorkerState(StrEnum):
    """What a worker is doing."""

    STARTING = "starting"
    #: It has no job and takes the next one.
    IDLE = "idle"
    WORKING = "working"
    #: It takes no more jobs, and ends when those at hand have ended.
    DRAINING = "draining"


class EngineState(StrEnum):
    """What a worker's engine process is doing. One is started for the first job that needs it."""

    STOPPED = "stopped"
    STARTING = "starting"
    #: Models are loaded before the first job comes.
    WARMING = "warming"
    READY = "ready"
    #: The last start failed; the next job tries again.
    FAILED = "failed"
