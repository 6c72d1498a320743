"""What is asked of whom, and what becomes of a wrong answer."""

from __future__ import annotations

import inspect

import pytest

from ourvidz_core.plugins import hookspecs
from ourvidz_core.plugins.context import JobContext
from ourvidz_core.plugins.defaults import CoreDefaults
from ourvidz_core.plugins.registry import OWNER_HOOKS
from ourvidz_core.testing.doubles import RecordingContext

HOOKS = {name: value for name, value in vars(hookspecs).items() if hasattr(value, "ourvidz_spec")}


@pytest.mark.parametrize("name", sorted(HOOKS))
def test_each_hook_says_when_it_is_called_and_shows_an_example(name: str) -> None:
    text = inspect.getdoc(HOOKS[name])

    assert "Called " in text
    assert "Example: ``" in text


@pytest.mark.parametrize("name", sorted(HOOKS))
def test_each_hook_is_typed(name: str) -> None:
    signature = inspect.signature(HOOKS[name])

    assert signature.return_annotation is not inspect.Signature.empty
    assert all(p.annotation is not inspect.Parameter.empty for p in signature.parameters.values())


def test_an_owners_hooks_have_one_answer_and_the_others_many() -> None:
    first = {name for name, hook in HOOKS.items() if hook.ourvidz_spec["firstresult"]}

    assert first == set(OWNER_HOOKS)


def test_core_answers_last() -> None:
    answers = [method for method in vars(CoreDefaults).values() if hasattr(method, "ourvidz_impl")]

    assert answers
    assert all(method.ourvidz_impl["trylast"] for method in answers)


def test_the_engines_context_has_all_that_the_protocol_promises(tmp_path: object) -> None:
    context: JobContext = RecordingContext(tmp_path)
    promised = {name for name in (*vars(JobContext), *JobContext.__annotations__) if not name.startswith("_")}

    assert all(hasattr(context, name) for name in promised)
    for name in ("settings", "output_path", "progress", "run"):
        assert list(inspect.signature(getattr(JobContext, name)).parameters)[1:] == list(
            inspect.signature(getattr(context, name)).parameters
        )
