"""The tree of errors, and what an error says of itself."""

from __future__ import annotations

import re

import pytest

from ourvidz_core import errors
from ourvidz_core.engine.protocol import decode_error, encode_error
from ourvidz_core.errors import Fault, GenerationError, JobError, OurVidzError, OutOfMemory, PayloadError

CLASSES = {name: cls for name, cls in vars(errors).items() if isinstance(cls, type) and issubclass(cls, OurVidzError)}
JOB_ERRORS = [cls for cls in CLASSES.values() if issubclass(cls, JobError)]


def drawn_tree() -> dict[str, str | None]:
    """Each class of the drawing with the class it hangs from."""
    parents: dict[str, str | None] = {}
    above: list[tuple[int, str]] = []
    for line in (errors.__doc__ or "").splitlines():
        match = re.fullmatch(r"    ([│├└─ ]*)([A-Z]\w+)(\s.*)?", line)
        if match is None:
            continue
        depth, name = len(match[1]), match[2]
        while above and above[-1][0] >= depth:
            above.pop()
        parents[name] = above[-1][1] if above else None
        above.append((depth, name))
    return parents


def test_the_drawing_is_the_tree() -> None:
    tree = {name: cls.__bases__[0].__name__ for name, cls in CLASSES.items()}

    assert drawn_tree() == {**tree, "OurVidzError": None}


@pytest.mark.parametrize("cls", JOB_ERRORS, ids=lambda cls: cls.__name__)
def test_a_job_error_names_its_type_and_crosses_the_pipe(cls: type[JobError]) -> None:
    error = cls("it broke", details={"free_mb": 3})

    arrived = decode_error(encode_error(error))

    assert type(arrived) is cls
    assert (arrived.message, arrived.error_type, arrived.details) == ("it broke", cls.__name__, {"free_mb": 3})
    assert arrived.is_transient is error.is_transient


def test_what_a_plugin_derives_stays_what_it_is_across_the_pipe_and_keeps_its_name() -> None:
    class AcmeRanOut(OutOfMemory):
        pass

    class AcmeServerBusy(GenerationError):
        is_transient = True

    class StorageUnavailable(JobError):
        """A plugin's own, which only has the name of one of ours."""

    ran_out, busy, other = (
        decode_error(encode_error(cls("no"))) for cls in (AcmeRanOut, AcmeServerBusy, StorageUnavailable)
    )

    assert (type(ran_out), ran_out.error_type, ran_out.is_transient) == (OutOfMemory, "AcmeRanOut", True)
    assert (type(busy), busy.error_type, busy.is_transient) == (GenerationError, "AcmeServerBusy", True)
    assert (type(other), other.error_type, other.is_transient) == (JobError, "StorageUnavailable", False)


def test_a_payload_error_lists_every_fault() -> None:
    error = PayloadError.from_faults([Fault("$.a", "a string", "3"), Fault("$.b", "'b' must be >= 1: 0", "")])

    assert error.message == "$.a: expected a string, got 3; $.b: 'b' must be >= 1: 0"
    assert [fault["path"] for fault in error.details["faults"]] == ["$.a", "$.b"]
