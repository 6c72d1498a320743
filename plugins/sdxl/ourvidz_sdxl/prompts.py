"""Read a prompt's weights: ``(text:1.2)`` and nothing else is syntax.

All other parentheses, colons, plus signs and quotes are the user's own text, so
``a cat (sitting) on a C++ book, 4:3`` stays as it is. ``\\(`` and ``\\)`` are literal.
"""

from __future__ import annotations

import re
from itertools import accumulate, groupby

from attrs import frozen

#: A number outside this is no weight: ``(aspect 16:9)`` is text.
MIN_WEIGHT, MAX_WEIGHT = 0.0, 2.0

_NUMBER_AT_END = re.compile(r":\s*(\d{1,3}(?:\.\d{0,6})?|\.\d{1,6})\s*\Z")
#: A weight stands at most this many characters before its closing parenthesis.
_WEIGHT_CHARACTERS = 24


@frozen(kw_only=True)
class Fragment:
    """A piece of a prompt, and how much it counts; 1 is as much as any other text."""

    text: str
    weight: float = 1.0


def parse_weights(prompt: str) -> tuple[Fragment, ...]:
    """Split a prompt where its weight changes. Nested weights multiply, up to ``MAX_WEIGHT``.

    >>> parse_weights("a (red:1.5) fox (sitting)")
    (Fragment(text='a ', weight=1.0), Fragment(text='red', weight=1.5), Fragment(text=' fox (sitting)', weight=1.0))
    """
    groups = _weighted_groups(prompt)
    pieces: list[tuple[str, float]] = []
    weights = [1.0]
    ends: dict[int, int] = {}
    position = 0
    while position < len(prompt):
        character = prompt[position]
        if character == "\\" and prompt[position + 1 : position + 2] in ("(", ")"):
            pieces.append((prompt[position + 1], weights[-1]))
            position += 2
        elif position in groups:
            group = groups[position]
            weights.append(min(round(weights[-1] * group.weight, 6), MAX_WEIGHT))
            ends[group.colon] = group.close
            position += 1
        elif position in ends:
            weights.pop()
            position = ends[position] + 1
        else:
            pieces.append((character, weights[-1]))
            position += 1
    return tuple(
        Fragment(text="".join(text for text, _ in run), weight=weight)
        for weight, run in groupby(pieces, key=lambda piece: piece[1])
    )


def plain_text(prompt: str) -> str:
    """The prompt without its weights."""
    return "".join(fragment.text for fragment in parse_weights(prompt))


def split_terms(prompt: str) -> list[str]:
    """The terms between a prompt's commas; a comma inside a weighted group separates nothing."""
    groups = _weighted_groups(prompt)
    terms, start, inside_until = [], 0, -1
    for position, character in enumerate(prompt):
        if position in groups:
            inside_until = max(inside_until, groups[position].close)
        if character in ",\n" and position > inside_until:
            terms.append(prompt[start:position])
            start = position + 1
    terms.append(prompt[start:])
    return [" ".join(term.split()) for term in terms if term.strip()]


@frozen(kw_only=True)
class _Group:
    colon: int
    close: int
    weight: float


def _weighted_groups(prompt: str) -> dict[int, _Group]:
    """The groups that carry a weight, by the position of their opening parenthesis."""
    letters_before = list(accumulate((character.isalpha() for character in prompt), initial=0))
    groups: dict[int, _Group] = {}
    opened: list[int] = []
    escaped = False
    for position, character in enumerate(prompt):
        if escaped or character == "\\":
            escaped = not escaped and prompt[position + 1 : position + 2] in ("(", ")")
        elif character == "(":
            opened.append(position)
        elif character == ")" and opened:
            start = opened.pop()
            tail_start = max(start + 1, position - _WEIGHT_CHARACTERS)
            match = _NUMBER_AT_END.search(prompt[tail_start:position])
            if match is None or not MIN_WEIGHT <= float(match[1]) <= MAX_WEIGHT:
                continue
            colon = tail_start + match.start()
            # "(4:1)" is a ratio and "(12:00)" a time: a weight needs words to weigh.
            if letters_before[colon] > letters_before[start]:
                groups[start] = _Group(colon=colon, close=position, weight=float(match[1]))
    return groups
