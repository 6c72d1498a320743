"""A subprocess that makes a job's artifacts, described before anything runs."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Mapping
from pathlib import Path

from attrs import field, frozen

#: What a command prints to report its progress, unless it says otherwise.
PROGRESS_PATTERN = r"\bstep (?P<step>\d+) of (?P<total>\d+)\b"


def _arguments(argv: Iterable[str | os.PathLike[str]]) -> tuple[str, ...]:
    if isinstance(argv, str | bytes):
        raise TypeError(f"argv must be a sequence of arguments, not the text {argv!r}; no shell would split it")
    return tuple(os.fspath(argument) if isinstance(argument, os.PathLike) else argument for argument in argv)


def _paths(outputs: Iterable[str | os.PathLike[str]]) -> tuple[Path, ...]:
    if isinstance(outputs, str | bytes):
        raise TypeError(f"outputs must be a sequence of paths, not the text {outputs!r}")
    return tuple(Path(output) for output in outputs)


@frozen(kw_only=True)
class Command:
    """A subprocess, without a shell: the argument vector is passed on as it is.

    ``outputs`` are the files it leaves, in the order of the job's assets; a relative path
    is taken from its working directory. Without any, the paths that ``context.output_path``
    handed out count.
    """

    argv: tuple[str, ...] = field(converter=_arguments)
    #: Added to the engine's environment, of which ``OURVIDZ_*_KEY``, ``_TOKEN``, ``_SECRET`` and ``_PASSWORD`` are
    #: left out: a program that needs one of them gets it here.
    env: Mapping[str, str] = field(factory=dict)
    cwd: Path | None = None
    #: The command is stopped after this, and in any case at the job's deadline.
    timeout_seconds: float | None = None
    outputs: tuple[Path, ...] = field(default=(), converter=_paths)
    #: A regular expression with the groups ``step`` and ``total``, searched in each line of its output.
    progress_pattern: str = field(default=PROGRESS_PATTERN)

    @argv.validator
    def _argv_is_text(self, _: object, argv: tuple[str, ...]) -> None:
        if not argv or not all(isinstance(argument, str) for argument in argv):
            raise TypeError(f"argv must be a non-empty sequence of str, not {argv!r}")
        if any("\0" in argument for argument in argv):
            raise ValueError("argv holds a NUL character, which no program can be given")

    @progress_pattern.validator
    def _pattern_has_its_groups(self, _: object, pattern: str) -> None:
        try:
            groups = re.compile(pattern).groupindex
        except re.error as error:
            raise ValueError(f"progress_pattern {pattern!r} is no regular expression: {error}") from None
        if not {"step", "total"} <= groups.keys():
            raise ValueError(f"progress_pattern {pattern!r} must have the named groups step and total")
