"""Look at what a language model wrote: is it a prompt, and is it still the user's?"""

# ruff: noqa: RUF001 - users write in all scripts, so the signs of other scripts are meant.

from __future__ import annotations

import re
import unicodedata
from collections import Counter

#: As many of the user's first key words are looked for ...
KEY_WORDS = 8
#: ... and this share of them must be there. A model may say "sundown" for "sunset", not forget the lighthouse.
KEPT_SHARE = 0.5
#: This many words in a row from the instruction are no accident.
ECHOED_WORDS = 8
#: A token is rarely more letters than this; a server may not count.
CHARACTERS_PER_TOKEN = 12

_SENTENCE_END = re.compile(r"[.!?。！？…](?=[\s\"'”’)]|$)|[。！？]")
_PREAMBLE = re.compile(
    r"(sure|certainly|of course|absolutely|okay|ok|great|alright|understood|here(?:'s| is| are)\b|below is\b"
    r"|(?:the )?(?:\w+ ){0,3}(?:prompt|description|idea|version|answer|output)\s*[:：]"
    r"|当然|好的|以下是|下面是|这是(?:一个)?(?:优化|改写|扩展))",
    re.IGNORECASE,
)
#: Words that could as well begin a scene are a preamble only before these.
_PREAMBLE_ALONE = re.compile(r"\s*[,!.:，！。：—-]")
_COULD_BEGIN_A_SCENE = ("okay", "ok", "great", "absolutely", "alright", "sure")
_REFUSAL = re.compile(
    r"i(?:'|’)?\s?a?m (?:sorry|unable)|i (?:can(?:'|’|no)?t|cannot|won(?:'|’)t)\b|as an ai\b|抱歉|对不起|很抱歉|我无法",
    re.IGNORECASE,
)
_CLOSING = re.compile(r"\b(?:let me know|feel free to|i hope this|would you like me)\b", re.IGNORECASE)
_MARKUP = re.compile(r"^\s*(?:#{1,6}\s|[-*•+]\s|\d{1,2}[.)]\s|>\s|```|\|)|\*\*|__|<\|", re.MULTILINE)
_PARAGRAPHS = re.compile(r"\n\s*\n")
_QUOTES = (('"', '"'), ("'", "'"), ("“", "”"), ("‘", "’"), ("«", "»"), ("「", "」"), ("`", "`"))
_WORD = re.compile(r"[^\W\d_]+")
#: Scripts that are written without spaces: each letter is looked for by itself.
_WITHOUT_SPACES = frozenset({"CJK", "HIRAGANA", "KATAKANA", "THAI", "LAO", "KHMER", "MYANMAR"})
_EAST_ASIAN = frozenset({"CJK", "HIRAGANA", "KATAKANA"})
_LITTLE_WORDS = """
    a about an and are as at be been being but by can do for from had has have he her his i in into is it its just like
    make me my near no not of off on onto or our out over please she show so some than that the their them then there
    these they this those through to under up very want was we were what when where which while who will with would you
    your image picture photo video clip 的 了 着 在 是 和 与 一 只 个 有 里 上 下 中 这 那 我 你 他 她 它 地 得
"""
#: They say nothing of what is shown.
LITTLE_WORDS = frozenset(_LITTLE_WORDS.split())


def tidied(text: str) -> str:
    """``text`` as one line, without the quotation marks around it. A second paragraph stays one."""
    text = text.replace("\r\n", "\n").strip()
    for opening, closing in _QUOTES:
        if len(text) > 1 and text[0] == opening and text[-1] == closing and opening not in text[1:-1]:
            text = text[1:-1].strip()
    if _MARKUP.search(text) or _PARAGRAPHS.search(text):
        return text
    return " ".join(text.split())


def finished_part(text: str) -> str:
    """``text`` up to the end of its last whole sentence; empty where it has none."""
    ends = list(_SENTENCE_END.finditer(text))
    return text[: ends[-1].end()] if ends else ""


def fault_of(text: str, *, prompt: str, instruction: str, max_tokens: int) -> str | None:
    """Why ``text`` is no enhancement of ``prompt``, in words for a report; None where it is one."""
    if not _WORD.search(text) and not any(unicodedata.category(letter) == "So" for letter in text):
        return "the model wrote nothing"
    if any(letter == "\ufffd" or (unicodedata.category(letter) == "Cc" and letter not in "\n\t") for letter in text):
        return "the text holds broken characters"
    if _echoes(text, instruction):
        return "it repeats the instruction"
    if len(text) > max_tokens * CHARACTERS_PER_TOKEN:
        return "the text is longer than the token budget"
    if _words_of(text) == _words_of(prompt):
        return "it repeats the prompt unchanged"
    if _REFUSAL.match(text):
        return "the model refused"
    if _is_preamble(text) or _CLOSING.search(text):
        return "it talks to the user in place of describing"
    if _MARKUP.search(text):
        return "it holds markup"
    if _PARAGRAPHS.search(text):
        return "it has more than one paragraph"
    if _script_of(prompt) not in (None, _script_of(text)):
        return "it is in another language than the prompt"
    wanted = key_words(prompt)
    kept = [word for word in wanted if _is_kept(word, text)]
    if len(kept) < KEPT_SHARE * len(wanted):
        return f"it keeps {len(kept)} of the prompt's {len(wanted)} key words"
    return None


def key_words(prompt: str) -> tuple[str, ...]:
    """The first words of ``prompt`` that say what is shown, in small letters."""
    words: dict[str, None] = {}
    for word in _words_of(prompt):
        parts = word if _script_of(word) in _WITHOUT_SPACES else (word,)
        words |= dict.fromkeys(part for part in parts if part not in LITTLE_WORDS)
    return tuple(words)[:KEY_WORDS]


def _words_of(text: str) -> list[str]:
    return _WORD.findall(unicodedata.normalize("NFKC", text).casefold())


def _is_kept(word: str, text: str) -> bool:
    if _script_of(word) in _WITHOUT_SPACES:
        return word in unicodedata.normalize("NFKC", text)
    # "foxes" for "fox" and "rock" for "rocky" will do.
    stem = word[: max(4, len(word) - 2)]
    return any(other.startswith(stem) for other in _words_of(text))


def _echoes(text: str, instruction: str) -> bool:
    given, written = _words_of(instruction), _words_of(text)
    runs = {tuple(given[place : place + ECHOED_WORDS]) for place in range(len(given) - ECHOED_WORDS + 1)}
    return any(tuple(written[place : place + ECHOED_WORDS]) in runs for place in range(len(written) - ECHOED_WORDS + 1))


def _is_preamble(text: str) -> bool:
    begin = _PREAMBLE.match(text)
    if begin is None:
        return False
    if begin[0].casefold() in _COULD_BEGIN_A_SCENE:
        return _PREAMBLE_ALONE.match(text, begin.end()) is not None
    return True


def _script_of(text: str) -> str | None:
    """The script that most letters are of, by the first word of their Unicode names."""
    scripts = Counter(
        unicodedata.name(letter, "?").split()[0]
        for letter in unicodedata.normalize("NFKC", text)
        if unicodedata.category(letter)[0] == "L"
    )
    if not scripts:
        return None
    (script, _), *_ = scripts.most_common(1)
    return "CJK" if script in _EAST_ASIAN else script
