"""What is asked of whom, and what becomes of a wrong answer."""

from __future__ import annotations

import ast
import inspect
import re
from pathlib import Path

import pytest

from ourvidz_core.plugins import hookspecs
from ourvidz_core.plugins.context import JobContext
from ourvidz_core.plugins.defaults import CoreDefaults
from ourvidz_core.plugins.registry import OWNER_HOOKS
from ourvidz_core.testing.doubles import RecordingContext

ROOT = Path(__file__).parent.parent
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


def sections() -> dict[str, str]:
    """The reference page, cut at its headings."""
    _, *parts = (ROOT / "docs/reference/hooks.md").read_text("utf-8").split("\n## ")
    return {part.partition("\n")[0]: part.partition("\n")[2] for part in parts}


def test_the_reference_page_has_a_section_for_each_hook_in_the_order_of_a_job() -> None:
    assert list(sections()) == list(HOOKS)


@pytest.mark.parametrize("name", HOOKS)
def test_the_signature_on_the_reference_page_is_the_hooks_own(name: str) -> None:
    shown = re.search(r"```text\n(.*?)\n```", sections()[name], re.DOTALL)[1]
    declared = ast.parse(f"def {shown}: ...").body[0]
    hook = inspect.signature(HOOKS[name])

    assert declared.name == name
    assert {argument.arg: ast.unparse(argument.annotation) for argument in declared.args.args} == {
        argument.name: argument.annotation for argument in hook.parameters.values()
    }
    assert ast.unparse(declared.returns) == hook.return_annotation
    answers = "The first answer that is not None counts."
    assert (answers in sections()[name]) is HOOKS[name].ourvidz_spec["firstresult"]


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
