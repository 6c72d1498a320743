"""Plugins as they are installed: a broken one is told about and harms no other."""

from __future__ import annotations

import sys
import textwrap
from collections.abc import Callable
from pathlib import Path

import pytest

import ourvidz_core
from ourvidz_core.cli.main import main
from ourvidz_core.errors import DuplicateJobType, RequiredPluginMissing, UnknownJobType
from ourvidz_core.plugins import hookspecs
from ourvidz_core.plugins.loading import PluginRecord, installed_plugins, load_registry
from ourvidz_core.plugins.registry import Registry
from ourvidz_core.plugins.versions import HookDeprecated
from ourvidz_core.settings import Settings

GOOD = """
from ourvidz_core import JobType, hookimpl

@hookimpl
def register_job_types():
    yield JobType(name="{name}", queue="acme_queue", content_type="image")
"""

Install = Callable[..., None]


def load(site: Path, **settings: object) -> Registry:
    """The registry of what the test installed, and of nothing that its machine has besides."""
    names = {
        path.name.removesuffix(".dist-info").rsplit("-", 1)[0].replace("_", "-").lower()
        for path in site.glob("*.dist-info")
    }
    found = [plugin for plugin in installed_plugins() if plugin.distribution.replace("_", "-").lower() in names]
    return load_registry(Settings(**settings), found)


def record_of(registry: Registry, distribution: str) -> PluginRecord:
    (record,) = [record for record in registry.records if record.distribution == distribution]
    return record


def test_a_good_plugin_is_loaded_with_its_types_and_hooks(site: Path, install: Install) -> None:
    install("acme-good", GOOD.format(name="good"), version="1.2")

    registry = load(site)

    record = record_of(registry, "acme-good")
    assert (record.version, record.status, record.job_types) == ("1.2", "loaded", ("good",))
    assert record.hooks == ("register_job_types",)
    assert [job_type.name for job_type in registry.job_types] == ["good"]
    assert registry.queues == ("acme_queue",)


DECLARES = "from ourvidz_core import JobType, hookimpl\n@hookimpl\ndef register_job_types():\n"


@pytest.mark.parametrize(
    ("source", "reason"),
    [
        pytest.param("raise RuntimeError('no luck')", "(import) RuntimeError: no luck", id="raises on import"),
        pytest.param("import sys; sys.exit(3)", "(import) SystemExit: 3", id="exits on import"),
        pytest.param("def (:", "(import) SyntaxError", id="is no Python"),
        pytest.param(
            "import no_such_module_here", "(import) ModuleNotFoundError: No module named", id="lacks a module"
        ),
        pytest.param("from ourvidz_core import gone", "(import) ImportError", id="wants what core has not"),
        pytest.param(
            "from ourvidz_core import hookimpl\n@hookimpl\ndef generat(job): ...",
            "(validation) PluginValidationError: there is no hook 'generat'; the hooks are build_command",
            id="mistypes a hook",
        ),
        pytest.param(
            "from ourvidz_core import hookimpl\n@hookimpl\ndef generate(job, contxt): ...",
            "(validation) PluginValidationError",
            id="mistypes an argument",
        ),
        pytest.param(
            "from ourvidz_core import hookimpl\n@hookimpl\ndef generate(job): ...",
            "(job types) PluginValidationError: it answers generate and registers no job types",
            id="answers for others",
        ),
        pytest.param(DECLARES + "    return 5", "must answer an iterable of JobType, not 5", id="declares a number"),
        pytest.param(DECLARES + "    return 'acme'", "must answer an iterable of JobType", id="declares text"),
        pytest.param(DECLARES + "    return None", "must answer an iterable of JobType, not None", id="declares None"),
        pytest.param(
            DECLARES + "    return JobType(name='a', queue='q', content_type='image')",
            "must answer an iterable of JobType, not JobType",
            id="declares one, not many",
        ),
        pytest.param(DECLARES + "    yield {'name': 'a'}", "must yield JobType, not {'name'", id="yields nonsense"),
        pytest.param(
            DECLARES + "    yield JobType(name='a', queue='q', content_type='image')\n    raise KeyError('midway')",
            "(job types) KeyError: 'midway'",
            id="raises midway",
        ),
        pytest.param(
            DECLARES + "    for _ in range(2): yield JobType(name='a', queue='q', content_type='image')",
            "yields 'a' twice",
            id="declares one twice",
        ),
        pytest.param(
            DECLARES + "    yield JobType(name='A b', queue='q', content_type='image')",
            "(job types) ValueError: name must be 1 to 64",
            id="names one badly",
        ),
        pytest.param(
            DECLARES + "    yield JobType(name='a', queue='q', content_type='sound')",
            "'sound' is not a valid ContentType",
            id="makes sound",
        ),
        pytest.param(
            DECLARES + "    yield JobType(name='a', queue='q', content_type='image', preset={})",
            "preset must be an instance of an attrs class",
            id="presets a dict",
        ),
        pytest.param(DECLARES + "    import sys; sys.exit()", "(job types) SystemExit", id="exits while it declares"),
    ],
)
def test_a_broken_plugin_is_told_about_and_the_others_go_on(
    site: Path, install: Install, source: str, reason: str
) -> None:
    install("acme-broken", source, version="0.3")
    install("acme-good", GOOD.format(name="good"))

    registry = load(site)

    record = record_of(registry, "acme-broken")
    assert (record.status, record.job_types) == ("failed", ())
    assert reason in record.reason
    assert [job_type.name for job_type in registry.job_types] == ["good"]
    assert not registry.manager.has_plugin("acme-broken")
    with pytest.raises(
        UnknownJobType, match=r"no plugin owns 'bad'; the job types here are good; not loaded: acme-broken 0\.3"
    ):
        registry.get("bad")


def test_what_a_plugin_prints_does_not_reach_standard_output(
    site: Path, install: Install, capsys: pytest.CaptureFixture[str]
) -> None:
    install(
        "acme-loud",
        "print('at import')\n" + textwrap.dedent(GOOD.format(name="loud")).replace("yield", "print('later'); yield"),
    )

    load(site)

    seen = capsys.readouterr()
    assert seen.out == ""
    assert "at import" in seen.err


def test_two_owners_of_one_type_stop_the_start_with_both_names_and_the_cure(site: Path, install: Install) -> None:
    install("acme-a", GOOD.format(name="clip"), version="1.1")
    install("acme-b", GOOD.format(name="clip"), version="2.2")

    with pytest.raises(DuplicateJobType) as caught:
        load(site)

    assert str(caught.value) == (
        "'clip' is registered by acme-a 1.1 and acme-b 2.2. Block one of them: OURVIDZ_BLOCK_PLUGINS=acme-b"
    )
    assert [t.name for t in load(site, block_plugins=["acme-b"]).job_types] == ["clip"]


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"block_plugins": ["acme-trap"]}, "OURVIDZ_BLOCK_PLUGINS names it"),
        ({"block_plugins": ["Acme_Trap"]}, "OURVIDZ_BLOCK_PLUGINS names it"),
        ({"allow_plugins": ["acme-good"]}, "OURVIDZ_ALLOW_PLUGINS does not name it"),
        ({"allow_plugins": []}, "OURVIDZ_ALLOW_PLUGINS does not name it"),
        ({"allow_plugins": ["acme-trap"], "block_plugins": ["acme-trap"]}, "OURVIDZ_BLOCK_PLUGINS names it"),
    ],
    ids=["blocked", "blocked by another spelling", "not allowed", "none allowed", "allowed and blocked"],
)
def test_a_plugin_that_may_not_be_loaded_is_not_even_imported(
    site: Path, install: Install, tmp_path: Path, settings: dict, reason: str
) -> None:
    install("acme-trap", f"open({str(tmp_path / 'sprung')!r}, 'w')")

    registry = load(site, **settings)

    assert not (tmp_path / "sprung").exists()
    assert "acme_trap" not in sys.modules
    record = record_of(registry, "acme-trap")
    assert (record.status, record.reason) == ("blocked", reason)


@pytest.mark.parametrize("spelling", ["acme-good", "acme_good", "Acme.Good"])
def test_a_plugin_is_allowed_and_required_in_any_spelling(site: Path, install: Install, spelling: str) -> None:
    install("acme-good", GOOD.format(name="good"))

    assert load(site, allow_plugins=[spelling], require_plugins=[spelling]).job_types


@pytest.mark.parametrize(
    ("name", "settings", "said"),
    [
        pytest.param("acme-gone", {}, "acme-gone is required and not installed; pip install acme-gone", id="absent"),
        pytest.param("acme-bad", {}, "is required and failed: .import. RuntimeError: no luck", id="broken"),
        pytest.param("acme-bad", {"block_plugins": ["acme-bad"]}, "is required and blocked", id="blocked"),
    ],
)
def test_a_required_plugin_that_is_not_loaded_stops_the_start(
    site: Path, install: Install, name: str, settings: dict, said: str
) -> None:
    install("acme-bad", "raise RuntimeError('no luck')")

    with pytest.raises(RequiredPluginMissing, match=said):
        load(site, require_plugins=[name], **settings)


def test_an_extension_that_is_required_and_broken_stops_the_start_as_well(site: Path, install: Install) -> None:
    install("acme-rules", "from ourvidz_core import hookimpl\n@hookimpl\ndef reviews_job(job): ...")

    with pytest.raises(RequiredPluginMissing, match=r"acme-rules 1\.0 is required and failed: \(validation\)"):
        load(site, require_plugins=["acme-rules"])


# -- the version of the hooks


@pytest.mark.parametrize(
    ("requires", "status"),
    [
        pytest.param([], "loaded", id="says nothing"),
        pytest.param(["ourvidz-core"], "loaded", id="any"),
        pytest.param(["pillow>=10", "OurVidz.Core[embedded] >=1.2,<2"], "loaded", id="this major"),
        pytest.param(["ourvidz-core<3; python_version < '3'", "ourvidz-core"], "loaded", id="for another Python"),
        pytest.param(["ourvidz-core>=9; extra == 'next'"], "loaded", id="for an extra"),
        pytest.param(["ourvidz-core>=2,<3"], "incompatible", id="the next major"),
        pytest.param(["pillow", "ourvidz_core<1"], "incompatible", id="the major before"),
        pytest.param(["ourvidz-core>=1.9"], "incompatible", id="a later minor"),
    ],
)
def test_a_plugin_for_other_hooks_is_not_imported_and_listed_with_the_cure(
    site: Path,
    install: Install,
    monkeypatch: pytest.MonkeyPatch,
    requires: list[str],
    status: str,
) -> None:
    monkeypatch.setattr(ourvidz_core, "__version__", "1.3.0")
    install("acme-good", GOOD.format(name="good"), requires=requires)

    record = record_of(load(site), "acme-good")

    assert record.status == status
    assert ("acme_good" in sys.modules) is (status == "loaded")
    if status == "incompatible":
        assert record.reason.startswith("it needs ourvidz-core ")
        assert "and this is 1.3.0; pip install --upgrade acme-good ourvidz-core" in record.reason


def test_a_requirement_that_nobody_can_read_is_a_failure_of_its_plugin(site: Path, install: Install) -> None:
    install("acme-odd", "raise RuntimeError", requires=["ourvidz-core >>= 1"])

    assert "(metadata) InvalidRequirement" in record_of(load(site), "acme-odd").reason


def test_a_plugin_that_implements_what_will_be_gone_is_loaded_and_told_the_cure(
    site: Path, install: Install, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    hook = HookDeprecated("choose_bucket", since="1.2", removed_in="1.4", cure="set JobType.bucket")
    argument = HookDeprecated("context of build_command", since="1.2", removed_in="1.4", cure="use prepare_job")
    monkeypatch.setitem(hookspecs.choose_bucket.ourvidz_spec, "warn_on_impl", hook)
    monkeypatch.setitem(hookspecs.build_command.ourvidz_spec, "warn_on_impl_args", {"context": argument})
    source = GOOD.format(name="good") + "@hookimpl\ndef {}: ...\n"
    install("acme-hook", source.format("choose_bucket(job)").replace('"good"', '"a"'))
    install("acme-argument", source.format("build_command(job, context)").replace('"good"', '"b"'))
    install("acme-fine", source.format("build_command(job)").replace('"good"', '"c"'))

    with pytest.warns(HookDeprecated) as shown:
        registry = load(site)

    told = {record.distribution: (record.status, record.warnings) for record in registry.records}
    assert told == {
        "acme-hook": ("loaded", (str(hook),)),
        "acme-argument": ("loaded", (str(argument),)),
        "acme-fine": ("loaded", ()),
    }
    assert sorted(Path(warning.filename).name for warning in shown) == ["acme_argument.py", "acme_hook.py"]
    assert f"plugin acme-hook 1.0: {hook}" in caplog.text


def test_the_list_of_plugins_says_why_one_is_not_loaded_and_what_another_should_change(
    site: Path, install: Install, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    hook = HookDeprecated("choose_bucket", since="0.2", removed_in="0.4", cure="set JobType.bucket")
    monkeypatch.setitem(hookspecs.choose_bucket.ourvidz_spec, "warn_on_impl", hook)
    install("acme-hook", GOOD.format(name="hook") + "@hookimpl\ndef choose_bucket(job): ...\n")
    install("acme-next", GOOD.format(name="next"), requires=["ourvidz-core>=99"])
    install("acme-blocked", GOOD.format(name="blocked"))
    monkeypatch.setenv("OURVIDZ_ALLOW_PLUGINS", "acme-hook,acme-next,acme-blocked")
    monkeypatch.setenv("OURVIDZ_BLOCK_PLUGINS", "Acme.Blocked")
    monkeypatch.setenv("OURVIDZ_REQUIRE_PLUGINS", "acme-blocked")

    assert main(["plugins", "list"]) == 0

    printed = capsys.readouterr()
    rows = {line.split()[0]: line.split(maxsplit=3)[2:] for line in printed.out.splitlines()}
    assert rows["acme-hook"][0] == "loaded"
    assert rows["acme-blocked"] == ["blocked", "OURVIDZ_BLOCK_PLUGINS names it"]
    assert rows["acme-next"][0] == "incompatible"
    assert "pip install --upgrade acme-next ourvidz-core" in rows["acme-next"][1]
    assert f"acme-hook 1.0: {hook}" in printed.err


def test_of_a_distribution_that_is_installed_twice_the_first_counts(site: Path, install: Install) -> None:
    install("acme-good", GOOD.format(name="good"), version="1.0")
    install("acme-good", GOOD.format(name="good"), version="1.1")

    assert len([plugin for plugin in installed_plugins() if plugin.distribution == "acme-good"]) == 1


def test_the_remains_of_an_installation_harm_nothing(site: Path, install: Install) -> None:
    install("acme-good", GOOD.format(name="good"))
    for name, entry_points in (("rest", None), ("torn", "[ourvidz]\nx = torn_module\n"), ("odd", "no section\n\xff")):
        (site / f"{name}-1.0.dist-info").mkdir()
        if entry_points is not None:
            (site / f"{name}-1.0.dist-info" / "entry_points.txt").write_text(entry_points, "latin-1")

    registry = load_registry(Settings(allow_plugins=["acme-good", "x"]))

    assert [job_type.name for job_type in registry.job_types] == ["good"]
    assert record_of(registry, "x").status == "failed"


def test_plugins_of_another_group_are_none_of_ours(site: Path, install: Install) -> None:
    install("acme-other", "raise RuntimeError", group="pytest11-not")

    assert "acme-other" not in [plugin.distribution for plugin in installed_plugins()]


def test_plugins_come_in_the_order_of_their_names(site: Path, install: Install) -> None:
    for name in ("acme-c", "Acme-b", "acme-a"):
        install(name, GOOD.format(name=name.lower()))

    assert [record.distribution for record in load(site).records] == ["acme-a", "Acme-b", "acme-c"]
