"""Owners answer for their own jobs, extensions hear of all, and a wrong answer names its plugin."""

from __future__ import annotations

from pathlib import Path

import attrs
import pytest

from ourvidz_core.errors import HookFailed, MetadataClash, PayloadError
from ourvidz_core.plugins.loading import FoundPlugin, load_registry
from ourvidz_core.plugins.registry import OwnedJobType, Registry
from ourvidz_core.settings import Settings
from ourvidz_core.testing.doubles import RecordingContext
from ourvidz_core.testing.host import plugin_of
from ourvidz_core.wire.artifacts import Artifact, Generation
from ourvidz_core.wire.events import Event
from ourvidz_core.wire.payloads import Payload

HEAD = """
import sys
from pathlib import Path
import attrs
from ourvidz_core import *
from ourvidz_core import Artifact, Command, Generation, Job, JobType, PayloadError, default_job, hookimpl
"""


def owner(name: str, body: str = "") -> FoundPlugin:
    declares = f"""
@hookimpl
def register_job_types():
    yield JobType(name="{name}", queue="{name}_queue", content_type="image")
"""
    return plugin_of(HEAD + declares + body, distribution=f"plugin-{name}")


def extension(name: str, body: str) -> FoundPlugin:
    return plugin_of(HEAD + body, distribution=f"ext-{name}")


def registry_of(*plugins: FoundPlugin) -> Registry:
    registry = load_registry(Settings(), plugins)
    assert all(record.status == "loaded" for record in registry.records), registry.records
    return registry


def payload_for(name: str) -> Payload:
    return Payload(id="job-1", type=name, prompt="a toy", user_id="u")


def generated(registry: Registry, name: str, work_dir: Path) -> Generation:
    owned = registry.get(name)
    job = owned.parse_job(payload_for(name))
    return owned.generate(job, None, RecordingContext(work_dir))


DRAWS = """
@hookimpl
def generate(job, context):
    return Generation(artifacts=(Artifact(path=context.output_path("png"), media_type="image/png"),), facts={facts})
"""


def draws(**facts: object) -> str:
    return DRAWS.replace("{facts}", repr(facts))


# -- who is asked


def test_each_owner_answers_for_its_own_jobs_only(tmp_path: Path) -> None:
    registry = registry_of(owner("a", draws(by="a")), owner("b", draws(by="b")), owner("c", draws(by="c")))

    assert [generated(registry, name, tmp_path).facts["by"] for name in "abc"] == ["a", "b", "c"]


def test_an_owners_mistake_does_not_touch_anothers_jobs(tmp_path: Path) -> None:
    broken = "\n".join(
        f"@hookimpl\ndef {hook}(): raise RuntimeError('mine')" for hook in ("parse_job", "prepare_job", "choose_bucket")
    )
    registry = registry_of(owner("a", draws(by="a")), owner("b", broken))

    assert generated(registry, "a", tmp_path).facts == {"by": "a"}
    with pytest.raises(HookFailed, match="plugin-b failed in parse_job: RuntimeError: mine"):
        registry.get("b").parse_job(payload_for("b"))


WRAPS = """
@hookimpl(wrapper=True)
def generate(job, context):
    generation = yield
    return attrs.evolve(generation, facts={**generation.facts, "wrapped_by": "NAME"})
"""


def test_an_extensions_wrapper_applies_to_every_owner(tmp_path: Path) -> None:
    registry = registry_of(owner("a", draws(by="a")), owner("b", draws(by="b")), extension("x", WRAPS))

    assert [generated(registry, name, tmp_path).facts for name in "ab"] == [
        {"by": "a", "wrapped_by": "NAME"},
        {"by": "b", "wrapped_by": "NAME"},
    ]


def test_an_owners_wrapper_applies_to_its_own_jobs_only(tmp_path: Path) -> None:
    own = WRAPS.replace("def generate", "def build_command").replace(
        'return attrs.evolve(generation, facts={**generation.facts, "wrapped_by": "NAME"})',
        "raise RuntimeError('wrapped')",
    )
    registry = registry_of(owner("a", draws()), owner("b", draws() + own))
    context = RecordingContext(tmp_path)

    assert registry.get("a").build_command(registry.get("a").parse_job(payload_for("a")), context) is None
    with pytest.raises(HookFailed, match="wrapped"):
        registry.get("b").build_command(registry.get("b").parse_job(payload_for("b")), context)


def test_core_answers_where_the_owner_has_none(tmp_path: Path) -> None:
    owned = registry_of(owner("a")).get("a")
    context = RecordingContext(tmp_path)
    job = owned.parse_job(payload_for("a"))

    assert owned.prepare_job(job, context) is job
    assert owned.build_command(job, context) is None
    assert owned.choose_bucket(job, Artifact(path=tmp_path, media_type="image/png")) == "a"
    with pytest.raises(HookFailed, match="implements neither build_command nor generate"):
        owned.generate(job, None, context)


def test_an_owner_that_answers_none_leaves_it_to_core(tmp_path: Path) -> None:
    body = "\n".join(f"@hookimpl\ndef {hook}(): return None" for hook in ("parse_job", "prepare_job", "choose_bucket"))
    owned = registry_of(owner("a", body)).get("a")

    job = owned.prepare_job(owned.parse_job(payload_for("a")), RecordingContext(tmp_path))

    assert owned.choose_bucket(job, Artifact(path=tmp_path, media_type="image/png")) == "a"


# -- wrong answers


def ask(owned: OwnedJobType, hook: str, work_dir: Path) -> object:
    job, context = attrs.evolve(DEFAULT.parse_job(payload_for("a"))), RecordingContext(work_dir)
    artifact = Artifact(path=work_dir / "a.png", media_type="image/png")
    return {
        "parse_job": lambda: owned.parse_job(payload_for("a")),
        "prepare_job": lambda: owned.prepare_job(job, context),
        "build_command": lambda: owned.build_command(job, context),
        "generate": lambda: owned.generate(job, None, context),
        "choose_bucket": lambda: owned.choose_bucket(job, artifact),
        "enrich_metadata": lambda: owned.enrich_metadata(job, Generation(artifacts=(artifact,)), {"seed": 7}),
    }[hook]()


DEFAULT = registry_of(owner("a")).get("a")
ASKED = ("parse_job", "prepare_job", "build_command", "generate", "choose_bucket", "enrich_metadata")


@pytest.mark.parametrize("hook", ASKED)
@pytest.mark.parametrize(
    ("statement", "said", "error_type"),
    [
        pytest.param("return ['nonsense']", "it answered ['nonsense'], not a", "HookFailed", id="nonsense"),
        pytest.param("raise KeyError('x')", "KeyError: 'x'", "KeyError", id="raises"),
        pytest.param("sys.exit(3)", "it called sys.exit(3); raise an error instead", "HookFailed", id="exits"),
        pytest.param("return 0", "it answered 0", "HookFailed", id="zero"),
    ],
)
def test_a_hook_that_misbehaves_is_named_with_its_plugin(
    tmp_path: Path, hook: str, statement: str, said: str, error_type: str
) -> None:
    owned = registry_of(owner("a", f"@hookimpl\ndef {hook}(): {statement}")).get("a")

    with pytest.raises(HookFailed) as caught:
        ask(owned, hook, tmp_path)

    assert caught.value.message.startswith(f"plugin-a failed in {hook}: ")
    assert said in caught.value.message
    assert caught.value.error_type == error_type


@pytest.mark.parametrize("hook", ASKED)
def test_an_error_of_ours_passes_as_it_is(tmp_path: Path, hook: str) -> None:
    owned = registry_of(owner("a", f"@hookimpl\ndef {hook}(): raise PayloadError('too short')")).get("a")

    with pytest.raises(PayloadError, match=r"^too short$"):
        ask(owned, hook, tmp_path)


@pytest.mark.parametrize(
    ("hook", "statement", "said"),
    [
        ("parse_job", "return attrs.evolve(default_job(job_type, payload), id='other')", "changed the job's id"),
        ("parse_job", "return attrs.evolve(default_job(job_type, payload), user_id='other')", "changed the job's id"),
        ("parse_job", "return attrs.evolve(default_job(job_type, payload), job_type='b')", "changed the job's id"),
        ("parse_job", "return attrs.evolve(default_job(job_type, payload), config={})", "config is {}, not a NoConfig"),
        ("parse_job", "return attrs.evolve(default_job(job_type, payload), facts={'a': {1}})", "facts hold something"),
        ("parse_job", "return attrs.evolve(default_job(job_type, payload), facts=[])", "facts is [], not a mapping"),
        ("prepare_job", "return attrs.evolve(job, id='other')", "changed the job's id"),
        ("prepare_job", "return attrs.evolve(job, config=None)", "config is None, not a NoConfig"),
        ("prepare_job", "return attrs.evolve(job, facts={'a': float('nan')})", "facts hold something"),
        ("prepare_job", "return attrs.evolve(job, ignored_config={'a': '\\ud800'})", "ignored_config hold something"),
        ("generate", "return Generation(artifacts=())", "without artifacts"),
        ("generate", "return Generation(artifacts='a.png')", "without artifacts"),
        ("generate", "return Generation(artifacts=(Artifact(path='a', media_type='b'),))", "not an Artifact with a"),
        ("choose_bucket", "return '../x'", "'../x' is no bucket name"),
        ("choose_bucket", "return ''", "'' is no bucket name"),
        ("enrich_metadata", "return {'a': {1}}", "its answer hold something that JSON cannot"),
        ("enrich_metadata", "return {1: 2}", "its answer have a key that is no string"),
        ("enrich_metadata", "return {'a': float('inf')}", "its answer hold something that JSON cannot"),
    ],
)
def test_an_answer_of_the_right_kind_can_still_be_wrong(tmp_path: Path, hook: str, statement: str, said: str) -> None:
    arguments = {"parse_job": "job_type, payload", "prepare_job": "job"}.get(hook, "")
    owned = registry_of(owner("a", f"@hookimpl\ndef {hook}({arguments}): {statement}")).get("a")

    with pytest.raises(HookFailed) as caught:
        ask(owned, hook, tmp_path)

    assert said in caught.value.message
    assert "plugin-a" in caught.value.message


# -- metadata


def metadata_of(registry: Registry, name: str, tmp_path: Path) -> dict[str, object]:
    owned = registry.get(name)
    artifact = Artifact(path=tmp_path / "a.png", media_type="image/png")
    return owned.enrich_metadata(owned.parse_job(payload_for(name)), Generation(artifacts=(artifact,)), {"seed": 7})


def test_metadata_comes_from_core_the_owner_and_every_extension(tmp_path: Path) -> None:
    registry = registry_of(
        owner("a", "@hookimpl\ndef enrich_metadata(job): return {'owner': job.job_type}"),
        owner("b", "@hookimpl\ndef enrich_metadata(): return {'other': 1}"),
        extension("x", "@hookimpl\ndef enrich_metadata(generation): return {'files': len(generation.artifacts)}"),
        extension("y", "@hookimpl\ndef enrich_metadata(): return None"),
    )

    assert metadata_of(registry, "a", tmp_path) == {"seed": 7, "owner": "a", "files": 1}


@pytest.mark.parametrize(
    ("first", "second", "named"),
    [
        pytest.param("mine", "mine", ("ext-x", "plugin-a"), id="owner and extension"),
        pytest.param("mine", "seed", ("ext-x", "ourvidz-core"), id="extension and core"),
    ],
)
def test_one_key_from_two_names_both(tmp_path: Path, first: str, second: str, named: tuple[str, str]) -> None:
    registry = registry_of(
        owner("a", f"@hookimpl\ndef enrich_metadata(): return {{'{first}': 1}}"),
        extension("x", f"@hookimpl\ndef enrich_metadata(): return {{'{second}': 1}}"),
    )

    with pytest.raises(MetadataClash) as caught:
        metadata_of(registry, "a", tmp_path)

    assert all(name in caught.value.message for name in named)
    assert f"'{second}'" in caught.value.message


# -- events


@pytest.mark.parametrize("statement", ["raise RuntimeError('deaf')", "sys.exit(1)"], ids=["raises", "exits"])
def test_an_observer_that_fails_silences_nobody(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, statement: str
) -> None:
    hears = f"@hookimpl\ndef handle_event(event): open({str(tmp_path / 'NAME')!r}, 'w').write(event.job_id)"
    registry = registry_of(
        extension("a", hears.replace("NAME", "a")),
        extension("b", f"@hookimpl\ndef handle_event(event): {statement}"),
        owner("c", hears.replace("NAME", "c")),
    )

    registry.report(Event(job_id="job-1", job_type="c"))

    assert [(tmp_path / name).read_text() for name in "ac"] == ["job-1", "job-1"]
    assert "ext-b failed in handle_event on Event" in caplog.text


def test_no_plugin_at_all_is_no_fault() -> None:
    registry = load_registry(Settings(), [])

    registry.report(Event(job_id="a", job_type="b"))
    assert (registry.job_types, registry.queues) == ((), ())
