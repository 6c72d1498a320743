"""Where the small trained models lie: one directory each, in the layout that production models have."""

from __future__ import annotations

from pathlib import Path

_HERE = Path(__file__).resolve().parent

#: What the entry points of the group ``ourvidz.models`` name.
SDXL = _HERE / "sdxl"
WAN = _HERE / "wan"
QWEN = _HERE / "qwen"

_FAMILIES = {"sdxl": SDXL, "wan": WAN, "qwen": QWEN}


def path(family: str) -> Path:
    """The directory of the model of this family: ``sdxl``, ``wan`` or ``qwen``.

    >>> path("sdxl").name
    'sdxl'

    :raises ValueError: there is no such family.
    """
    if family not in _FAMILIES:
        raise ValueError(f"family must be one of {', '.join(_FAMILIES)}, not {family!r}")
    return _FAMILIES[family]
