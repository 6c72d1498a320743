"""WAN 2.1 for OurVidz: four job types, five reference modes and the ``wan_generate`` command line."""

from __future__ import annotations

__version__ = "0.1.0"
