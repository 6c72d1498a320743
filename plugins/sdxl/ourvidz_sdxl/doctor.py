"""What ``ourvidz doctor`` looks at for SDXL: the model files that the settings name."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

from ourvidz_core.doctor.gpus import GpuReport, measure_gpus, too_few
from ourvidz_core.doctor.model_files import checksum_faults, folder_faults, pipeline_faults, size_gb, weights_fault
from ourvidz_core.engine.variants import find_model
from ourvidz_core.plugins.hookspecs import ReadSettings
from ourvidz_core.wire.findings import Check, Finding
from ourvidz_sdxl.config import IMAGE_COUNTS
from ourvidz_sdxl.job_types import JOB_TYPES
from ourvidz_sdxl.layout import CONFIG_DIR_VARIABLE, CONFIG_IN_WORDS, missing_config
from ourvidz_sdxl.parallel.plan import GPUS_VARIABLE
from ourvidz_sdxl.settings import SdxlSettings

TYPES = tuple(job_type.name for job_type in JOB_TYPES)
MODEL_VARIABLE = "OURVIDZ_SDXL_MODEL"
_GET_AGAIN = "copy the model again, whole, and compare its size with the source's"


def sdxl_checks(settings: ReadSettings) -> Iterable[Check]:
    """The checks of the SDXL plugin."""
    return (
        Check(name="models of ourvidz-sdxl", run=lambda: _look_at_all(settings(SdxlSettings)), is_at_start=True),
        Check(
            name="GPUs of ourvidz-sdxl",
            run=lambda: gpu_findings(settings(SdxlSettings), measure_gpus),
            timeout_seconds=70.0,
        ),
        Check(
            name="models of ourvidz-sdxl (checksums)",
            run=lambda: _compare_checksums(settings(SdxlSettings)),
            is_thorough=True,
            timeout_seconds=600.0,
        ),
    )


def gpu_findings(settings: SdxlSettings, measure: Callable[[], GpuReport]) -> Iterator[Finding]:
    """Whether a job finds the GPUs that share its images; nothing where one makes them all, which others look at."""
    if settings.gpus == 1:
        return
    most = max(IMAGE_COUNTS)
    lack = too_few(measure(), asked=settings.gpus, needed=settings.gpus, variable=GPUS_VARIABLE, job_types=TYPES)
    if lack is not None:
        yield lack
    elif settings.gpus > most:
        yield Finding.yellow(
            f"a job has at most {most} images, and {settings.gpus} GPUs shall share them",
            cure=f"set {GPUS_VARIABLE} to {most}",
        )
    else:
        yield Finding.green(f"{settings.gpus} GPUs share the images of a job")


def _look_at_all(settings: SdxlSettings) -> Iterator[Finding]:
    if settings.model is None:
        yield Finding.red(
            "no SDXL model is configured",
            cure=f"set {MODEL_VARIABLE} to a .safetensors checkpoint or to a directory in the diffusers layout",
            job_types=TYPES,
        )
    else:
        yield from _look_at(settings.model, MODEL_VARIABLE, settings.config_dir, TYPES)
    for variant, model in settings.models.items():
        # Only messages that ask for this variant cannot be done.
        yield from _look_at(model, f"OURVIDZ_SDXL_MODELS, variant {variant}", settings.config_dir, ())
    for variable, weights in {
        "OURVIDZ_SDXL_IP_ADAPTER_STYLE": settings.ip_adapter_style,
        "OURVIDZ_SDXL_IP_ADAPTER_FACE": settings.ip_adapter_face,
    }.items():
        if weights is not None and (fault := weights_fault(weights)) is not None:
            yield Finding.red(f"{variable}: {fault}", cure="copy it again, or unset it: img2img is used then")
    for variable, folder in {
        "OURVIDZ_SDXL_IP_ADAPTER_IMAGE_ENCODER": settings.ip_adapter_image_encoder,
        "OURVIDZ_SDXL_CONTROLNET": settings.controlnet,
    }.items():
        for fault in folder_faults(folder) if folder is not None else ():
            yield Finding.red(f"{variable}: {fault}", cure="copy it again, or unset it: img2img is used then")


def _look_at(named: Path, variable: str, config_dir: Path | None, job_types: tuple[str, ...]) -> Iterator[Finding]:
    model = find_model(named, "sdxl")
    faults = list(_faults(model))
    for fault in faults:
        yield Finding.red(f"{variable}: {fault}", cure=_cure(model, variable), job_types=job_types)
    if model.is_file():
        if config_dir is None:
            yield Finding.red(
                f"{variable}: {model.name} is a single-file checkpoint and {CONFIG_DIR_VARIABLE} is not set",
                cure=f"set {CONFIG_DIR_VARIABLE} to a directory with the small files of SDXL: {CONFIG_IN_WORDS}",
                job_types=job_types,
            )
            return
        if missing := missing_config(config_dir):
            yield Finding.red(
                f"{CONFIG_DIR_VARIABLE}: {config_dir} lacks {', '.join(missing)}",
                cure=f"copy them from any SDXL model in the diffusers layout, or correct {CONFIG_DIR_VARIABLE}",
                job_types=job_types,
            )
            return
    if not faults:
        yield Finding.green(f"{model} is whole, {size_gb(model):.3g} GB")


def _faults(model: Path) -> Iterator[str]:
    if model.is_dir():
        yield from pipeline_faults(model)
    elif (fault := weights_fault(model)) is not None:
        yield fault


def _cure(model: Path, variable: str) -> str:
    return _GET_AGAIN if model.exists() else f"correct {variable}, or mount the disk that the model lies on"


def _compare_checksums(settings: SdxlSettings) -> Iterator[Finding]:
    for named in (settings.model, *settings.models.values()):
        model = find_model(named, "sdxl") if named is not None else None
        directory = model if model is None or model.is_dir() else model.parent
        for fault in checksum_faults(directory) if directory is not None else ():
            yield Finding.red(fault, cure=_GET_AGAIN)
