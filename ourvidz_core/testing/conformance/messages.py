"""Checks of how a plugin reads messages, and of what user text becomes on a command line."""

from __future__ import annotations

import enum
from collections.abc import Iterator, Mapping
from pathlib import PurePath
from types import UnionType
from typing import Any, Union, get_args, get_origin, get_type_hints

import attrs

from ourvidz_core.errors import JobError, ModelUnavailable, PayloadError
from ourvidz_core.testing.conformance.results import Flaw, NotChecked
from ourvidz_core.testing.conformance.subject import Subject, with_config
from ourvidz_core.testing.conformance.trials import error_of
from ourvidz_core.wire.commands import Command
from ourvidz_core.wire.job_types import JobType

UNKNOWN_KEY = "conformance_unknown"
#: An option to a program, and more than one word and a command to a shell.
HOSTILE_TEXT = "--conformance-probe; touch conformance-probe $(id) `id` 'x' \"y\""
_PROBE = "conformance-probe"
_HOSTILE_OPTION = HOSTILE_TEXT.partition(";")[0]
_SHELLS = frozenset({"sh", "bash", "dash", "zsh", "ksh", "fish", "cmd", "cmd.exe", "powershell", "pwsh"})
_WRONG_VALUE = {"wrong": ["value"]}
_SCALARS = (str, int, float, bool, enum.Enum)


def check_samples(subject: Subject) -> Iterator[Flaw]:
    """Each sample message is taken."""
    for job_type, message in subject.samples:
        try:
            subject.parse(message)
        except PayloadError as error:
            yield Flaw(
                job_type=job_type.name,
                problem=f"its sample is refused: {error.message}",
                cure="correct JobType(sample={...}): the prompt and the config of a message that shows the type off",
            )
        except JobError as error:
            yield Flaw(
                job_type=job_type.name,
                problem=f"its sample ends in {error_of(error)}",
                cure="parse_job answers a Job, or raises PayloadError for a message that is wrong",
            )


def check_wrong_values(subject: Subject) -> Iterator[Flaw]:
    """A value of the wrong type is refused with its path."""
    for job_type, message in subject.first_samples:
        for name in _scalar_fields(job_type):
            path = f"$.config.{name}"
            try:
                job = subject.parse(with_config(message, **{name: _WRONG_VALUE}))
            except PayloadError as error:
                if path not in error.message:
                    yield Flaw(
                        job_type=job_type.name,
                        problem=f"a wrong config.{name} is refused without its path: {error.message}",
                        cure=f'raise PayloadError with its path in the message: "{path}: expected ..., got ..."',
                    )
            except JobError as error:
                yield Flaw(
                    job_type=job_type.name,
                    problem=f"a wrong config.{name} ends in {error_of(error)}",
                    cure="structure it with default_config(job_type, payload.config), which raises PayloadError",
                )
            else:
                if name not in job.ignored_config:
                    yield Flaw(
                        job_type=job_type.name,
                        problem=f"config.{name} = {_WRONG_VALUE} is taken, and nobody is told",
                        cure="structure the config with default_config(job_type, payload.config), which refuses it",
                    )


def check_unknown_keys(subject: Subject) -> Iterator[Flaw]:
    """Keys that it does not know do not fail a message, and are reported as ignored."""
    for job_type, message in subject.first_samples:
        unknown = with_config({**message, UNKNOWN_KEY: 1}, **{UNKNOWN_KEY: 1})
        try:
            ignored = subject.parse({**unknown, "metadata": {**(message.get("metadata") or {}), UNKNOWN_KEY: 1}})
        except JobError as error:
            yield Flaw(
                job_type=job_type.name,
                problem=f"a message with the key {UNKNOWN_KEY}, which nobody knows, ends in {error_of(error)}",
                cure="leave alone what you do not know: producers are newer than their workers",
            )
            continue
        if UNKNOWN_KEY not in ignored.ignored_config:
            yield Flaw(
                job_type=job_type.name,
                problem=f"config.{UNKNOWN_KEY} is neither obeyed nor reported: a user would think that it had been",
                cure="begin parse_job with job = default_job(job_type, payload) and attrs.evolve it,"
                " or list such keys in Job(ignored_config=...)",
            )


def check_safe_argv(subject: Subject) -> Iterator[Flaw]:
    """No shell reads a command, and no text of a user becomes an option."""
    commands = 0
    absent: list[str] = []
    for job_type, message in subject.first_samples:
        for name, hostile in _hostile_messages(job_type, message):
            try:
                command = subject.command_of(hostile)
            except ModelUnavailable as error:
                absent.append(error.message)
                break
            except PayloadError:
                continue  # refused, which is as safe
            except JobError as error:
                yield Flaw(
                    job_type=job_type.name,
                    problem=f"with {name} = {HOSTILE_TEXT!r} it ends in {error_of(error)}",
                    cure="take any text, or raise PayloadError for what you do not take",
                )
                continue
            if command is None:
                break
            commands += 1
            yield from _faults_of(command, name, job_type)
    if not commands:
        raise NotChecked(f"its model is not here: {absent[0]}" if absent else "it builds no command")


def _faults_of(command: Command, name: str, job_type: JobType) -> Iterator[Flaw]:
    argument_of_its_own = f"f'--{name.rpartition('.')[2]}={{job.{name}}}'"
    for position, argument in enumerate(command.argv):
        before = command.argv[:position]
        if position == 0 and _PROBE in argument:
            yield Flaw(
                job_type=job_type.name,
                problem=f"{name} chooses the program that is run: {argument!r}",
                cure="name the program in the plugin or in its settings, never by a message",
            )
        elif _is_program_text(command.argv, position):
            if _is_shell(command.argv[position - 2]) or HOSTILE_TEXT in argument:
                yield Flaw(
                    job_type=job_type.name,
                    problem=f"the command is text for {PurePath(command.argv[position - 2]).name}: {argument!r}",
                    cure="name the program itself and give each argument a place of its own:"
                    f" Command(argv=('program', {argument_of_its_own}, ...))",
                )
        elif argument.startswith(_HOSTILE_OPTION) and "--" not in before:
            yield Flaw(
                job_type=job_type.name,
                problem=f"{name} stands alone on the command line, so a text that begins with - is read as an option:"
                f" {argument!r}",
                cure=f"write it as one argument, {argument_of_its_own}, or put '--' before it",
            )


def _is_program_text(argv: tuple[str, ...], position: int) -> bool:
    """Whether an argument is a program of its own: what follows ``sh -c``, ``python -c`` or ``cmd /c``."""
    return position >= 2 and argv[position - 1] in ("-c", "-lc", "-ec", "/c", "/C", "-Command")


def _is_shell(program: str) -> bool:
    return PurePath(program).name.lower() in _SHELLS


def _hostile_messages(job_type: JobType, message: Mapping[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    for name in ("prompt", "negative_prompt"):
        yield name, {**message, name: HOSTILE_TEXT}
    for name, kind in _scalar_fields(job_type).items():
        if kind is str:
            yield f"config.{name}", with_config(message, **{name: HOSTILE_TEXT})


def _scalar_fields(job_type: JobType) -> dict[str, type]:
    """The fields of the preset's class whose type a wrong value can be told from."""
    hints = get_type_hints(type(job_type.preset))
    kinds = {field.name: _scalar_of(hints.get(field.name)) for field in attrs.fields(type(job_type.preset))}
    return {name: kind for name, kind in kinds.items() if kind is not None}


def _scalar_of(hint: Any) -> type | None:
    """The scalar that a hint names, alone or beside None."""
    candidates = [kind for kind in get_args(hint) if kind is not type(None)] if _is_union(hint) else [hint]
    scalars = [kind for kind in candidates if isinstance(kind, type) and issubclass(kind, _SCALARS)]
    return scalars[0] if len(scalars) == len(candidates) == 1 else None


def _is_union(hint: Any) -> bool:
    return get_origin(hint) in (Union, UnionType)
