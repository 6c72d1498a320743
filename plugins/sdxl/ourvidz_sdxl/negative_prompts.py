"""Choose the negative prompt: the producer's own or one made for the prompt, fitted to the encoder.

Where several people are in the scene, terms against merged bodies, extra limbs and a
wrong head count are added, also to the producer's own negative prompt, after its terms.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable

from attrs import frozen

from ourvidz_sdxl.prompts import plain_text, split_terms

#: What both text encoders take in one piece, without the marks of begin and end.
TOKEN_BUDGET = 75

QUALITY_TERMS = ("worst quality", "low quality", "lowres", "blurry", "jpeg artifacts")
PEOPLE_TERMS = ("bad anatomy", "bad hands", "missing fingers", "extra fingers", "deformed face")
MARK_TERMS = ("watermark", "signature", "text", "logo")
#: The most useful first, since the last are the first to go.
SEVERAL_PEOPLE_TERMS = (
    "merged bodies",
    "extra heads",
    "extra limbs",
    "wrong number of people",
    "fused faces",
    "conjoined",
    "extra arms",
    "extra legs",
    "missing head",
)

#: Far beyond any real prompt; the patterns take time with the square of it.
_SEARCHED_CHARACTERS = 4000

_PERSON_PLURALS = {
    "person": "people|persons",
    "man": "men",
    "woman": "women",
    "gentleman": "gentlemen",
    "child": "children",
    "wife": "wives",
    "lady": "ladies",
    "baby": "babies",
    "policeman": "policemen",
    "fisherman": "fishermen",
}
_PERSON_WORDS = """
boy girl guy kid male female human adult teenager friend sibling brother sister twin lover husband father mother
parent son daughter grandparent grandmother grandfather bride groom king queen prince princess dancer singer musician
soldier student worker tourist player athlete actor actress model knight warrior monk nun nurse doctor teacher hiker
cyclist villager farmer sailor pirate astronaut wizard witch samurai passenger guest spectator onlooker performer
gymnast wrestler boxer fighter skater surfer swimmer runner couple triplet character stranger neighbour neighbor
colleague partner teammate bridesmaid
"""
_PERSONS = _PERSON_WORDS.split()


def _pattern(words: Iterable[str]) -> str:
    return "(?:" + "|".join(sorted(words, key=len, reverse=True)) + ")"


#: "men's shoes" are shoes.
_NOT_OWNER = r"\b(?!['\u2019]s\b)(?!-)"
_ONE = _pattern([*_PERSON_PLURALS, *(word for word in _PERSONS if word not in ("couple", "triplet"))]) + _NOT_OWNER
_MANY = (
    _pattern(
        [*_PERSON_PLURALS.values(), "actresses", "witches", *(f"{word}s" for word in _PERSONS if word != "couple")]
    )
    + r"\b(?!['\u2019])(?!-)"
)
_ADJECTIVES = r"(?:[\w-]+\s+){0,3}?"
_NONE = r"(?<!\bno )(?<!\bwithout )(?<!\bzero )(?<!\bnot )(?<!\bwithout any )(?<!\bone of the )"
_SEVERAL = [
    re.compile(pattern)
    for pattern in (
        # women, three men, many people
        rf"\b{_NONE}{_MANY}",
        # a couple, but not a couple of minutes; a family, but not a family car
        rf"\b{_NONE}(?:couple|duo|trio|quartet|quintet|sextet|group|gang|squad|choir|orchestra|ensemble)s?\b"
        rf"(?!['\u2019-])(?!\s+of\b)",
        rf"\b{_NONE}(?:family|families)\b(?!['\u2019-])(?!\s+(?:of|car|house|home|tree|room|van|crest|farm|dog|cat|pet"
        rf"|business|heirloom|recipe|restaurant|kitchen|sedan|bible|album)\b)",
        rf"\b{_NONE}teams?\b(?!['\u2019-])(?!\s+of\b)(?!\s+(?:logo|jersey|colou?rs|bus)\b)",
        rf"\b{_NONE}(?:crowds?|audience|mob|newlyweds|threesome|foursome|orgy|duet|everyone|everybody)\b(?!['\u2019-])",
        # both of them, three of us, each other
        r"\b(?:both|all|two|three|four|five|six|seven|eight|nine|ten|several|many|\d+)\s+of\s+(?:them|us|you)\b",
        r"\b(?:each other|one another)\b",
        # 2girls, 3boys
        r"\b(?:[2-9]|[1-9]\d+)\+?(?:girls?|boys?|men|women|people)\b",
        r"\b1(?:girl|boy|man|woman)\b.*\b1(?:girl|boy|man|woman)\b",
        # a man and a woman, bride and groom, a boy with his father
        rf"\b{_ONE}\W+(?:and|with|beside|behind|near|facing|hugging|embracing|kissing|holding|carrying|vs|versus"
        rf"|next\s+to|together\s+with|or)\s+{_ADJECTIVES}{_ONE}",
        # a man in a hat dancing, another man watching; but not a woman as a man
        rf"\b(?:a|an|one|the)\s+{_ADJECTIVES}{_ONE}.*\banother\s+{_ADJECTIVES}(?:{_ONE}|one\b)",
        rf"\b(?:a|an|one)\s+{_ADJECTIVES}{_ONE}.*(?<!\bas )(?<!\blike )(?<!\bnot )(?<!\bthan )(?<!\bof )"
        rf"\b(?:a|an|one)\s+{_ADJECTIVES}{_ONE}",
    )
]
_ANYONE = re.compile(rf"\b(?:{_ONE}|{_MANY}|portrait|selfie|face|hands?|he|she|1girl|1boy)\b")


@frozen(kw_only=True)
class NegativePrompt:
    """A negative prompt that fits, and the terms that did not."""

    text: str
    dropped: tuple[str, ...] = ()


def shows_several_people(prompt: str) -> bool:
    """Whether words or numbers of the prompt put more than one person into the scene."""
    text = _searchable(prompt)
    return any(pattern.search(text) for pattern in _SEVERAL)


def negative_terms(own: str | None, prompt: str) -> list[str]:
    """The terms for ``prompt``, duplicates removed: the producer's ``own`` first, else made for it."""
    scene_terms = SEVERAL_PEOPLE_TERMS if shows_several_people(prompt) else ()
    if own is not None and own.strip():
        return _distinct([*split_terms(own), *scene_terms])
    return _distinct(_generated_terms(prompt, scene_terms))


def fit_terms(terms: Iterable[str], count_tokens: Callable[[str], int], budget: int = TOKEN_BUDGET) -> NegativePrompt:
    """Keep whole terms from the front as long as they fit together.

    A term that alone is above the budget fits nowhere, so it does not keep out those after it.
    """
    kept: list[str] = []
    dropped: list[str] = []
    is_full = False
    for term in terms:
        if not is_full and count_tokens(", ".join([*kept, term])) <= budget:
            kept.append(term)
            continue
        dropped.append(term)
        is_full = is_full or count_tokens(term) <= budget
    return NegativePrompt(text=", ".join(kept), dropped=tuple(dropped))


def _generated_terms(prompt: str, scene_terms: Iterable[str]) -> list[str]:
    text = _searchable(prompt)
    people_terms = PEOPLE_TERMS if _ANYONE.search(text) else ()
    made = [*QUALITY_TERMS, *people_terms, *scene_terms, *MARK_TERMS]
    # "a logo of a fox" shall not be told to avoid logos.
    return [term for term in made if not re.search(rf"\b{re.escape(term)}", text)]


def _searchable(prompt: str) -> str:
    return " ".join(plain_text(prompt[:_SEARCHED_CHARACTERS]).lower().replace("_", " ").split())


def _distinct(terms: Iterable[str]) -> list[str]:
    first: dict[str, str] = {}
    for term in terms:
        first.setdefault(term.casefold(), term)
    return list(first.values())
