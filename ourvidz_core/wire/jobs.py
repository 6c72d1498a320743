"""A job: one payload as the plugin that owns its type understood it."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from datetime import datetime
from enum import StrEnum
from pathlib import Path
from typing import Any

import attrs
from attrs import field, frozen

from ourvidz_core.errors import Fault, PayloadError
from ourvidz_core.wire.payloads import Payload, shown

#: Seeds that we draw lie below this, as the deployed producer's do.
SEED_LIMIT = 2**31


class ReferenceMode(StrEnum):
    """Which reference images a job carries, in the words of the wire."""

    NONE = "none"
    SINGLE = "single"
    START = "start"
    END = "end"
    BOTH = "both"


@frozen(kw_only=True)
class Reference:
    """One reference image: where the producer says it is and, once fetched, the local file.

    ``path`` is a clean PNG (decoded and written again by us), ``width`` and ``height``
    are its size in pixels.
    """

    #: Carries an access token in production, so it is never shown.
    url: str = field(repr=False)
    path: Path | None = None
    width: int | None = None
    height: int | None = None


@frozen(kw_only=True)
class References:
    """The reference images of one job, by what they stand for."""

    single: Reference | None = None
    start: Reference | None = None
    end: Reference | None = None

    @classmethod
    def choose(cls, *, single: str | None = None, start: str | None = None, end: str | None = None) -> References:
        """Keep the URLs that count: a start or an end beats a single one. Empty means absent."""
        if start or end:
            single = None
        return cls(
            single=Reference(url=single) if single else None,
            start=Reference(url=start) if start else None,
            end=Reference(url=end) if end else None,
        )

    @property
    def mode(self) -> ReferenceMode:
        """Which of the five modes these references make."""
        if self.start and self.end:
            return ReferenceMode.BOTH
        if self.start:
            return ReferenceMode.START
        if self.end:
            return ReferenceMode.END
        return ReferenceMode.SINGLE if self.single else ReferenceMode.NONE

    def __iter__(self) -> Iterator[tuple[str, Reference]]:
        """The references there are, as (role, reference)."""
        for role in ("single", "start", "end"):
            reference = getattr(self, role)
            if reference is not None:
                yield role, reference

    def replace(self, fetched: Mapping[str, Reference]) -> References:
        """These references with those of ``fetched`` in their roles."""
        return attrs.evolve(self, **dict(fetched))


@frozen(kw_only=True)
class Job:
    """One parsed request. Frozen: each step of the walk makes a new one with :func:`attrs.evolve`."""

    id: str
    job_type: str
    user_id: str
    prompt: str
    #: Image i of the job uses ``seed + i``.
    seed: int
    negative_prompt: str | None = None
    #: An instance of the class of the job type's preset.
    config: Any = None
    references: References = field(factory=References)
    model_variant: str | None = None
    created_at: datetime | None = None
    #: What the producer told its user to expect.
    expected_seconds: float | None = None
    #: How many assets the job must end with; None where only its command knows.
    asset_count: int | None = None
    #: The prompt after enhancement, where a plugin enhanced it.
    enhanced_prompt: str | None = None
    #: What the message asked for and this job will not do, by key of its ``config``.
    ignored_config: Mapping[str, Any] = field(factory=dict)
    #: Facts a plugin found while it parsed or prepared; they go into the callback's metadata.
    facts: Mapping[str, Any] = field(factory=dict)

    @property
    def texts(self) -> tuple[str | None, ...]:
        """What a person wrote, or a model in their place: it is kept out of logs."""
        return (self.prompt, self.negative_prompt, self.enhanced_prompt)

    @property
    def reference_mode(self) -> ReferenceMode:
        """Which reference images this job carries."""
        return self.references.mode


def seed_of(payload: Payload) -> int:
    """The seed a payload asks for, or one drawn for it.

    The first of ``config.seed`` and ``metadata.seed`` that is there counts; 0 is a seed.
    A job without one gets a number below 2**31 drawn from its id, so that a job which
    runs again after a crash makes the same picture again.

    :raises PayloadError: the seed is no integer from 0 to 2**63 - 1.
    """
    for path in ("config.seed", "metadata.seed"):
        seed = payload.get(path)
        if seed is None:
            continue
        if isinstance(seed, bool) or not isinstance(seed, int) or not 0 <= seed < 2**63:
            raise PayloadError.from_faults([Fault(f"$.{path}", "an integer from 0 to 2**63 - 1", shown(seed))])
        return seed
    digest = hashlib.sha256(payload.id.encode()).digest()
    return int.from_bytes(digest[:8], "big") % SEED_LIMIT
