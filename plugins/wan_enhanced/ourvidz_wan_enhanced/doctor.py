"""What ``ourvidz doctor`` looks at for the enhanced types: the language model, and WAN's own weights."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path

from ourvidz_wan.config import WanSettings
from ourvidz_wan.doctor import wan_findings

from ourvidz_core.doctor.model_files import checksum_faults, folder_faults, size_gb
from ourvidz_core.engine.variants import find_model
from ourvidz_core.plugins.hookspecs import ReadSettings
from ourvidz_core.wire.findings import Check, Finding
from ourvidz_wan_enhanced.job_types import JOB_TYPES
from ourvidz_wan_enhanced.settings import EnhancerSettings, Policy

TYPES = tuple(job_type.name for job_type in JOB_TYPES)
MODEL_FAMILY = "qwen"
MODEL_VARIABLE = "OURVIDZ_ENHANCER_MODEL"
_TOKENIZERS = ("tokenizer.json", "vocab.json", "tokenizer.model")


def enhanced_checks(settings: ReadSettings) -> Iterable[Check]:
    """The checks of the enhancer."""
    return (
        Check(
            name="models of ourvidz-wan-enhanced",
            run=lambda: [
                *_look_at_model(settings(EnhancerSettings)),
                *wan_findings(settings(WanSettings), JOB_TYPES),
            ],
            is_at_start=True,
        ),
        Check(
            name="models of ourvidz-wan-enhanced (checksums)",
            run=lambda: _compare_checksums(settings(EnhancerSettings)),
            is_thorough=True,
            timeout_seconds=600.0,
        ),
    )


def _look_at_model(settings: EnhancerSettings) -> Iterator[Finding]:
    if settings.url is not None:
        yield Finding.green("prompts are enhanced by a server; ourvidz enhance TEXT asks it")
        return
    if settings.model is None:
        faults = ["no language model is configured"]
        cure = f"set {MODEL_VARIABLE} to a directory such as Qwen2.5-7B-Instruct, or OURVIDZ_ENHANCER_URL to a server"
    else:
        model = find_model(settings.model, MODEL_FAMILY)
        faults = [f"{MODEL_VARIABLE}: {fault}" for fault in _faults(model)]
        cure = "copy the model again, whole" if model.exists() else f"correct {MODEL_VARIABLE}, or mount its disk"
        if not faults:
            yield Finding.green(f"{model} is whole, {size_gb(model):.3g} GB")
    for fault in faults:
        if settings.policy is Policy.FAIL:
            yield Finding.red(
                f"{fault}; OURVIDZ_ENHANCER_POLICY is fail, so enhanced jobs cannot be done", cure=cure, job_types=TYPES
            )
        else:
            yield Finding.yellow(f"{fault}; enhanced jobs run with the prompt as it came", cure=cure)


def _faults(model: Path) -> Iterator[str]:
    yield from folder_faults(model)
    if model.is_dir() and not any((model / name).is_file() for name in _TOKENIZERS):
        yield f"{model} has no tokenizer ({_TOKENIZERS[0]})"


def _compare_checksums(settings: EnhancerSettings) -> Iterator[Finding]:
    if settings.url is None and settings.model is not None:
        for fault in checksum_faults(find_model(settings.model, MODEL_FAMILY)):
            yield Finding.red(fault, cure="copy the model again, whole")
