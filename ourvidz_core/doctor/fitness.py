"""What a worker may take, by what its checks found before it began."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from attrs import field, frozen

from ourvidz_core.doctor.examine import Examined
from ourvidz_core.errors import SettingsError
from ourvidz_core.wire.findings import Finding, Level
from ourvidz_core.wire.job_types import JobType


@frozen(kw_only=True)
class Fitness:
    """What can be done here, and what is left to other workers."""

    queues: tuple[str, ...]
    #: Job types of these queues that cannot be done here, and why.
    impossible: Mapping[str, str] = field(factory=dict)
    #: Queues none of whose job types can be done here, and why.
    unserved: Mapping[str, str] = field(factory=dict)

    @property
    def left_out(self) -> dict[str, str]:
        """Everything that is left to others, with the reason."""
        return {**self.unserved, **self.impossible}


def refuse_start(examined: Sequence[Examined]) -> None:
    """Stop where a worker would lose jobs, or what they made.

    :raises SettingsError: with every reason and its cure.
    """
    if reasons := [_reason(finding) for finding in _red(examined) if finding.forbids_start]:
        raise SettingsError(f"{'; '.join(reasons)}. --no-checks starts all the same")


def judge(examined: Sequence[Examined], queues: Sequence[str], job_types: Sequence[JobType]) -> Fitness:
    """What of ``queues`` can be served after these findings.

    :raises SettingsError: nothing of it, with the reasons.
    """
    reasons: dict[str, str] = {}
    for finding in _red(examined):
        for name in finding.job_types:
            reasons.setdefault(name, _reason(finding))
    types_of = {queue: [job_type.name for job_type in job_types if job_type.queue == queue] for queue in queues}
    unserved = {
        queue: reasons[names[0]]
        for queue, names in types_of.items()
        if names and all(name in reasons for name in names)
    }
    served = tuple(queue for queue in queues if queue not in unserved)
    if not served:
        said = "; ".join(f"{queue}: {reason}" for queue, reason in unserved.items())
        raise SettingsError(f"no queue can be served here. {said}. --no-checks starts all the same")
    impossible = {name: reasons[name] for queue in served for name in types_of[queue] if name in reasons}
    return Fitness(queues=served, impossible=impossible, unserved=unserved)


def _red(examined: Sequence[Examined]) -> list[Finding]:
    return [finding for one in examined for finding in one.findings if finding.level is Level.RED]


def _reason(finding: Finding) -> str:
    return f"{finding.message} (cure: {finding.cure})"
