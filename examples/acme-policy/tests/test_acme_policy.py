"""The policy refuses what its settings say, and tells the producer no more than it should."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import acme_policy
import pytest
from acme_policy import Policy, PolicySettings, black_share, holds
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from ourvidz_core.errors import SettingsError
from ourvidz_core.settings import load_section
from ourvidz_core.testing.distributions import make_distribution
from ourvidz_core.testing.doubles import RecordingContext
from ourvidz_core.testing.host import PluginHost, plugin_module, plugin_of
from ourvidz_core.wire.artifacts import Artifact
from ourvidz_core.worker.runner import Outcome

HERE = Path(acme_policy.__file__).parent

#: Draws pictures of which ``config.black`` percent are black.
DRAWS = """
import attrs
from attrs import frozen
from ourvidz_core import Artifact, Generation, JobType, hookimpl

@frozen(kw_only=True)
class Config:
    black: int = 0
    rewritten: str | None = None

@hookimpl
def register_job_types():
    yield JobType(name="acme_draw", queue="acme_queue", content_type="image", preset=Config())

@hookimpl
def prepare_job(job):
    return attrs.evolve(job, enhanced_prompt=job.config.rewritten)

@hookimpl
def generate(job, context):
    from PIL import Image
    artifacts = []
    for black in (0, job.config.black):
        path = context.output_path("png")
        image = Image.new("RGB", (100, 100), "white")
        image.paste((9, 0, 0), (0, 0, 100, black))
        image.putpixel((99, 99), (200, 0, 0))
        image.save(path)
        artifacts.append(Artifact(path=path, media_type="image/png"))
    return Generation(artifacts=tuple(artifacts))
"""


def message(prompt: str = "a boat", **config: object) -> dict[str, object]:
    return {"id": "job-1", "type": "acme_draw", "prompt": prompt, "user_id": "u1", "config": config}


@pytest.fixture
def host(tmp_path: Path) -> PluginHost:
    policy = Policy(PolicySettings(words=["forbidden", "not allowed"], black_share=0.6))
    drawer = plugin_of(DRAWS, distribution="acme-draw")
    with PluginHost(tmp_path, drawer, plugin_module(policy, distribution="acme-policy")) as made:
        assert [record.status for record in made.registry.records] == ["loaded", "loaded"]
        yield made


def refusal(outcome: Outcome) -> dict[str, object]:
    body = outcome.callback.to_json()
    assert (body["status"], body["assets"]) == ("failed", [])
    assert body["metadata"]["error_type"] == "PolicyRefused"
    assert body["metadata"]["refused_by"] == "acme-policy"
    return body


# -- prompts


@pytest.mark.parametrize(
    "prompt",
    [
        "forbidden",
        "a Forbidden, thing",
        "\uff26\uff2f\uff32\uff22\uff29\uff24\uff24\uff25\uff2e",
        "for\u200bbidden",
        "it is not \n allowed",
        "x-forbidden-y",
    ],
)
def test_a_word_of_the_list_is_found_in_any_spelling(prompt: str) -> None:
    assert any(holds(prompt, word) for word in ("forbidden", "not allowed"))


@pytest.mark.parametrize("prompt", ["", "unforbidden", "forbiddenly", "allowed, not", "nothing"])
def test_a_word_inside_another_is_another_word(prompt: str) -> None:
    assert not any(holds(prompt, word) for word in ("forbidden", "not allowed", "", " "))


@given(st.text(), st.text())
def test_whatever_stands_around_it_a_word_is_found(before: str, after: str) -> None:
    assert holds(f"{before} forbidden {after}", "Forbidden")


def test_a_refused_prompt_makes_nothing_and_the_callback_names_no_word(host: PluginHost) -> None:
    body = refusal(host.run(message("a forbidden boat")))

    assert body["error_message"].startswith("the prompt is against the rules")
    assert "forbidden" not in json.dumps(body)
    assert not host.assets_dir.exists() or not list(host.assets_dir.rglob("*.png"))


def test_what_a_prompt_was_rewritten_to_is_looked_at_too(host: PluginHost) -> None:
    refusal(host.run(message(rewritten="a boat that is not allowed")))


# -- pictures


@pytest.mark.parametrize("share", [0.0, 0.25, 1.0])
def test_the_black_share_is_counted_in_pixels(share: float) -> None:
    picture = Image.new("RGB", (20, 20), "white")
    picture.paste((16, 16, 16), (0, 0, 20, round(20 * share)))

    assert black_share(picture) == share


def test_one_black_picture_keeps_both_out_of_storage(host: PluginHost) -> None:
    body = refusal(host.run(message(black=70)))

    assert body["metadata"]["black_share"] == 0.7
    assert not list(host.assets_dir.rglob("*.png"))


def test_a_picture_at_the_limit_passes(host: PluginHost) -> None:
    outcome = host.run(message(black=60))

    assert outcome.error is None
    assert len(list(host.assets_dir.rglob("*.png"))) == 2


def test_with_nothing_set_everything_passes(tmp_path: Path) -> None:
    drawer = plugin_of(DRAWS, distribution="acme-draw")
    with PluginHost(tmp_path, drawer, plugin_module(Policy(PolicySettings()), distribution="acme-policy")) as host:
        assert host.run(message("forbidden", black=99)).error is None


def test_of_a_video_the_mean_of_its_frames_counts(tmp_path: Path) -> None:
    av = pytest.importorskip("av")
    path = tmp_path / "a.mp4"
    with av.open(path, "w") as container:
        stream = container.add_stream("libx264", rate=4)
        stream.width = stream.height = 64
        for colour in ("black", "black", "black", "white"):
            container.mux(stream.encode(av.VideoFrame.from_image(Image.new("RGB", (64, 64), colour))))
        container.mux(stream.encode())
    video, context = Artifact(path=path, media_type="video/mp4"), RecordingContext(tmp_path)

    Policy(PolicySettings(black_share=0.8)).review_artifact(video, context)
    with pytest.raises(acme_policy.PolicyRefused, match="almost black"):
        Policy(PolicySettings(black_share=0.7)).review_artifact(video, context)


def test_the_page_that_walks_through_it_shows_its_code() -> None:
    page = (HERE.parents[1] / "docs/how-to/moderate-content.md").read_text("utf-8")
    source = (HERE / "acme_policy.py").read_text("utf-8")
    shown = re.findall(r"```python\n(.*?)```", page, re.DOTALL)

    assert len(shown) == 1
    assert shown[0] in source


# -- installed


@pytest.fixture
def ourvidz(tmp_path: Path):
    """The command line, with the policy and a drawing plugin installed as pip leaves them."""
    declared = tomllib.loads((HERE / "pyproject.toml").read_text("utf-8"))["project"]
    site = tmp_path / "site"
    make_distribution(site, "acme-policy", (HERE / "acme_policy.py").read_text("utf-8"), version=declared["version"])
    entry_points = "\n".join(f"{name} = {value}" for name, value in declared["entry-points"]["ourvidz"].items())
    (site / f"acme_policy-{declared['version']}.dist-info/entry_points.txt").write_text(f"[ourvidz]\n{entry_points}\n")
    make_distribution(site, "acme-draw", DRAWS)
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("OURVIDZ_", "SUPABASE_"))}

    def run(*arguments: str, stdin: str = "", **environ: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-m", "ourvidz_core", *arguments],
            env={
                **kept,
                "PYTHONPATH": str(site),
                "OURVIDZ_ALLOW_PLUGINS": "acme-policy,acme-draw",
                "OURVIDZ_STATE_DIR": str(tmp_path / "state"),
                "OURVIDZ_WORK_DIR": str(tmp_path / "work"),
                **environ,
            },
            input=stdin,
            capture_output=True,
            text=True,
            check=False,
        )

    return run


def test_installed_it_reads_its_settings_in_the_worker_and_in_the_engine(ourvidz, tmp_path: Path) -> None:
    done = ourvidz(
        "run", "--json", "-", stdin=json.dumps(message(black=70)), OURVIDZ_ACME_POLICY_BLACK_SHARE="0.6"
    )  # fmt: skip

    assert done.returncode == 1, done.stderr
    answer = json.loads(done.stdout)
    assert answer["callback"]["metadata"]["error_type"] == "PolicyRefused"
    assert answer["callback"]["metadata"]["refused_by"] == "acme-policy"
    assert answer["assets"] == []
    assert not list((tmp_path / "state").rglob("*.png"))


def test_a_wrong_setting_keeps_it_from_being_imported() -> None:
    with pytest.raises(SettingsError, match="OURVIDZ_ACME_POLICY_BLACK_SHARE"):
        load_section(PolicySettings, {"OURVIDZ_ACME_POLICY_BLACK_SHARE": "70"})
