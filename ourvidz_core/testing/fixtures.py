"""What the fixtures of the pytest plugin are made of; imported when a test asks for one."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from packaging.utils import canonicalize_name

from ourvidz_core.delivery.queue import Queue
from ourvidz_core.errors import JobError, PluginError
from ourvidz_core.plugins.loading import FoundPlugin, installed_plugins
from ourvidz_core.settings import PREFIX, WELL_KNOWN_NAMES
from ourvidz_core.testing.host import PluginHost


@contextlib.contextmanager
def environment(variables: Mapping[str, str]) -> Iterator[None]:
    """``os.environ`` with ``variables`` and without any other setting of ours; as it was, afterwards."""
    before = dict(os.environ)
    for name in before:
        if name.startswith(PREFIX) or name in WELL_KNOWN_NAMES.values():
            del os.environ[name]
    os.environ.update(variables)
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)


@contextlib.contextmanager
def isolated_host(
    root: Path,
    *,
    plugins: Sequence[str | FoundPlugin] | None,
    environ: Mapping[str, str],
    references: Mapping[str, Path | bytes | JobError],
    queue: Queue | None = None,
) -> Iterator[PluginHost]:
    """A host below ``root`` that sees no setting of this machine. ``plugins`` None are all that are installed."""
    with (
        environment(environ),
        PluginHost(root, *_chosen(plugins), references=references, queue=queue) as host,
    ):
        yield host


def _chosen(plugins: Sequence[str | FoundPlugin] | None) -> list[FoundPlugin]:
    installed = {canonicalize_name(plugin.distribution): plugin for plugin in installed_plugins()}
    if plugins is None:
        return list(installed.values())
    chosen = []
    for plugin in plugins:
        if isinstance(plugin, str) and canonicalize_name(plugin) not in installed:
            raise PluginError(
                f"{plugin} is not installed as a plugin; pip install --editable . first"
                f" (installed: {', '.join(sorted(installed)) or 'none'})"
            )
        chosen.append(installed[canonicalize_name(plugin)] if isinstance(plugin, str) else plugin)
    return chosen
