"""The negative prompt: whose it is, who is in the scene, and what fits."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from ourvidz_sdxl.negative_prompts import (
    SEVERAL_PEOPLE_TERMS,
    fit_terms,
    negative_terms,
    shows_several_people,
)
from sdxl_support import produced

TERMS = st.lists(st.text(alphabet="abc ", min_size=1, max_size=12).filter(str.strip).map(str.strip), max_size=12)


def count_words(text: str) -> int:
    """Words and commas, as a tokenizer roughly counts."""
    return len(text.replace(",", " , ").split())


@pytest.mark.parametrize(
    "prompt",
    [
        "a couple dancing", "twins", "a trio of jazz players", "a crowd at a concert", "group photo", "two women",
        "a family at the beach", "3 men", "a man and a woman", "both of them smiling", "a football team", "2girls",
        "1girl, 1boy", "bride and groom", "a young boy with his old father", "people walking", "Several People",
        "a couple of friends", "a group of hikers", "a man hugging a woman", "mother and daughter",
        "(two:1.3) women", "a girl facing another girl", "three friends", "the man and the woman", "12 soldiers",
        "a woman kissing a man", "the two of us", "lovers facing each other", "a threesome", "a man next to a woman",
    ],
)  # fmt: skip
def test_several_people_are_seen(prompt: str) -> None:
    assert shows_several_people(prompt)


@pytest.mark.parametrize(
    "prompt",
    [
        "one person", "a man", "threefold", "twofold light", "a couple of minutes before dawn", "steam over a street",
        "men's shoes", "a family car", "an empty street, no people", "a beach without people", "a group of trees",
        "a woman dressed as a man", "portrait of a woman", "humane treatment", "children's book cover", "1girl, solo",
        "a lighthouse on a rocky coast at sunset", "twin towers", "a team of horses", "person holding 2 cats",
        "an omen in the sky", "a cat and a dog", "a woman and a dog", "a man with 3 books", "the grouper, a fish",
        "a crowded bookshelf", "a pair of shoes", "family tree",
    ],
)  # fmt: skip
def test_one_person_or_none_is_not_several(prompt: str) -> None:
    assert not shows_several_people(prompt)


def test_own_terms_come_first_without_duplicates() -> None:
    assert negative_terms("Blurry, text,, blurry ,TEXT, bad  hands", "a tree") == ["Blurry", "text", "bad hands"]


def test_several_people_add_terms_to_the_producers_own() -> None:
    terms = negative_terms("text, extra limbs", "two women")
    assert terms[:2] == ["text", "extra limbs"]
    assert set(terms[2:]) == set(SEVERAL_PEOPLE_TERMS) - {"extra limbs"}


def test_added_terms_are_against_merged_bodies_extra_limbs_and_a_wrong_head_count() -> None:
    terms = negative_terms(None, "a man and a woman")
    assert {"merged bodies", "extra limbs", "extra heads"} <= set(terms)
    assert not {"merged bodies", "extra heads"} & set(negative_terms(None, "a woman"))


def test_made_negative_prompt_is_made_for_the_prompt() -> None:
    assert "bad hands" in negative_terms(None, "a woman")
    assert "bad hands" not in negative_terms(None, "a lighthouse")
    assert "logo" not in negative_terms(None, "a logo of a fox")
    assert "logo" in negative_terms(None, "a fox")


def test_blank_negative_prompt_is_none() -> None:
    assert negative_terms(" ", "a fox") == negative_terms(None, "a fox")


def test_producers_negative_prompt_and_the_scenes_terms_fit_together() -> None:
    fitted = fit_terms(negative_terms(produced("sdxl_image_fast").negative_prompt, "two women"), count_words)
    assert "minor" in fitted.text.split(", ")
    assert count_words(fitted.text) <= 75


def test_whole_terms_go_from_the_end() -> None:
    fitted = fit_terms(["bad hands", "worst quality", "a"], count_words, budget=5)
    assert (fitted.text, fitted.dropped) == ("bad hands, worst quality", ("a",))


def test_term_that_never_fits_does_not_keep_out_the_others() -> None:
    fitted = fit_terms(["a b c d e f", "text"], count_words, budget=5)
    assert (fitted.text, fitted.dropped) == ("text", ("a b c d e f",))


@given(TERMS, st.integers(0, 20))
def test_fitted_terms_are_whole_in_order_and_within_the_budget(terms: list[str], budget: int) -> None:
    fitted = fit_terms(terms, count_words, budget=budget)
    kept = fitted.text.split(", ") if fitted.text else []
    assert count_words(fitted.text) <= budget
    assert sorted([*kept, *fitted.dropped]) == sorted(terms)
    possible = [term for term in terms if count_words(term) <= budget]
    assert kept == possible[: len(kept)]


@given(st.text(max_size=200))
def test_any_prompt_has_a_negative_prompt_without_duplicates(prompt: str) -> None:
    terms = [term.casefold() for term in negative_terms(None, prompt)]
    assert len(terms) == len(set(terms))
