"""What the doctor sees of plugins: which are loaded, and why the others are not."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from ourvidz_core.plugins.loading import PluginRecord, PluginStatus
from ourvidz_core.wire.findings import Check, Finding


def plugin_check(records: Sequence[PluginRecord]) -> Check:
    """Every plugin that was found."""
    return Check(name="plugins", run=lambda: _look_at(records))


def _look_at(records: Sequence[PluginRecord]) -> Iterator[Finding]:
    if not any(record.job_types for record in records):
        yield Finding.red(
            "no plugin with job types is loaded, so there is nothing that a worker could do",
            cure="pip install one, ourvidz-sdxl for example, where ourvidz is installed",
        )
    for record in records:
        named = f"{record.distribution} {record.version}"
        if record.status is PluginStatus.FAILED:
            yield Finding.red(
                f"{named} does not load: {record.reason}",
                cure=f"mend or reinstall it, or leave it out: OURVIDZ_BLOCK_PLUGINS={record.distribution}",
            )
        elif record.status is PluginStatus.BLOCKED:
            yield Finding.yellow(
                f"{named} is blocked: {record.reason}; jobs of its types fail here as unknown",
                cure="change that setting, or pip uninstall it where it is not wanted",
            )
        else:
            yield Finding.green(f"{named}: {', '.join(record.job_types) or 'an extension'}")
