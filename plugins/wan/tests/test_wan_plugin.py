"""The hooks: light to import, truthful about the command line, and equal however it is run."""

from __future__ import annotations

import subprocess
import sys
import textwrap
from pathlib import Path

import attrs
import numpy as np
import pytest
from ourvidz_wan import plugin
from ourvidz_wan.arguments import parse_arguments
from ourvidz_wan.config import WanSettings
from ourvidz_wan.execution import command_environment, facts_of_file
from ourvidz_wan.job_types import JOB_TYPES
from ourvidz_wan.video import read_facts, read_video
from PIL import Image

from ourvidz_core.engine.checks import check_artifact
from ourvidz_core.engine.context import EngineContext
from ourvidz_core.engine.models import ModelCache
from ourvidz_core.engine.pictures import read_facts as read_picture_facts
from ourvidz_core.errors import CommandFailed, ModelUnavailable, SettingsError
from ourvidz_core.wire.jobs import Reference, References
from ourvidz_core.wire.payloads import Payload

TYPES = {job_type.name: job_type for job_type in JOB_TYPES}
#: Enough for every path; the full schedule has a test of its own.
QUICK = {"sample_steps": 3, "frame_num": 7, "seed": 11}


@pytest.fixture(scope="session")
def warm():
    """Models stay from job to job, as in the engine."""
    return ModelCache()


@pytest.fixture
def context_of(tmp_path, model_dir, warm):
    def make(name="job", **settings):
        work_dir = tmp_path / name
        work_dir.mkdir()
        environ = {"OURVIDZ_WAN_CKPT_DIR": str(model_dir)}
        environ |= {f"OURVIDZ_WAN_{key.upper()}": str(value) for key, value in settings.items()}
        steps = []
        context = EngineContext(
            work_dir=work_dir,
            models=warm,
            timeout_seconds=120,
            device="cpu",
            on_progress=lambda stage, step, total: steps.append((step, total)),
            environ=environ,
        )
        context.steps = steps
        return context

    return make


def job_of(job_type="video_fast", prompt="a cat", references=None, **config):
    payload = Payload(id="job-1", type=job_type, prompt=prompt, user_id="user-1", config={**QUICK, **config})
    job = plugin.parse_job(TYPES[job_type], payload)
    if references:
        found = {role: Reference(url=f"https://a.test/{role}", path=path) for role, path in references.items()}
        job = attrs.evolve(job, references=References(**found))
    return job


def walk(job, context):
    prepared = plugin.prepare_job(job, context)
    command = plugin.build_command(prepared, context)
    generation = plugin.generate(prepared, command, context)
    if generation.finish is not None:
        generation = attrs.evolve(generation, artifacts=generation.finish(), finish=None)
    return prepared, command, generation


def test_the_plugin_imports_nothing_heavy():
    program = """
        import sys
        import ourvidz_wan.plugin, ourvidz_wan.cli
        heavy = {"torch", "diffusers", "transformers", "av", "PIL", "numpy", "safetensors"} & set(sys.modules)
        sys.exit(", ".join(sorted(heavy)) or 0)
    """
    subprocess.run([sys.executable, "-c", textwrap.dedent(program)], check=True, timeout=60)


def test_the_command_is_the_command_line_of_the_specification(context_of, model_dir):
    context = context_of()
    command = plugin.build_command(job_of(prompt="-neon --task x", frame_num=83), context)
    assert command.argv[:3] == (sys.executable, "-m", "ourvidz_wan.generate")
    output = context.work_dir / "output_0.mp4"
    assert command.argv[3:] == (
        "--task=t2v-1.3B",
        f"--ckpt_dir={model_dir}",
        "--size=480*832",
        "--frame_num=81",
        "--sample_steps=3",
        "--sample_guide_scale=6.5",
        "--sample_solver=unipc",
        "--sample_shift=5.0",
        "--base_seed=11",
        "--offload_model=False",
        "--prompt=-neon --task x",
        f"--save_file={output}",
    )
    assert command.outputs == (output,)


@pytest.mark.parametrize(
    ("roles", "options"),
    [
        (("single",), {"image"}),
        (("start",), {"first_frame"}),
        (("end",), {"last_frame"}),
        (("start", "end"), {"first_frame", "last_frame"}),
    ],
    ids=["single", "start", "end", "both"],
)
def test_each_reference_has_its_option(roles, options, context_of, pictures):
    references = dict(zip(roles, pictures.values(), strict=False))
    command = plugin.build_command(job_of(references=references), context_of())
    arguments = parse_arguments(command.argv[3:])
    given = {name for name in ("image", "first_frame", "last_frame") if getattr(arguments, name)}
    assert given == options
    assert any(option.startswith("--reference_strength=") for option in command.argv) == (roles == ("single",))


def test_the_enhanced_prompt_is_the_one_that_runs(context_of):
    job = attrs.evolve(job_of(prompt="cat"), enhanced_prompt="a majestic cat")
    assert "--prompt=a majestic cat" in plugin.build_command(job, context_of()).argv


def test_the_jobs_negative_prompt_counts_only_by_setting(context_of):
    job = attrs.evolve(job_of(), negative_prompt="rain")
    made = {}
    for setting in ("false", "true"):
        _, command, generation = walk(job, context_of(setting, use_job_negative_prompt=setting))
        assert ("--negative_prompt=rain" in command.argv) is (setting == "true")
        made[generation.facts["negative_prompt_source"]] = read_video(generation.artifacts[0].path)
    assert not np.array_equal(made["model"], made["job"])
    _, _, plain = walk(job_of(), context_of("plain", use_job_negative_prompt="true"))
    assert np.array_equal(read_video(plain.artifacts[0].path), made["model"])


@pytest.mark.parametrize(
    ("setting", "asked", "tier"),
    [
        ("exact", {}, "exact"),
        ("fast", {}, "fast"),
        ("exact", {"tier": "fast"}, "fast"),
        ("fast", {"tier": "exact"}, "exact"),
    ],
)
def test_the_tier_is_the_jobs_own_or_that_of_the_setting(setting, asked, tier, context_of):
    context = context_of(tier=setting, fp8_attention=True)
    _, command, generation = walk(job_of("image_fast", sample_steps=16, **asked), context)
    assert ("--tier=fast" in command.argv) is ("--fp8_attention=True" in command.argv) is (tier == "fast")
    assert generation.facts["tier"] == tier
    assert (generation.facts["steps"], generation.facts.get("steps_computed", 16)) == (16, len(context.steps))
    assert len(context.steps) == (8 if tier == "fast" else 16)
    assert facts_of_file(generation.artifacts[0].path)["tier"] == tier


def test_a_setting_that_is_no_tier_is_refused_by_name(context_of):
    with pytest.raises(SettingsError, match="OURVIDZ_WAN_TIER"):
        plugin.build_command(job_of(), context_of(tier="quick"))


def test_without_guidance_no_negative_prompt_counts(context_of):
    _, _, generation = walk(job_of(sample_guide_scale=1), context_of())
    assert "negative_prompt_source" not in generation.facts


def test_an_image_with_a_start_and_an_end_is_made_from_the_start_and_says_so(context_of, pictures):
    start = {"start": pictures["lake"]}
    made = []
    for name, references in (("start", start), ("both", {**start, "end": pictures["fire"]})):
        _, _, generation = walk(job_of("image_fast", frame_num=1, references=references), context_of(name))
        assert generation.facts["reference_method"] == "image_to_image"
        made.append((np.asarray(Image.open(generation.artifacts[0].path)), generation.facts.get("references_ignored")))
    assert np.array_equal(made[0][0], made[1][0])
    assert [ignored for _, ignored in made] == [None, ["end"]]


def test_without_weights_the_error_names_the_setting(tmp_path):
    context = EngineContext(work_dir=tmp_path, models=ModelCache(), timeout_seconds=9, environ={})
    with pytest.raises(ModelUnavailable, match="OURVIDZ_WAN_CKPT_DIR"):
        plugin.build_command(job_of(), context)


def test_weights_that_are_gone_are_a_model_that_is_unavailable(context_of, tmp_path):
    with pytest.raises(ModelUnavailable, match="nowhere is no directory"):
        walk(job_of(), context_of(ckpt_dir=tmp_path / "nowhere"))


def test_a_video_is_generated_by_the_warm_model(context_of, warm):
    context = context_of()
    _, _, generation = walk(job_of(), context)
    (artifact,) = generation.artifacts
    assert (artifact.width, artifact.height, artifact.frames, artifact.seed) == (48, 80, 5, 11)
    assert check_artifact(artifact, media_type="video/mp4") == artifact
    assert context.steps == [(1, 3), (2, 3), (3, 3)]
    assert generation.facts == {
        "model": "tiny-wan",
        "size": "48*80",
        "requested_size": "480*832",
        "fps": 16,
        "solver": "unipc",
        "steps": 3,
        "guidance_scale": 6.5,
        "shift": 5.0,
        "tier": "exact",
        "video_encoder": "libx264",
        "reference_applied": False,
        "negative_prompt_source": "model",
    }
    assert len(warm.keys) == 1
    walk(job_of(), context_of("again"))
    assert len(warm.keys) == 1


def test_an_image_is_a_real_png_that_says_what_made_it(context_of):
    _, _, generation = walk(job_of("image_fast", prompt="a cat", frame_num=1), context_of())
    (artifact,) = generation.artifacts
    assert artifact.path.read_bytes().startswith(b"\x89PNG\r\n\x1a\n")
    assert check_artifact(artifact, media_type="image/png").width == 48
    facts = read_picture_facts(artifact.path)
    assert (facts["prompt"], facts["seed"], facts["steps"]) == ("a cat", "11", "3")
    assert "fps" not in facts


def test_the_same_seed_makes_the_same_bytes_and_another_others(context_of):
    def made(name, **config):
        return walk(job_of(**config), context_of(name))[2].artifacts[0].path

    first, again, other = made("a"), made("b"), made("c", seed=12)
    assert first.read_bytes() == again.read_bytes()
    assert not np.array_equal(read_video(first), read_video(other))


def test_in_process_and_as_a_subprocess_it_is_the_same_file(context_of, pictures):
    """A picture; a video that a subprocess makes is compared by the enhanced types' run of whole workers."""
    job = job_of("image_fast", "-neon --task x", {"single": pictures["lake"]}, frame_num=1, sample_solver="dpm++")
    results = []
    for run_as in ("engine", "subprocess"):
        context = context_of(run_as, run_as=run_as)
        prepared, _, generation = walk(job, context)
        assert context.steps == [(1, 3), (2, 3), (3, 3)]
        assert generation.facts["reference_method"] == "image_to_image"
        assert prepared.facts["wan_task"] == "t2v-1.3B"
        results.append((generation.artifacts[0].path.read_bytes(), dict(generation.facts)))
    assert results[0] == results[1]


def test_a_file_tells_its_facts_with_their_types(context_of):
    _, _, generation = walk(job_of(prompt="81"), context_of())
    facts = facts_of_file(generation.artifacts[0].path)
    assert {key: facts[key] for key in generation.facts} == generation.facts
    assert (facts["prompt"], facts["seed"], facts["wan_task"]) == ("81", 11, "t2v-1.3B")
    assert read_facts(generation.artifacts[0].path)["software"].startswith("OurVidz")


FOREIGN_SCRIPT = """
import argparse, os, shutil, sys
parser = argparse.ArgumentParser()
for name in ("task", "ckpt_dir", "size", "frame_num", "sample_steps", "sample_guide_scale", "sample_solver",
             "sample_shift", "base_seed", "offload_model", "prompt", "save_file", "image", "first_frame", "last_frame"):
    parser.add_argument("--" + name)
given = parser.parse_args()
assert os.environ["HF_HOME"] == "/models/hub-home" and os.environ["CUDA_VISIBLE_DEVICES"] == "1"
shutil.copyfile(os.environ["EXAMPLE_VIDEO"], given.save_file)
"""


def test_another_script_with_this_command_line_can_run_instead(context_of, tmp_path, pictures, monkeypatch):
    example = walk(job_of(), context_of("example"))[2].artifacts[0].path
    monkeypatch.setenv("EXAMPLE_VIDEO", str(example))
    script = tmp_path / "generate.py"
    script.write_text(FOREIGN_SCRIPT)
    context = context_of(script=script, hf_home="/models/hub-home", cuda_visible_devices="1")
    job = job_of(references={"single": pictures["lake"]})
    _, command, generation = walk(job, context)
    assert command.argv[1] == str(script)
    (artifact,) = generation.artifacts
    assert artifact.path.read_bytes() == example.read_bytes()
    unknown = ("tier", "reference_applied", "reference_method", "reference_strength", "negative_prompt_source")
    assert [generation.facts[key] for key in unknown] == [None] * 5
    assert generation.facts["size"] == "48*80"
    promised = (artifact.width, artifact.height, artifact.frames, artifact.seed)
    assert promised == (48, 80, 5, 11)


def test_a_script_that_fails_says_why(context_of, tmp_path):
    script = tmp_path / "generate.py"
    script.write_text("import sys; sys.exit('no module named wan')")
    with pytest.raises(CommandFailed, match="no module named wan"):
        walk(job_of(), context_of(script=script))


def test_the_environment_of_a_subprocess_is_that_of_the_specification():
    settings = WanSettings(pythonpath="/opt/wan:/opt/deps", hf_home=Path("/models/hf"), cuda_visible_devices="0")
    assert command_environment(settings, {"PYTHONPATH": "/already"}) == {
        "PYTHONUNBUFFERED": "1",
        "CUDA_VISIBLE_DEVICES": "0",
        "HF_HOME": "/models/hf",
        "TRANSFORMERS_CACHE": "/models/hf",
        "HUGGINGFACE_HUB_CACHE": "/models/hf/hub",
        "PYTHONPATH": "/opt/wan:/opt/deps:/already",
    }


def test_references_use_vace_weights_where_there_are_some(context_of, tiny_wan, tmp_path, pictures):
    vace = tmp_path / "vace"
    tiny_wan.save(tiny_wan.make_pipeline("vace"), vace)
    with_start = job_of(references={"start": pictures["lake"]})
    prepared, command, generation = walk(with_start, context_of("start", vace_ckpt_dir=vace))
    assert prepared.facts["wan_task"] == "vace-1.3B"
    assert f"--ckpt_dir={vace}" in command.argv
    assert generation.facts["reference_method"] == "vace"
    prepared, command, _ = walk(job_of(), context_of("none", vace_ckpt_dir=vace))
    assert prepared.facts["wan_task"] == "t2v-1.3B"
    image = job_of("image_fast", frame_num=1, references={"single": pictures["lake"]})
    _, _, generation = walk(image, context_of("image", vace_ckpt_dir=vace))
    assert generation.facts["reference_method"] == "image_to_image"


def test_a_job_that_is_stopped_leaves_no_file(context_of):
    context = context_of()

    class Stop(Exception):
        """Raised by the second step."""

    def stop(step, total, *, stage="generate"):
        if step == 2:
            raise Stop

    context.progress = stop
    with pytest.raises(Stop):
        walk(job_of(), context)
    assert list(context.work_dir.iterdir()) == []


def test_pictures_of_any_mode_can_be_references(context_of, tmp_path):
    for number, mode in enumerate(("L", "RGBA", "P", "1")):
        path = tmp_path / f"{mode}.png"
        Image.linear_gradient("L").convert(mode).save(path)
        _, _, generation = walk(job_of(references={"start": path}), context_of(f"mode{number}"))
        assert generation.facts["reference_applied"] is True
