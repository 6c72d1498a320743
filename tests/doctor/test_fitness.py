"""What a worker takes and what it leaves, by what was found before it began."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ourvidz_core.doctor.examine import Examined
from ourvidz_core.doctor.fitness import judge, refuse_start
from ourvidz_core.errors import SettingsError
from ourvidz_core.wire.findings import Finding
from ourvidz_core.wire.job_types import JobType

TYPES = [
    JobType(name=name, queue=queue, content_type="image")
    for name, queue in [("image", "sdxl_queue"), ("video", "wan_queue"), ("enhanced", "wan_queue")]
]
QUEUES = ("sdxl_queue", "wan_queue")


def found(*findings: Finding) -> list[Examined]:
    return [Examined(name="check", findings=findings, seconds=0.0)]


def lost(*names: str) -> list[Examined]:
    return found(Finding.red("the model is missing", cure="copy it", job_types=names))


@pytest.mark.parametrize(
    ("names", "queues", "impossible", "unserved"),
    [
        ((), QUEUES, set(), set()),
        (("image",), ("wan_queue",), set(), {"sdxl_queue"}),
        (("enhanced",), QUEUES, {"enhanced"}, set()),
        (("video", "enhanced"), ("sdxl_queue",), set(), {"wan_queue"}),
        (("image", "enhanced"), ("wan_queue",), {"enhanced"}, {"sdxl_queue"}),
        (("somebody_elses",), QUEUES, set(), set()),
    ],
)
def test_what_cannot_be_done_is_left_to_others(names, queues, impossible, unserved) -> None:
    fitness = judge(lost(*names), QUEUES, TYPES)
    assert (fitness.queues, set(fitness.impossible), set(fitness.unserved)) == (queues, impossible, unserved)
    assert set(fitness.left_out.values()) <= {"the model is missing (cure: copy it)"}


def test_with_nothing_left_to_do_it_says_why() -> None:
    with pytest.raises(
        SettingsError, match=r"no queue can be served here\. sdxl_queue: the model is missing \(cure: copy"
    ):
        judge(lost("image"), ["sdxl_queue"], TYPES)


def test_only_what_would_lose_jobs_forbids_the_start() -> None:
    refuse_start(found(Finding.red("storage does not answer", cure="wait"), Finding.yellow("slow", cure="hurry")))
    with pytest.raises(SettingsError, match=r"it evicts \(cure: noeviction\); .*--no-checks"):
        refuse_start(
            found(
                Finding.red("it evicts", cure="noeviction", forbids_start=True),
                Finding.red("nothing can be written", cure="chmod", forbids_start=True),
            )
        )


@given(
    names=st.sets(st.sampled_from(["image", "video", "enhanced"])), queues=st.sets(st.sampled_from(QUEUES), min_size=1)
)
def test_every_type_of_its_queues_is_either_done_or_left_with_a_reason(names: set[str], queues: set[str]) -> None:
    try:
        fitness = judge(lost(*names), sorted(queues), TYPES)
    except SettingsError:
        assert {one.name for one in TYPES if one.queue in queues} <= names
        return
    for job_type in TYPES:
        if job_type.queue in queues:
            is_left = job_type.name in fitness.impossible or job_type.queue in fitness.unserved
            assert is_left == (job_type.name in names)
