"""A policy refuses a job before anything is fetched, or an artifact before anything is uploaded."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from ourvidz_core.engine.protocol import decode_error, encode_error
from ourvidz_core.errors import PolicyRefused, ReferenceServerFailed
from ourvidz_core.testing.host import PluginHost, plugin_of
from ourvidz_core.worker.runner import Outcome

URL = "https://a.example/x.png?token=canary"

OWNER = """
import attrs
from attrs import frozen
from ourvidz_core import Artifact, Generation, JobType, hookimpl

made = []
heard = []

@frozen(kw_only=True)
class Config:
    files: int = 3
    rewritten: str = ""

@hookimpl
def register_job_types():
    yield JobType(name="acme", queue="acme_queue", content_type="image", preset=Config())

@hookimpl
def prepare_job(job):
    return attrs.evolve(job, enhanced_prompt=job.config.rewritten) if job.config.rewritten else job

@hookimpl
def generate(job, context):
    from PIL import Image
    made.append(job.id)
    artifacts = []
    for shade in range(job.config.files):
        path = context.output_path("png")
        image = Image.linear_gradient("L").convert("RGB")
        image.putpixel((0, 0), (shade, 0, 0))
        image.save(path)
        artifacts.append(Artifact(path=path, media_type="image/png"))
    return Generation(artifacts=tuple(artifacts))

@hookimpl
def handle_event(event):
    heard.append(type(event).__name__)
"""

HEAD = """
from ourvidz_core import PolicyRefused, hookimpl
seen = []
"""

POLICY = (
    HEAD
    + """
@hookimpl
def review_job(job):
    seen.append(job.enhanced_prompt or job.prompt)
    if "forbidden" in seen[-1]:
        raise PolicyRefused("not here", details={"rule": "words"})

@hookimpl
def review_artifact(job, artifact, context):
    from PIL import Image
    with Image.open(artifact.path) as image:
        if image.getpixel((0, 0))[0] == 2:
            raise PolicyRefused("picture 2 is not allowed")
"""
)


@pytest.fixture
def guarded(host: Callable[..., PluginHost]) -> Callable[..., PluginHost]:
    """Makes hosts of the owner and of a policy."""
    return lambda policy=POLICY, **parts: host(
        plugin_of(OWNER, distribution="acme"), plugin_of(policy, distribution="policy"), **parts
    )


def module(host: PluginHost, name: str) -> object:
    return host.registry.manager.get_plugin(name)


def stored(host: PluginHost) -> list[Path]:
    return [path for path in host.assets_dir.rglob("*") if path.is_file()]


def told(outcome: Outcome) -> tuple[str, str, list, dict]:
    body = outcome.callback.to_json()
    return body["status"], body["error_message"], body["assets"], body["metadata"]


def test_a_refused_job_fetches_nothing_makes_nothing_and_says_who_refused_it(
    guarded: Callable, payload: Callable
) -> None:
    # The reference server is down: whoever asked it would fail with its error.
    host = guarded(references={URL: ReferenceServerFailed("down")})

    outcome = host.run(payload(prompt="a forbidden thing", config={"image": URL}))

    status, message, assets, metadata = told(outcome)
    assert (status, message, assets) == ("failed", "not here", [])
    assert (metadata["error_type"], metadata["refused_by"], metadata["rule"]) == ("PolicyRefused", "policy", "words")
    assert not outcome.error.is_transient
    assert module(host, "acme").made == []
    assert module(host, "acme").heard == ["JobFailed"]
    assert "forbidden" not in str(metadata)


def test_a_job_that_passes_is_reviewed_once(guarded: Callable, payload: Callable) -> None:
    host = guarded()

    outcome = host.run(payload(prompt="a boat", config={"files": 2}))

    assert outcome.error is None
    assert len(stored(host)) == 2
    assert module(host, "policy").seen == ["a boat"]


def test_a_prompt_that_is_rewritten_is_reviewed_again_before_anything_is_made(
    guarded: Callable, payload: Callable
) -> None:
    host = guarded()

    outcome = host.run(payload(prompt="a boat", config={"rewritten": "a forbidden boat"}))

    assert told(outcome)[3]["error_type"] == "PolicyRefused"
    assert module(host, "policy").seen == ["a boat", "a forbidden boat"]
    assert module(host, "acme").made == []


def test_one_refused_artifact_keeps_all_of_the_job_out_of_storage(guarded: Callable, payload: Callable) -> None:
    host = guarded()

    outcome = host.run(payload(config={"files": 3}))

    status, message, assets, metadata = told(outcome)
    assert (status, message, assets) == ("failed", "picture 2 is not allowed", [])
    assert (metadata["error_type"], metadata["refused_by"]) == ("PolicyRefused", "policy")
    assert stored(host) == []
    assert "AssetStored" not in module(host, "acme").heard
    assert module(host, "acme").heard[-1] != "JobCompleted"


@pytest.mark.parametrize(
    ("body", "error_type", "said"),
    [
        pytest.param("raise RuntimeError('my list is gone')", "RuntimeError", "policy failed in", id="raises"),
        pytest.param("import sys; sys.exit(0)", "HookFailed", "it called sys.exit(0)", id="exits"),
        pytest.param("return False", "HookFailed", "it answered False; to refuse, raise PolicyRefused", id="False"),
        pytest.param("return True", "HookFailed", "it answered True; to refuse, raise PolicyRefused", id="True"),
        pytest.param("yield", "HookFailed", "its wrapper answered None; a wrapper answers what", id="wraps badly"),
    ],
)
@pytest.mark.parametrize("hook", ["review_job", "review_artifact"])
def test_nothing_passes_a_policy_that_is_broken(
    guarded: Callable, payload: Callable, hook: str, body: str, error_type: str, said: str
) -> None:
    host = guarded(f"{HEAD}\n@hookimpl(wrapper={body == 'yield'})\ndef {hook}(job):\n    {body}\n")

    outcome = host.run(payload())

    status, message, assets, metadata = told(outcome)
    assert (status, assets, metadata["error_type"]) == ("failed", [], error_type)
    assert said in message
    assert stored(host) == []


def test_a_policy_of_another_owner_has_no_say_in_this_ones_jobs(
    host: Callable[..., PluginHost], payload: Callable
) -> None:
    other = POLICY + "\nfrom ourvidz_core import JobType\n@hookimpl\ndef register_job_types():\n"
    other += "    yield JobType(name='other', queue='q', content_type='image')\n"
    both = host(plugin_of(OWNER, distribution="acme"), plugin_of(other, distribution="other"))

    assert both.run(payload(prompt="a forbidden thing")).error is None
    assert told(both.run(payload(type="other", prompt="a forbidden thing")))[3]["refused_by"] == "other"


def test_no_other_plugin_can_take_a_refusal_back(host: Callable[..., PluginHost], payload: Callable) -> None:
    lenient = """
        from ourvidz_core import hookimpl

        @hookimpl(wrapper=True)
        def review_job(job):
            try:
                return (yield)
            except Exception:
                return []

        @hookimpl(wrapper=True, specname="review_artifact")
        def artifact_passes(job):
            try:
                return (yield)
            except Exception:
                return []
    """
    whole = host(
        plugin_of(OWNER, distribution="acme"),
        plugin_of(lenient, distribution="a-lenient"),
        plugin_of(POLICY, distribution="policy"),
        plugin_of(lenient, distribution="z-lenient"),
    )

    assert told(whole.run(payload(prompt="a forbidden thing")))[3]["refused_by"] == "policy"
    assert told(whole.run(payload(config={"files": 3})))[3]["refused_by"] == "policy"
    assert stored(whole) == []


@pytest.mark.parametrize(
    ("changes", "statuses"),
    [
        pytest.param({"prompt": "a forbidden thing"}, ["failed"], id="before it began"),
        pytest.param({"config": {"files": 3}}, ["processing", "failed"], id="after it was made"),
    ],
)
def test_a_refused_job_is_tried_once_reported_once_and_leaves_no_dead_letter(
    guarded: Callable, payload: Callable, changes: dict, statuses: list[str]
) -> None:
    host = guarded()
    host.push(payload(**changes))

    host.work()

    told_of = host.callbacks_of("job-1")
    assert [body["status"] for body in told_of] == statuses
    assert (told_of[-1]["metadata"]["error_type"], told_of[-1]["metadata"]["attempts"]) == ("PolicyRefused", 1)
    assert host.queue.dead_letters("acme_queue") == []
    assert stored(host) == []


def test_a_refusal_in_the_engine_process_is_a_refusal_in_the_worker() -> None:
    refusal = decode_error(encode_error(PolicyRefused("not here", details={"refused_by": "policy"})))

    assert type(refusal) is PolicyRefused
    assert (refusal.message, refusal.details, refusal.is_transient) == ("not here", {"refused_by": "policy"}, False)
