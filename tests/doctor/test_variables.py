"""A setting that is misspelt is seen; the variables of plugins are left alone."""

from __future__ import annotations

import attrs

from ourvidz_core.doctor.variables import variables_check
from ourvidz_core.settings import Settings, variable_of
from ourvidz_core.wire.findings import Level


def test_a_misspelt_variable_is_named_with_the_one_that_is_meant() -> None:
    (finding,) = variables_check({"OURVIDZ_LEASE_SECOND": "5", "PATH": "/bin"}).run()
    assert finding.level is Level.YELLOW
    assert "OURVIDZ_LEASE_SECOND" in finding.message
    assert "OURVIDZ_LEASE_SECONDS" in finding.cure


def test_right_variables_and_those_of_plugins_are_not() -> None:
    right = [variable_of(field.name) for field in attrs.fields(Settings)]
    plugins = ["OURVIDZ_SETTINGS", "OURVIDZ_SDXL_MODEL", "OURVIDZ_WAN_CKPT_DIR", "OURVIDZ_ENHANCER_DEADLINE_SECONDS"]
    marks = ["OURVIDZ_WORKER_MARK", "OURVIDZ_STORAGE_URL", "OURVIDZ_ENHANCER_KEY"]
    (finding,) = variables_check(dict.fromkeys([*right, *plugins, *marks], "x")).run()
    assert finding.level is Level.GREEN
