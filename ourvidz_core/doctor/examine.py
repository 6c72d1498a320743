"""Run checks beside each other, each with its time limit. One that breaks is a red finding, no more."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterable, Sequence

from attrs import field, frozen

from ourvidz_core.errors import OurVidzError
from ourvidz_core.wire.findings import Check, Finding, Level


def _worst_first(findings: Iterable[Finding]) -> tuple[Finding, ...]:
    return tuple(sorted(findings, key=lambda finding: -finding.level.rank))


@frozen(kw_only=True)
class Examined:
    """A check and what it found; worst findings first."""

    name: str
    findings: tuple[Finding, ...] = field(converter=_worst_first)
    seconds: float

    @property
    def level(self) -> Level:
        """The worst of its findings."""
        return max((finding.level for finding in self.findings), key=lambda level: level.rank, default=Level.GREEN)


def examine(checks: Sequence[Check]) -> list[Examined]:
    """Run ``checks`` and wait for all of them, or for the end of each one's time."""
    running = [_Running(check) for check in checks]
    return [one.result() for one in running]


def select(checks: Sequence[Check], wanted: Iterable[str]) -> list[Check]:
    """The checks whose name is, or begins with the words of, one of ``wanted``."""
    chosen = [name.strip().lower() for name in wanted]
    return [
        check
        for check in checks
        if any(check.name.lower() == name or check.name.startswith(f"{name} ") for name in chosen)
    ]


class _Running:
    """One check in a thread of its own; a thread that hangs does not hold up the end of the process."""

    def __init__(self, check: Check) -> None:
        self._check = check
        self._started = time.monotonic()
        self._found: tuple[Finding, ...] | None = None
        self._seconds = 0.0
        self._thread = threading.Thread(target=self._run, name=f"check-{check.name}", daemon=True)
        self._thread.start()

    def result(self) -> Examined:
        left = self._check.timeout_seconds - (time.monotonic() - self._started)
        self._thread.join(max(left, 0.0))
        found = self._found
        if found is None:
            self._seconds = time.monotonic() - self._started
            found = (
                Finding.red(
                    f"no answer within {self._check.timeout_seconds:g} s",
                    cure="what it looks at hangs: a network disk, a service or a device; look at it by hand",
                ),
            )
        return Examined(name=self._check.name, findings=found, seconds=round(self._seconds, 3))

    def _run(self) -> None:
        try:
            found = tuple(self._check.run())
        except OurVidzError as error:
            found = (Finding.red(str(error), cure="do what the message says"),)
        except (Exception, SystemExit) as error:  # a check of a plugin may do anything
            found = (
                Finding.red(
                    f"the check itself failed: {type(error).__name__}: {error}",
                    cure="report it to whoever wrote the check; what it looks at may be well",
                ),
            )
        self._seconds = time.monotonic() - self._started
        self._found = found
