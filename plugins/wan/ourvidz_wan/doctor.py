"""What ``ourvidz doctor`` looks at for WAN: the checkpoint directories that the settings name."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

from ourvidz_core.doctor.gpus import GpuReport, measure_gpus, too_few
from ourvidz_core.doctor.model_files import checksum_faults, pipeline_faults, size_gb, weights_fault
from ourvidz_core.engine.variants import find_model
from ourvidz_core.plugins.hookspecs import ReadSettings
from ourvidz_core.wire.findings import Check, Finding
from ourvidz_core.wire.job_types import ContentType, JobType
from ourvidz_wan.config import EncoderChoice, WanSettings
from ourvidz_wan.job_types import JOB_TYPES
from ourvidz_wan.layout import (
    NATIVE_TEXT_ENCODER,
    NATIVE_VAE,
    is_diffusers,
    missing_native_files,
    transformer_files,
)
from ourvidz_wan.parallel.plan import GPUS_VARIABLE, plan_ranks

MODEL_FAMILY = "wan"
CKPT_VARIABLE = "OURVIDZ_WAN_CKPT_DIR"
VACE_VARIABLE = "OURVIDZ_WAN_VACE_CKPT_DIR"
ENCODER_VARIABLE = "OURVIDZ_WAN_VIDEO_ENCODER"
#: The attention heads of the t2v-1.3B model, which all jobs run on.
T2V_HEADS = 12
_GET_AGAIN = "copy the checkpoint again, whole, and compare its files with the source's"


def wan_checks(settings: ReadSettings) -> Iterable[Check]:
    """The checks of the WAN plugin."""
    return (
        Check(
            name="models of ourvidz-wan",
            run=lambda: wan_findings(settings(WanSettings), JOB_TYPES),
            is_at_start=True,
        ),
        Check(
            name="models of ourvidz-wan (checksums)",
            run=lambda: _compare_checksums(settings(WanSettings)),
            is_thorough=True,
            timeout_seconds=600.0,
        ),
        Check(
            name="GPUs of ourvidz-wan",
            run=lambda: gpu_findings(settings(WanSettings), measure_gpus),
            timeout_seconds=70.0,
        ),
        Check(
            name="video encoder of ourvidz-wan",
            run=lambda: encoder_findings(settings(WanSettings)),
            timeout_seconds=30.0,
        ),
    )


def wan_findings(settings: WanSettings, job_types: Iterable[JobType]) -> Iterator[Finding]:
    """What is to be said of the weights that ``job_types`` run on."""
    names = [job_type.name for job_type in job_types]
    if settings.ckpt_dir is None:
        yield Finding.red(
            "no WAN weights are configured",
            cure=f"set {CKPT_VARIABLE} to the directory of the t2v-1.3B weights, in the diffusers or WAN's own layout",
            job_types=names,
        )
        return
    is_ours = settings.script is None  # another script knows its own files
    yield from _look_at(find_model(settings.ckpt_dir, MODEL_FAMILY), CKPT_VARIABLE, names, is_ours=is_ours)
    if settings.vace_ckpt_dir is not None:
        videos = [job_type.name for job_type in job_types if job_type.content_type is ContentType.VIDEO]
        yield from _look_at(settings.vace_ckpt_dir, VACE_VARIABLE, videos, is_ours=is_ours)
    if settings.script is not None and not settings.script.is_file():
        yield Finding.red(
            f"OURVIDZ_WAN_SCRIPT names {settings.script}, which is no file",
            cure="correct it, or unset it to run our own",
            job_types=names,
        )


def gpu_findings(settings: WanSettings, measure: Callable[[], GpuReport]) -> Iterator[Finding]:
    """Whether a job finds the GPUs that it shall use; nothing where it uses one, which others look at."""
    if settings.gpus == 1:
        return
    plan = plan_ranks(settings.gpus, heads=T2V_HEADS)
    types = [job_type.name for job_type in JOB_TYPES]
    lack = too_few(measure(), asked=settings.gpus, needed=plan.ranks, variable=GPUS_VARIABLE, job_types=types)
    if lack is not None:
        yield lack
    elif plan.ranks < settings.gpus:
        yield Finding.yellow(f"a video runs on {plan.describe()}", cure=f"set {GPUS_VARIABLE} to {plan.ranks}")
    else:
        yield Finding.green(f"a video runs on {plan.describe()}")


def encoder_findings(settings: WanSettings) -> Iterator[Finding]:
    """What encodes videos where the card shall, if it can; nothing where x264 does in any case."""
    if settings.video_encoder is EncoderChoice.X264:
        return
    from ourvidz_wan.nvenc import encoded_by, nvenc_fault

    if nvenc_fault() is None:
        yield Finding.green(encoded_by())
    else:
        yield Finding.yellow(encoded_by(), cure=f"set {ENCODER_VARIABLE} to {EncoderChoice.X264.value}")


def _look_at(ckpt_dir: Path, variable: str, job_types: Iterable[str], *, is_ours: bool) -> Iterator[Finding]:
    if not ckpt_dir.is_dir():
        yield Finding.red(
            f"{variable}: {ckpt_dir} is no directory",
            cure=f"correct {variable}, or mount the disk that the checkpoint lies on",
            job_types=job_types,
        )
        return
    faults = list(_faults(ckpt_dir)) if is_ours else []
    for fault in faults:
        yield Finding.red(f"{variable}: {fault}", cure=_GET_AGAIN, job_types=job_types)
    if not faults:
        yield Finding.green(f"{ckpt_dir} is whole, {size_gb(ckpt_dir):.3g} GB")


def _faults(ckpt_dir: Path) -> Iterator[str]:
    if is_diffusers(ckpt_dir):
        yield from pipeline_faults(ckpt_dir)
        return
    for missing in missing_native_files(ckpt_dir):
        yield f"{ckpt_dir / missing} is missing, and there is no model_index.json of the diffusers layout"
    for weights in [*transformer_files(ckpt_dir), ckpt_dir / NATIVE_TEXT_ENCODER, ckpt_dir / NATIVE_VAE]:
        if weights.is_file() and (fault := weights_fault(weights)) is not None:
            yield fault


def _compare_checksums(settings: WanSettings) -> Iterator[Finding]:
    named = [find_model(settings.ckpt_dir, MODEL_FAMILY)] if settings.ckpt_dir is not None else []
    for directory in [*named, *([settings.vace_ckpt_dir] if settings.vace_ckpt_dir is not None else [])]:
        for fault in checksum_faults(directory):
            yield Finding.red(fault, cure=_GET_AGAIN)
