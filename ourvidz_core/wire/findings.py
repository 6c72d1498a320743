"""What ``ourvidz doctor`` looks at and what it found: checks, and findings with their cures."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from enum import StrEnum

from attrs import field, frozen


class Level(StrEnum):
    """How bad a finding is, best first."""

    GREEN = "green"
    YELLOW = "yellow"
    RED = "red"

    @property
    def rank(self) -> int:
        """0 for the best."""
        return list(Level).index(self)


@frozen(kw_only=True)
class Finding:
    """One thing that a check saw. Yellow and red ones say what to do.

    >>> Finding.red("there is no model at /models/a", cure="set ACME_MODEL").level.value
    'red'
    """

    level: Level
    message: str
    cure: str = ""
    #: The job types that cannot be done because of it; a worker leaves them to others.
    job_types: tuple[str, ...] = ()
    #: A worker that would start in spite of it would lose jobs, or what they made.
    forbids_start: bool = False

    def __attrs_post_init__(self) -> None:
        if self.level is not Level.GREEN and not self.cure:
            raise ValueError(f"a {self.level} finding says what to do about it: {self.message}")

    @classmethod
    def green(cls, message: str) -> Finding:
        """All is well."""
        return cls(level=Level.GREEN, message=message)

    @classmethod
    def yellow(cls, message: str, *, cure: str) -> Finding:
        """It works, and somebody should know."""
        return cls(level=Level.YELLOW, message=message, cure=cure)

    @classmethod
    def red(cls, message: str, *, cure: str, job_types: Iterable[str] = (), forbids_start: bool = False) -> Finding:
        """It does not work."""
        return cls(level=Level.RED, message=message, cure=cure, job_types=tuple(job_types), forbids_start=forbids_start)


@frozen(kw_only=True)
class Check:
    """One thing to look at. ``run`` may raise: that is a red finding, too.

    Checks run beside each other, each with a time limit, so ``run`` shares nothing that
    is not thread-safe.
    """

    #: What it looks at, such as ``redis`` or ``models of acme-upscale``.
    name: str
    run: Callable[[], Iterable[Finding]] = field(repr=False)
    #: Whether a worker runs it before it takes jobs: it is done within a second and changes nothing.
    is_at_start: bool = False
    #: Whether it may take minutes: ``ourvidz doctor`` runs it only with ``--thorough``.
    is_thorough: bool = False
    timeout_seconds: float = 20.0
