"""A subprocess that makes a job's artifacts, described before anything runs."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from attrs import field, frozen

#: What a command prints to report its progress, unless it says otherwise.
PROGRESS_PATTERN = r"\bstep (?P<step>\d+) of (?P<total>\d+)\b"


@frozen(kw_only=True)
class Command:
    """A subprocess, without a shell: the argument vector is passed on as it is.

    ``outputs`` are the files it leaves, in the order of the job's assets; without any,
    the paths that ``context.output_path`` handed out count.
    """

    argv: tuple[str, ...] = field(converter=tuple)
    #: Added to the engine's environment, which holds no secret of ours.
    env: Mapping[str, str] = field(factory=dict)
    cwd: Path | None = None
    #: The command is stopped after this, and in any case at the job's deadline.
    timeout_seconds: float | None = None
    outputs: tuple[Path, ...] = field(default=(), converter=tuple)
    #: A regular expression with the groups ``step`` and ``total``, searched in each line of its output.
    progress_pattern: str = PROGRESS_PATTERN

    @argv.validator
    def _argv_is_text(self, _: object, argv: tuple[str, ...]) -> None:
        if not argv or not all(isinstance(argument, str) for argument in argv):
            raise TypeError(f"argv must be a non-empty sequence of str, not {argv!r}")
        if any("\0" in argument for argument in argv):
            raise ValueError("argv holds a NUL character, which no program can be given")
