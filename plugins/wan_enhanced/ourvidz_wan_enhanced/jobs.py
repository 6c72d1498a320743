"""Turn a payload into an enhanced WAN job: WAN's own parsing, and one key more. Pure."""

from __future__ import annotations

from collections.abc import Iterable

import attrs
from ourvidz_wan.config import is_set
from ourvidz_wan.jobs import parse_wan_job

from ourvidz_core.errors import Fault, PayloadError
from ourvidz_core.wire.job_types import JobType
from ourvidz_core.wire.jobs import Job
from ourvidz_core.wire.payloads import Payload, shown

SWITCH = "enhance_prompt"


def parse_enhanced_job(job_type: JobType, payload: Payload) -> Job:
    """The WAN job of ``payload``, and whether its prompt is to be enhanced.

    :raises PayloadError: with every fault of the payload at once.
    """
    switch = payload.get(f"config.{SWITCH}")
    faults: list[Fault] = []
    if is_set(switch) and not isinstance(switch, bool):
        faults.append(Fault(f"$.config.{SWITCH}", "true or false", shown(switch)))
    job = _parsed(job_type, payload, faults)
    ignored = {key: value for key, value in job.ignored_config.items() if key != SWITCH}
    is_wanted = job.config.enhance_prompt if not isinstance(switch, bool) else switch
    return attrs.evolve(job, config=attrs.evolve(job.config, enhance_prompt=is_wanted), ignored_config=ignored)


def _parsed(job_type: JobType, payload: Payload, faults: Iterable[Fault]) -> Job:
    faults = tuple(faults)
    try:
        job = parse_wan_job(job_type, payload)
    except PayloadError as error:
        raise PayloadError.from_faults((*error.faults, *faults)) from error
    if faults:
        raise PayloadError.from_faults(faults)
    return job
