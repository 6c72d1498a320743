"""The pytest plugin of OurVidz: the fixture ``host``, and what a suite's conftest may say of it.

Outside the package, because importing the package takes a tenth of a second, which a
test run that does not ask for a host shall not pay.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from ourvidz_core import JobError
    from ourvidz_core.delivery.queue import Queue
    from ourvidz_core.plugins.loading import FoundPlugin
    from ourvidz_core.testing import PluginHost


@pytest.fixture
def host_plugins() -> Sequence[str | FoundPlugin] | None:
    """What ``host`` loads: distributions, or plugins that a test has made. All that are installed unless said."""
    return None


@pytest.fixture
def host_environ() -> Mapping[str, str]:
    """The settings of the plugins on ``host``, as environment variables. All others of ours are unset."""
    return {}


@pytest.fixture
def host_references() -> Mapping[str, Path | bytes | JobError]:
    """The pictures on ``host`` by their URL, or the error that fetching one ends in."""
    return {}


@pytest.fixture
def host_queue() -> Queue | None:
    """The queue that ``host.push`` fills and ``host.work`` empties. One in memory unless said."""
    return None


@pytest.fixture
def host(
    tmp_path: Path,
    host_plugins: Sequence[str | FoundPlugin] | None,
    host_environ: Mapping[str, str],
    host_references: Mapping[str, Path | bytes | JobError],
    host_queue: Queue | None,
) -> Iterator[PluginHost]:
    """Plugins on their own: the real walk of a job and the real worker, with everything else in this process.

    ``host.run(payload)`` takes a message to its outcome, its files below ``host.assets_dir``.
    ``host.push(payload)``, ``host.work()`` and ``host.callbacks_of(id)`` go through a queue
    and a worker. See :class:`ourvidz_core.testing.PluginHost`.
    """
    from ourvidz_core.testing.fixtures import isolated_host

    with isolated_host(
        tmp_path / "host",
        plugins=host_plugins,
        environ=host_environ,
        references=host_references,
        queue=host_queue,
    ) as made:
        yield made
