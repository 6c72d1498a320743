"""Which distributions may be imported, by the operator's lists. Asked before anything of one is run."""

from __future__ import annotations

from packaging.utils import canonicalize_name

from ourvidz_core.settings import Settings


def refusal_of(distribution: str, settings: Settings) -> str | None:
    """Why ``distribution`` may not be imported; None where it may. Acme_Wan, acme.wan and acme-wan are one name."""
    name = canonicalize_name(distribution)
    if name in map(canonicalize_name, settings.block_plugins):
        return "OURVIDZ_BLOCK_PLUGINS names it"
    if settings.allow_plugins is not None and name not in map(canonicalize_name, settings.allow_plugins):
        return "OURVIDZ_ALLOW_PLUGINS does not name it"
    return None
