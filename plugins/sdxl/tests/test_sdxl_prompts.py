"""Weights in prompts: one syntax, and everything else is the user's own text."""

from __future__ import annotations

import time
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st
from ourvidz_sdxl.prompts import MAX_WEIGHT, Fragment, parse_weights, plain_text, split_terms

TEXTS = st.text(alphabet="ab (),:.12+-\\\"'", max_size=40)


def weighed(prompt: str) -> list[tuple[str, float]]:
    return [(fragment.text, fragment.weight) for fragment in parse_weights(prompt)]


@pytest.mark.parametrize(
    "prompt",
    [
        'a cat (sitting) on C++ book, 4:3, "hi" -- neon',
        "word++ and (x)1.2",
        '("a cat", "a dog").blend(0.5, 0.5)',
        '("one", "two").and()',
        "(photo, 16:9) and (4:1) at (12:00)",
        "(a:3) (b:-1) (c:1.2.3) (d:) (e:x)",
        "smile :) or :( or (",
        "a (b:1.2",
        "cat.swap(dog)",
        "[cat:dog:0.5]",
        "",
    ],
)
def test_text_without_weights_stays_as_it_is(prompt: str) -> None:
    assert weighed(prompt) == ([(prompt, 1.0)] if prompt else [])


@pytest.mark.parametrize(
    ("prompt", "fragments"),
    [
        ("a (red:1.5) fox", [("a ", 1.0), ("red", 1.5), (" fox", 1.0)]),
        ("(red fox: 0.5 )", [("red fox", 0.5)]),
        ("(a (b:1.2) c:1.5)", [("a ", 1.5), ("b", 1.8), (" c", 1.5)]),
        ("(a (b) c:1.5)", [("a (b) c", 1.5)]),
        ("((a:2):2)", [("a", MAX_WEIGHT)]),
        ("(a:0)", [("a", 0.0)]),
        ("(a:.5)", [("a", 0.5)]),
        ("x (a, b:1.1), y", [("x ", 1.0), ("a, b", 1.1), (", y", 1.0)]),
        (r"\(a:1.2\)", [("(a:1.2)", 1.0)]),
        (r"(smile \):1.3)", [("smile )", 1.3)]),
        (r"back\slash", [(r"back\slash", 1.0)]),
        ("(ratio 4:3 (a:1.5))", [("(ratio 4:3 ", 1.0), ("a", 1.5), (")", 1.0)]),
    ],
)
def test_weight_in_parentheses_counts(prompt: str, fragments: list[tuple[str, float]]) -> None:
    assert weighed(prompt) == fragments


@given(TEXTS)
def test_every_text_is_read_and_every_weight_is_sane(prompt: str) -> None:
    fragments = parse_weights(prompt)
    assert all(fragment.text and 0 <= fragment.weight <= MAX_WEIGHT for fragment in fragments)
    assert all(left.weight != right.weight for left, right in pairwise(fragments))


@given(st.text(alphabet="ab (),.12+-\"'", max_size=40))
def test_text_without_colons_is_never_syntax(prompt: str) -> None:
    assert plain_text(prompt) == prompt


@given(TEXTS, st.floats(0, 2).map(lambda weight: round(weight, 2)))
def test_weighted_text_reads_back(text: str, weight: float) -> None:
    escaped = f"x{text}".replace("\\", "").replace("(", r"\(").replace(")", r"\)")
    assert parse_weights(f"({escaped}:{weight})") == (Fragment(text=f"x{text}".replace("\\", ""), weight=weight),)


@given(TEXTS)
def test_terms_lose_nothing_but_commas_and_spaces(prompt: str) -> None:
    def letters(text: str) -> str:
        return "".join(character for character in text if character not in ", ")

    assert letters("".join(split_terms(prompt))) == letters(prompt)


def test_comma_inside_a_weighted_group_separates_nothing() -> None:
    assert split_terms("(bad hands, extra fingers:1.3), text,\nlogo ,, (a, b)") == [
        "(bad hands, extra fingers:1.3)", "text", "logo", "(a", "b)",
    ]  # fmt: skip


def test_deeply_nested_prompt_is_read_in_time() -> None:
    started = time.perf_counter()
    parse_weights("(" * 100_000 + "a:1.1)" * 50_000)
    assert time.perf_counter() - started < 5
