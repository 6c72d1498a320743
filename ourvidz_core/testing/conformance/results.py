"""What a check finds: what is wrong, and what to change."""

from __future__ import annotations

from enum import StrEnum

from attrs import frozen


class CheckStatus(StrEnum):
    """How a check of one plugin ended."""

    PASSED = "passed"
    FAILED = "failed"
    #: It says nothing of this plugin here; the reason says why.
    SKIPPED = "skipped"


@frozen(kw_only=True)
class Flaw:
    """One thing that a plugin does wrong."""

    #: What was seen.
    problem: str
    #: What its author changes.
    cure: str
    job_type: str | None = None

    def __str__(self) -> str:
        where = f"{self.job_type}: " if self.job_type else ""
        return f"{where}{self.problem}\n  -> {self.cure}"


@frozen(kw_only=True)
class CheckResult:
    """What became of one check of one plugin."""

    distribution: str
    check: str
    status: CheckStatus
    flaws: tuple[Flaw, ...] = ()
    #: Why it was skipped.
    reason: str = ""


class NotChecked(Exception):
    """The check has nothing to look at; says why."""
