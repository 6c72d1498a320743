"""Checks of a sample's whole walk, with nothing in its way and with trouble on it."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from functools import partial

from ourvidz_core.errors import (
    ArtifactError,
    CommandFailed,
    EngineStalled,
    JobError,
    JobTimeout,
    MetadataClash,
    OutOfMemory,
    PayloadError,
)
from ourvidz_core.testing.conformance.results import Flaw, NotChecked
from ourvidz_core.testing.conformance.subject import CANARY, Subject, Trial
from ourvidz_core.testing.conformance.trials import FAILING_STATUS, FailingCommandContext, TrialContext, error_of
from ourvidz_core.wire.job_types import JobType

#: A deadline that has passed when the job begins.
_NO_TIME_SECONDS = 1e-6
#: What to change where a sample did not become its files, by the error's class.
_RUN_CURES: Mapping[type[JobError], str] = {
    PayloadError: "correct JobType(sample={...}), or what prepare_job refuses",
    ArtifactError: "write to context.output_path(extension), declare the file as what it is,"
    " and let JobType(media_type=..., file_extension=...) say the same",
    CommandFailed: "run the command by hand; what it printed is the end of the message",
    EngineStalled: "let generate end: call context.progress at every step, give every request a time limit",
    JobTimeout: "raise JobType(timeout_seconds=...), or make the sample smaller",
}
_OTHER_RUN_CURE = (
    "generate answers Generation(artifacts=(Artifact(path=..., media_type=...),)); what a machine may lack is"
    " raised as ModelUnavailable, and says what to install or set"
)


def check_run(subject: Subject) -> Iterator[Flaw]:
    """Each sample becomes files that are what they say."""
    for job_type, message in subject.samples:
        trial = subject.finish(message)
        trial.refuse_if_unavailable()
        error = trial.outcome.error
        if trial.engine.finished is None and error is not None:
            cures = (cure for kind, cure in _RUN_CURES.items() if isinstance(error, kind))
            yield Flaw(
                job_type=job_type.name,
                problem=f"its sample was not generated: {error_of(error)}",
                cure=next(cures, _OTHER_RUN_CURE),
            )


def check_callback(subject: Subject) -> Iterator[Flaw]:
    """The callback of a generated sample says what was made, and nothing that is secret."""
    generated = 0
    for job_type, message in subject.samples:
        trial = subject.finish(message)
        trial.refuse_if_unavailable()
        if trial.engine.finished is None:
            continue
        generated += 1
        if trial.outcome.error is not None:
            yield _unreported(job_type, trial.outcome.error)
        elif trial.outcome.callback is not None and CANARY in json.dumps(trial.outcome.callback.to_json()):
            yield Flaw(
                job_type=job_type.name,
                problem="its callback repeats the query of a reference's URL, which is an access token in production",
                cure="leave the URL out of facts and metadata, or pass it through without_token(url)",
            )
    if not generated:
        raise NotChecked("no sample was generated")


def check_out_of_memory(subject: Subject) -> Iterator[Flaw]:
    """A device without memory is reported as that, so that the job is tried again in a fresh engine."""
    is_met = False
    for job_type, message in subject.first_samples:
        plain = subject.finish(message)
        plain.refuse_if_unavailable()
        for part in sorted(plain.engine.context.used if plain.engine.context else ()):
            is_met = True
            trial = subject.try_out(message, make_context=partial(TrialContext, without_memory_at=part))
            if not isinstance(trial.outcome.error, OutOfMemory):
                yield Flaw(
                    job_type=job_type.name,
                    problem=f"the device was out of memory in context.{part}, and {_said(trial)}",
                    cure="let the error pass, or answer it with `raise OutOfMemory(...) from error`;"
                    " catch no bare Exception around the model",
                )
    if not is_met:
        raise NotChecked(
            "it uses neither context.models, context.progress nor context.run; no memory can run out there"
        )


def check_time_out(subject: Subject) -> Iterator[Flaw]:
    """A job whose deadline has passed stops by itself, and says so."""
    for job_type, message in subject.first_samples:
        trial = subject.try_out(message, timeout_seconds=_NO_TIME_SECONDS)
        trial.refuse_if_unavailable()
        error = trial.outcome.error
        if isinstance(error, JobTimeout):
            continue
        if trial.is_met:
            yield Flaw(
                job_type=job_type.name,
                problem=f"the deadline passed, generate was told so with JobTimeout, and {_said(trial)}",
                cure="let JobTimeout and JobCancelled pass; catch no bare Exception around context.progress",
            )
        elif error is None or isinstance(error, EngineStalled):
            ending = "did not end" if trial.engine.is_hung else "ended as if nothing had been"
            yield Flaw(
                job_type=job_type.name,
                problem=f"the deadline passed, and generate {ending}: it never looked",
                cure="call context.progress(step, total) at every step, which raises where the job shall stop;"
                " give requests a timeout of context.seconds_left",
            )
        else:
            yield Flaw(
                job_type=job_type.name,
                problem=f"the deadline passed before the job began, and the callback says {error_of(error)}",
                cure="call context.progress before what takes time, and let what it raises pass",
            )


def check_exit_status(subject: Subject) -> Iterator[Flaw]:
    """A command that fails is reported with its exit status and the end of its output."""
    is_met = False
    for job_type, message in subject.first_samples:
        plain = subject.finish(message)
        plain.refuse_if_unavailable()
        if plain.engine.context is None or "run" not in plain.engine.context.used:
            continue
        is_met = True
        trial = subject.try_out(message, make_context=FailingCommandContext)
        error = trial.outcome.error
        if not isinstance(error, CommandFailed) or error.details.get("exit_status") != FAILING_STATUS:
            yield Flaw(
                job_type=job_type.name,
                problem=f"the command ended with exit status {FAILING_STATUS}, and {_said(trial)}",
                cure="let CommandFailed pass: it carries the exit status and the end of the output into the callback",
            )
    if not is_met:
        raise NotChecked("it runs no command")


def check_events(subject: Subject) -> Iterator[Flaw]:
    """Its ``handle_event`` takes every event of the jobs that were run."""
    if "handle_event" not in subject.record.hooks:
        raise NotChecked("it observes no events")
    for _, message in subject.first_samples:
        subject.finish(message)
    for event, error in dict(subject.observer_errors).items():
        yield Flaw(
            problem=f"handle_event raises on {event}: {error}",
            cure="look at the event's class first, `if isinstance(event, JobFailed)`: each has fields of its own",
        )


def _said(trial: Trial) -> str:
    error = trial.outcome.error
    return "the job completed" if error is None else f"the callback says {error_of(error)}"


def _unreported(job_type: JobType, error: JobError) -> Flaw:
    cure = (
        "rename the key in facts or enrich_metadata; core reports seed, bucket, num_images and the like itself"
        if isinstance(error, MetadataClash)
        else "enrich_metadata answers a mapping of JSON values or None, choose_bucket a name or None"
    )
    return Flaw(
        job_type=job_type.name, problem=f"its sample was generated and not reported: {error_of(error)}", cure=cure
    )
