"""WAN jobs whose prompt a language model rewrites first: four job types for OurVidz."""

from __future__ import annotations

__version__ = "0.1.0"
