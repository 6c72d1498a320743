"""Say what command line makes a WAN job, and run it: in the warm engine, or as a process of its own."""

from __future__ import annotations

import json
import logging
import os
import sys
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import attrs

from ourvidz_core.engine.tiers import Tier
from ourvidz_core.engine.variants import find_model, read_variant
from ourvidz_core.errors import GenerationError, ModelUnavailable
from ourvidz_core.plugins.context import JobContext
from ourvidz_core.wire.artifacts import Artifact, Generation
from ourvidz_core.wire.commands import Command
from ourvidz_core.wire.job_types import JobType
from ourvidz_core.wire.jobs import Job, ReferenceMode
from ourvidz_wan.arguments import IMAGE_SUFFIX, GenerateArguments, UsageError, parse_arguments
from ourvidz_wan.config import EncoderChoice, RunAs, WanConfig, WanSettings, WanVariant, as_size, scaled_size
from ourvidz_wan.jobs import TASK, uses_strength

if TYPE_CHECKING:
    from ourvidz_wan.checkpoints import WanModels

logger = logging.getLogger(__name__)

#: The option that hands over each reference.
OPTION_OF_ROLE = {"single": "image", "start": "first_frame", "end": "last_frame"}
MODULE = "ourvidz_wan.generate"
#: What distributions call a small t2v model that they offer: see ``ourvidz_core.engine.variants``.
MODEL_FAMILY = "wan"
#: What the job or core reports, so that it is not reported twice.
REPORTED_ELSEWHERE = frozenset({"wan_task", "prompt", "seed", "frame_num"})
#: What a file says in words; everything else it says as JSON.
FACTS_IN_WORDS = frozenset(
    {
        "wan_task",
        "model",
        "size",
        "requested_size",
        "solver",
        "reference_method",
        "negative_prompt_source",
        "attention",
        "tier",
        "vae_dtype",
        "video_encoder",
        "prompt",
    }
)
FACTS_OF_FILE_FORMAT = frozenset({"software", "digital_source_type"})
#: Device memory that the weights take, by task (GiB, bfloat16).
WEIGHTS_GB: Mapping[str, float] = {"t2v-1.3B": 14.7, "vace-1.3B": 16.0, "vace-14B": 44.0}


def prepare_wan_job(job: Job, context: JobContext) -> Job:
    """The job with the task that will run: VACE, where its weights are configured and a reference wants them."""
    return attrs.evolve(job, facts={**job.facts, "wan_task": _task(job, context.settings(WanSettings))})


def build_wan_command(job: Job, context: JobContext, *, metadata: Mapping[str, str] | None = None) -> Command:
    """The ``wan_generate`` command line of ``job``, whose config is a :class:`WanConfig`.

    The file says ``metadata``, too, unless another script writes it.

    :raises ModelUnavailable: no checkpoint directory is configured.
    """
    settings = context.settings(WanSettings)
    config: WanConfig = job.config
    task = _task(job, settings)
    is_image = config.frame_num == 1
    output = context.output_path("png" if is_image else "mp4")
    options = {
        "task": task,
        "ckpt_dir": _ckpt_dir(task, settings),
        "size": config.size,
        "frame_num": config.frame_num,
        "sample_steps": config.sample_steps,
        "sample_guide_scale": config.sample_guide_scale,
        "sample_solver": config.sample_solver.value,
        "sample_shift": config.sample_shift,
        "base_seed": job.seed,
        "offload_model": settings.offload_model,
        # As one argument: argparse takes "-neon" for an option, "--prompt=-neon" it does not.
        "prompt": job.enhanced_prompt or job.prompt,
        "save_file": output,
    }
    for role, reference in job.references:
        if reference.path is None:
            raise GenerationError(f"the {role} reference of job {job.id} was not fetched")
        options[OPTION_OF_ROLE[role]] = reference.path
    if settings.script is None:
        # Our own options; another script's command line ends with those above.
        if uses_strength(job.reference_mode, is_video=not is_image):
            options["reference_strength"] = config.reference_strength
        tier = config.tier or settings.tier
        if tier is not Tier.EXACT:
            options["tier"] = tier.value
            if settings.fp8_attention:
                options["fp8_attention"] = True
        if settings.video_encoder is not EncoderChoice.X264 and not is_image:
            options["video_encoder"] = settings.video_encoder.value
        if settings.gpus > 1:
            options["gpus"] = settings.gpus
        if settings.use_job_negative_prompt and job.negative_prompt is not None:
            options["negative_prompt"] = job.negative_prompt
        if metadata:
            options["metadata"] = json.dumps(
                {name: text.replace("\0", " ") for name, text in metadata.items()}, ensure_ascii=False
            )
    program = ("-m", MODULE) if settings.script is None else (str(settings.script),)
    return Command(
        argv=(
            settings.interpreter or sys.executable,
            *program,
            *(f"--{name}={value}".replace("\0", " ") for name, value in options.items()),
        ),
        env=command_environment(settings),
        outputs=(output,),
    )


def generate_wan(job: Job, command: Command, context: JobContext) -> Generation:
    """Run ``command`` and report what came of it."""
    settings = context.settings(WanSettings)
    if settings.script is None and settings.run_as is RunAs.ENGINE:
        return _generate_here(job, command, context)
    return _generate_apart(job, command, context)


def warm_up_wan(context: JobContext, job_types: Sequence[JobType]) -> None:
    """Load the text-to-video weights and make one step of an image with them. A subprocess loads its own.

    On a GPU, one step of each shape that the presets have, so that no job waits for a compiler.
    """
    settings = context.settings(WanSettings)
    if settings.script is not None or settings.run_as is RunAs.SUBPROCESS:
        return
    logger.info("importing torch")
    import torch  # noqa: F401 - apart from what follows, for the log's sake

    logger.info("importing diffusers and transformers")
    import ourvidz_wan.sampling  # noqa: F401 - likewise
    from ourvidz_core.engine.compilation import timed_with_compiling
    from ourvidz_wan.generate import run

    config: WanConfig = job_types[0].preset
    logger.info("loading the model")
    for size, frame_num, tier in shapes_to_warm(job_types, context.device, settings):
        options = {
            "task": TASK,
            "ckpt_dir": _ckpt_dir(TASK, settings),
            "size": size,
            "frame_num": frame_num,
            "sample_steps": 1,
            # With guidance the negative prompt is encoded, too, and it is that of nearly all jobs.
            "sample_guide_scale": config.sample_guide_scale,
            "base_seed": 0,
            "offload_model": settings.offload_model,
            "gpus": settings.gpus,
            "tier": tier.value,
            "fp8_attention": tier is Tier.FAST,
            "video_encoder": settings.video_encoder.value,
            "prompt": "",
            "save_file": context.output_path("png" if frame_num == 1 else "mp4"),
        }
        arguments = _checked([f"--{name}={value}" for name, value in options.items()])
        models = _warm(arguments, context)
        logger.info("making a step of %d frames at %s, %s tier", frame_num, size, tier.value)
        with timed_with_compiling(logger, "made it"):
            run(arguments, models, context.progress)


def shapes_to_warm(job_types: Sequence[JobType], device: str, settings: WanSettings) -> list[tuple[str, int, Tier]]:
    """Sizes, numbers of frames and tiers that a warm-up makes: an image, and on a GPU what each preset makes.

    Elsewhere nothing is compiled, and a video takes long. Only in fp8 has the fast tier kernels of its own.
    """
    presets: list[WanConfig] = [job_type.preset for job_type in job_types]
    image = (presets[0].size, 1)
    if not device.startswith("cuda"):
        return [(*image, Tier.EXACT)]
    shapes = list(dict.fromkeys([image, *((preset.size, preset.frame_num) for preset in presets)]))
    in_fp8 = [(*shape, Tier.FAST) for shape in shapes if settings.fp8_attention and shape[1] > 1]
    return [*((*shape, Tier.EXACT) for shape in shapes), *in_fp8]


def command_environment(settings: WanSettings, environ: Mapping[str, str] = os.environ) -> dict[str, str]:
    """What a WAN subprocess finds in its environment beside the engine's own."""
    environment = {"PYTHONUNBUFFERED": "1"}
    if settings.cuda_visible_devices is not None:
        environment["CUDA_VISIBLE_DEVICES"] = settings.cuda_visible_devices
    if settings.hf_home is not None:
        environment["HF_HOME"] = str(settings.hf_home)
        environment["TRANSFORMERS_CACHE"] = str(settings.hf_home)
        environment["HUGGINGFACE_HUB_CACHE"] = str(settings.hf_home / "hub")
    if settings.pythonpath:
        paths = (settings.pythonpath, environ.get("PYTHONPATH"))
        environment["PYTHONPATH"] = os.pathsep.join(path for path in paths if path)
    return environment


def facts_of_file(path: Path, *, metadata: Collection[str] = ()) -> dict[str, Any]:
    """The facts that ``wan_generate`` wrote into a file, with their types; without what it was told as ``metadata``."""
    from ourvidz_core.engine.pictures import read_facts as read_picture_facts
    from ourvidz_wan.video import read_facts as read_video_facts

    read = read_picture_facts if path.suffix == IMAGE_SUFFIX else read_video_facts
    return {
        key: text if key in FACTS_IN_WORDS else json.loads(text)
        for key, text in read(path).items()
        if key not in FACTS_OF_FILE_FORMAT and key not in metadata
    }


def arguments_of(command: Command) -> GenerateArguments:
    """The checked options of a command that :func:`build_wan_command` made.

    :raises ModelUnavailable: the checkpoint directory is not there.
    :raises GenerationError: the command line asks for something that cannot be done.
    """
    return _checked(command.argv[command.argv.index(MODULE) + 1 :])


def _checked(argv: Sequence[str]) -> GenerateArguments:
    try:
        return parse_arguments(argv)
    except UsageError as error:
        kind = ModelUnavailable if "--ckpt_dir" in str(error) else GenerationError
        raise kind(str(error)) from error


def _generate_here(job: Job, command: Command, context: JobContext) -> Generation:
    from ourvidz_wan.generate import generate

    arguments = arguments_of(command)
    generated = generate(arguments, _warm(arguments, context), context.progress)
    result = generated.result
    artifact = Artifact(
        path=result.path,
        media_type="image/png" if result.frames is None else "video/mp4",
        seed=job.seed,
        width=result.width,
        height=result.height,
        frames=result.frames,
    )

    def finish() -> tuple[Artifact, ...]:
        generated.write()
        return (artifact,)

    return Generation(facts=_reported(result.facts), finish=finish)


def _warm(arguments: GenerateArguments, context: JobContext) -> WanModels:
    from ourvidz_wan.checkpoints import load_models

    key = f"wan:{arguments.task.name}:{arguments.ckpt_dir}"
    models = context.models.get(
        key,
        lambda: load_models(
            arguments.ckpt_dir,
            arguments.task,
            device=context.device,
            offload=arguments.offload_model,
            gpus=arguments.gpus,
        ),
        vram_gb=0.0 if arguments.offload_model else WEIGHTS_GB.get(arguments.task.name, 0.0),
        # What is offloaded is moved by diffusers' hooks, which the engine sees, and is measured all the same.
        parts=lambda loaded: loaded.parts,
        on_leave=_forget_graphs,
    )
    return attrs.evolve(models, residence=context.models.residence(key))


def _forget_graphs(models: WanModels, leaving: str) -> None:
    if leaving == "transformer":
        models.predictor.forget_graphs()


def _generate_apart(job: Job, command: Command, context: JobContext) -> Generation:
    settings = context.settings(WanSettings)
    (artifact,) = context.run(command)
    variant = read_variant(_ckpt_dir(_task(job, settings), settings), WanVariant)
    width, height = scaled_size(job.config.size, variant.size_scale)
    frames = None if job.config.frame_num == 1 else job.config.frame_num
    # What was asked for: core opens the file and compares.
    artifact = attrs.evolve(artifact, seed=job.seed, width=width, height=height, frames=frames)
    if settings.script is None:
        facts = _reported(facts_of_file(artifact.path, metadata=arguments_of(command).metadata))
    else:
        facts = {**_asked(job), "size": as_size(width, height)}
    return Generation(artifacts=(artifact,), facts=facts)


def _task(job: Job, settings: WanSettings) -> str:
    wants_vace = job.reference_mode is not ReferenceMode.NONE and job.config.frame_num > 1
    return settings.vace_task if wants_vace and settings.vace_ckpt_dir is not None else TASK


def _ckpt_dir(task: str, settings: WanSettings) -> Path:
    ckpt_dir = settings.ckpt_dir if task == TASK else settings.vace_ckpt_dir
    if ckpt_dir is None:
        raise ModelUnavailable("no WAN weights are configured; set OURVIDZ_WAN_CKPT_DIR to their directory")
    return find_model(ckpt_dir, MODEL_FAMILY) if task == TASK else ckpt_dir


def _reported(facts: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in facts.items() if key not in REPORTED_ELSEWHERE}


def _asked(job: Job) -> dict[str, Any]:
    """What another script was told. None stands for what nobody but the script knows."""
    config: WanConfig = job.config
    facts: dict[str, Any] = {
        "requested_size": config.size,
        "solver": config.sample_solver.value,
        "steps": config.sample_steps,
        "guidance_scale": config.sample_guide_scale,
        "shift": config.sample_shift,
        "tier": None,
        "reference_applied": False,
        "negative_prompt_source": None,
    }
    if job.reference_mode is not ReferenceMode.NONE:
        facts |= {"reference_applied": None, "reference_method": None, "reference_strength": None}
    return facts
