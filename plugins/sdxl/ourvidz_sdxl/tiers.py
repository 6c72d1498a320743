"""Which steps of a job are taken: all of them, or in the fast tier about half. Imports nothing heavy."""

from __future__ import annotations

from ourvidz_core.engine.tiers import FastSteps

#: Every second step: what will be seen is decided in the middle, and fine structure at the end.
FAST = FastSteps(share=0.5, least=8)
