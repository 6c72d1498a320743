"""A Redis for the tests of the dashboard, and scenes on it."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from ourvidz_core.delivery.embedded import EmbeddedRedis
from tests.dashboard.scenes import Scene, opened


@pytest.fixture
def scene_of(redis_server: EmbeddedRedis, tmp_path: Path) -> Iterator[Callable[..., Scene]]:
    """Makes dashboards on an emptied Redis: ``scene_of(token=...)``."""
    with contextlib.ExitStack() as stack:
        yield lambda **options: stack.enter_context(opened(tmp_path / "assets", redis_server, **options))


@pytest.fixture
def scene(scene_of: Callable[..., Scene]) -> Scene:
    return scene_of()
