"""What holds for every suite of the repository."""

from __future__ import annotations

import gc
import logging
from collections.abc import Iterator

import pytest


@pytest.fixture(autouse=True)
def logging_as_it_was() -> Iterator[None]:
    """A command that sets up logging for its process must not decide what a later test can see."""
    root = logging.getLogger()
    level, handlers = root.level, list(root.handlers)
    yield
    root.setLevel(level)
    root.handlers[:] = handlers


@pytest.fixture(autouse=True, scope="module")
def old_objects_left_alone() -> None:
    """Each host that closes collects garbage, a quarter of a second where torch is imported; what is here stays."""
    gc.collect()
    gc.freeze()
