"""Takes out of a text what must not be read by everybody: secrets, query strings of URLs, prompts.

A signed URL is a key, so the query string of every URL goes. Secrets and prompts are known
by their values: settings add theirs when they are loaded, jobs theirs for as long as they run.
"""

from __future__ import annotations

import contextlib
import json
import re
import threading
from collections import Counter
from collections.abc import Iterable, Iterator
from urllib.parse import quote

#: A secret of a few characters, such as a laptop's ``dev``, is found in many a path by chance.
SHORTEST_SECRET = 8
#: A prompt may be quoted in parts: these are looked for too.
_SHORTEST_CLAUSE = 12
_SHORTEST_PROMPT = 4
_LONGEST_PROMPT = 8000
_MOST_CLAUSES = 200

_QUERY = re.compile(r"(\bhttps?://[^\s?#\"'<>\\]{1,2000})\?[^\s\"'<>\\]*", re.IGNORECASE)
_SIGNED = re.compile(
    r"([?&](?:access_token|api_?key|auth|key|password|secret|sig|signature|token|x-amz-[a-z-]{1,40})=)[^&\s\"'<>\\]+",
    re.IGNORECASE,
)
_USER = re.compile(r"(\b[a-z][a-z0-9+.-]{1,20}://)[^\s/@\"']{1,500}@", re.IGNORECASE)
_AUTHORIZATION = re.compile(r"\b(bearer|basic)\s+[a-z0-9._~+/=-]{8,}", re.IGNORECASE)
_BETWEEN_CLAUSES = re.compile(r"[^\w\s-]+|[\r\n\t]+")


def without_queries(text: str) -> str:
    """``text`` with nothing of its URLs that could open a door: no query string, no user, no bearer token.

    >>> without_queries("GET https://host/a.png?token=abc failed")
    'GET https://host/a.png?... failed'
    """
    if "://" in text:
        text = _USER.sub(r"\1...@", _QUERY.sub(r"\1?...", text))
    if "=" in text:
        text = _SIGNED.sub(r"\1...", text)
    return _AUTHORIZATION.sub(r"\1 ...", text)


class Redactor:
    """What this process must not say, and texts without it. Thread-safe."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._secrets: set[str] = set()
        self._prompts: Counter[str] = Counter()
        self._secret_pattern: re.Pattern[str] | None = None
        self._prompt_pattern: re.Pattern[str] | None = None
        #: An operator may ask to see them.
        self.shows_prompts = False

    def add_secrets(self, secrets: Iterable[str]) -> None:
        """Never show these again, nor the way URLs and JSON spell them."""
        found = {spelt for secret in secrets if len(secret) >= SHORTEST_SECRET for spelt in _spellings(secret)}
        with self._lock:
            if not found <= self._secrets:
                self._secrets |= found
                self._secret_pattern = _any_of(self._secrets)

    @contextlib.contextmanager
    def without_prompts(self, *prompts: str | None) -> Iterator[None]:
        """Show none of these, nor their clauses, within the block."""
        clauses = Counter(clause for prompt in prompts if prompt for clause in _clauses(prompt))
        with self._lock:
            self._prompts += clauses
            self._prompt_pattern = _any_of(self._prompts, are_words=True)
        try:
            yield
        finally:
            with self._lock:
                self._prompts -= clauses
                self._prompt_pattern = _any_of(self._prompts, are_words=True)

    def __call__(self, text: str) -> str:
        """``text`` as it may be read."""
        if self._secret_pattern is not None:
            text = self._secret_pattern.sub("[secret]", text)
        text = without_queries(text)
        if self._prompt_pattern is not None and not self.shows_prompts:
            text = self._prompt_pattern.sub("[prompt]", text)
        return text


#: The one of this process, as its logging is one.
redact = Redactor()


def _spellings(secret: str) -> set[str]:
    return {secret, quote(secret, safe=""), json.dumps(secret)[1:-1], json.dumps(secret, ensure_ascii=False)[1:-1]}


def _clauses(prompt: str) -> set[str]:
    whole = prompt.strip()[:_LONGEST_PROMPT]
    clauses = [clause.strip() for clause in _BETWEEN_CLAUSES.split(whole)][:_MOST_CLAUSES]
    kept = {clause for clause in clauses if len(clause) >= _SHORTEST_CLAUSE}
    return kept | ({whole} if len(whole) >= _SHORTEST_PROMPT else set())


def _any_of(texts: Iterable[str], *, are_words: bool = False) -> re.Pattern[str] | None:
    # The longest first: what begins like another must not leave its end behind.
    pattern = "|".join(re.escape(text) for text in sorted(texts, key=len, reverse=True))
    if not pattern:
        return None
    # A line break that was made visible ends in a letter.
    start = r"(?:(?<!\w)|(?<=\\[nrt]))"
    return re.compile(rf"{start}(?:{pattern})(?!\w)" if are_words else pattern, re.IGNORECASE)
