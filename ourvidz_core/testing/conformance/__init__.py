"""What every plugin must do right, as checks that need no pytest: ``ourvidz plugins check`` runs them.

A check is a function that takes a :class:`Subject` and yields a :class:`Flaw` for each
thing that is wrong; none means that it passed. One that has nothing to look at raises
:class:`NotChecked`. :class:`ourvidz_core.testing.ConformanceSuite` has a test for each.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping

from ourvidz_core.errors import JobError
from ourvidz_core.plugins.loading import PluginStatus
from ourvidz_core.testing.conformance import generation, loading, messages
from ourvidz_core.testing.conformance.results import CheckResult, CheckStatus, Flaw, NotChecked
from ourvidz_core.testing.conformance.subject import Subject

__all__ = ["CHECKS", "LIGHT_CHECKS", "CheckResult", "CheckStatus", "Flaw", "NotChecked", "Subject", "run_checks"]

ConformanceCheck = Callable[[Subject], Iterator[Flaw]]

#: Those that generate nothing.
LIGHT_CHECKS: Mapping[str, ConformanceCheck] = {
    "loads": loading.check_loads,
    "light-import": loading.check_light_import,
    "names": loading.check_names,
    "samples": messages.check_samples,
    "wrong-values": messages.check_wrong_values,
    "unknown-keys": messages.check_unknown_keys,
    "safe-argv": messages.check_safe_argv,
}
#: Every check by its name, in the order in which a plugin meets them.
CHECKS: Mapping[str, ConformanceCheck] = {
    **LIGHT_CHECKS,
    "run": generation.check_run,
    "callback": generation.check_callback,
    "out-of-memory": generation.check_out_of_memory,
    "time-out": generation.check_time_out,
    "exit-status": generation.check_exit_status,
    "events": generation.check_events,
}
#: Those that need no right sample.
_WITHOUT_SAMPLES = frozenset({"loads", "light-import", "names", "samples"})


def run_check(subject: Subject, name: str) -> CheckResult:
    """The result of one check. What a plugin raises where nothing may be raised is a flaw too."""
    try:
        if name not in ("loads", "light-import") and subject.record.status is not PluginStatus.LOADED:
            raise NotChecked("it does not load")
        if name not in _WITHOUT_SAMPLES and subject.is_sample_refused:
            raise NotChecked("a sample is refused")
        flaws = tuple(CHECKS[name](subject))
    except NotChecked as reason:
        return CheckResult(
            distribution=subject.distribution, check=name, status=CheckStatus.SKIPPED, reason=str(reason)
        )
    except JobError as error:
        flaws = (
            Flaw(
                problem=f"a sample ends in {error.error_type}: {error.message}", cure="correct the sample or the plugin"
            ),
        )
    return CheckResult(
        distribution=subject.distribution,
        check=name,
        status=CheckStatus.FAILED if flaws else CheckStatus.PASSED,
        flaws=flaws,
    )


def run_checks(subject: Subject, *, is_light: bool = False) -> Iterator[CheckResult]:
    """The results of all checks, as they come; ``is_light`` leaves out what generates."""
    for name in LIGHT_CHECKS if is_light else CHECKS:
        yield run_check(subject, name)
