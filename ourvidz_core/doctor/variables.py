"""What the doctor sees of the environment: variables that nothing reads, because their name is misspelt."""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Mapping

import attrs

from ourvidz_core.settings import PREFIX, SETTINGS_FILE, STORAGE_SECTION, Settings, variable_of
from ourvidz_core.wire.findings import Check, Finding

#: Plugins have variables of their own, so only what is nearly one of ours is held to be meant as that.
_NEARLY = 0.9


def variables_check(environ: Mapping[str, str]) -> Check:
    """Variables of ours that are nearly settings."""
    return Check(name="settings", run=lambda: _look_at_variables(environ))


def _look_at_variables(environ: Mapping[str, str]) -> Iterator[Finding]:
    known = {SETTINGS_FILE, *(variable_of(field.name) for field in attrs.fields(Settings))}
    of_storage = variable_of("", STORAGE_SECTION)
    misspelt = False
    for name in sorted(environ.keys() - known):
        near = difflib.get_close_matches(name, known, n=1, cutoff=_NEARLY) if name.startswith(PREFIX) else []
        if near and not name.startswith(of_storage):
            misspelt = True
            yield Finding.yellow(f"nothing of ours reads {name}", cure=f"if {near[0]} is meant, rename it")
    if not misspelt:
        yield Finding.green("no variable is nearly the name of a setting")
