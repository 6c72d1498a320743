"""``ourvidz``: the group of all commands, and how their errors reach a person.

Exit codes: 0 all is well; 1 what was asked about is not: a job failed, a check is red, a
message is wrong, a worker does not stay up; 2 wrong use, setting or plugin; 3 a service that
is needed does not answer; 130 interrupted.
"""

from __future__ import annotations

import logging
import sys
from importlib.metadata import EntryPoint, entry_points
from typing import Any

import click

import ourvidz_core
from ourvidz_core.cli.check import check_plugins
from ourvidz_core.cli.dashboard import dashboard
from ourvidz_core.cli.demo import demo
from ourvidz_core.cli.doctor import doctor
from ourvidz_core.cli.inspect import job_types, plugins
from ourvidz_core.cli.jobs import enqueue, run
from ourvidz_core.cli.new import new
from ourvidz_core.cli.queue import cancel, queue
from ourvidz_core.cli.serve import worker
from ourvidz_core.cli.status import status
from ourvidz_core.cli.top import top
from ourvidz_core.cli.up import up
from ourvidz_core.cli.validate import validate
from ourvidz_core.errors import JobError, OurVidzError, PluginError, QueueError, SettingsError

#: Plugins add commands of their own, click commands, under this entry-point group.
COMMAND_GROUP = "ourvidz.commands"

EXIT_JOB_FAILED = 1
EXIT_WRONG_USE = 2
EXIT_NO_SERVICE = 3
EXIT_INTERRUPTED = 130


class PluginCommands(click.Group):
    """A group that also knows the commands of plugins, and imports one only when it is called."""

    def list_commands(self, context: click.Context) -> list[str]:
        return sorted({*super().list_commands(context), *entry_points(group=COMMAND_GROUP).names})

    def get_command(self, context: click.Context, name: str) -> click.Command | None:
        if (ours := super().get_command(context, name)) is not None:
            return ours
        for entry_point in entry_points(group=COMMAND_GROUP, name=name):
            try:
                _refuse_blocked(entry_point)
                command: click.Command = entry_point.load()
            except Exception as error:  # one plugin's fault must not take the others' commands away
                return _broken_command(name, error)
            return command
        return None


def _refuse_blocked(entry_point: EntryPoint) -> None:
    """A distribution that may not be imported is not imported for its commands either."""
    from ourvidz_core.plugins.trust import refusal_of
    from ourvidz_core.settings import load

    reason = refusal_of(entry_point.dist.name, load()) if entry_point.dist is not None else None
    if reason is not None:
        raise PluginError(reason)


def _broken_command(name: str, error: Exception) -> click.Command:
    reason = f"the command {name} cannot be loaded: {type(error).__name__}: {error}"

    @click.command(name, help=reason, short_help=f"({reason})", context_settings={"ignore_unknown_options": True})
    @click.argument("arguments", nargs=-1, type=click.UNPROCESSED)
    def broken(arguments: tuple[str, ...]) -> None:  # noqa: ARG001 - whatever follows the name
        raise PluginError(reason)

    return broken


@click.group(cls=PluginCommands, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(ourvidz_core.__version__, prog_name="ourvidz")
@click.option(
    "--log-level",
    type=click.Choice(["debug", "info", "warning", "error"]),
    help="How much is logged; OURVIDZ_LOG_LEVEL unless said.",
)
@click.pass_context
def cli(context: click.Context, log_level: str | None) -> None:
    """Turn messages on a queue into stored media and truthful callbacks."""
    context.obj = {"log_level": log_level}


for _command in (
    run,
    enqueue,
    worker,
    validate,
    job_types,
    plugins,
    demo,
    queue,
    cancel,
    doctor,
    new,
    up,
    status,
    dashboard,
    top,
):
    cli.add_command(_command)
plugins.add_command(check_plugins)


def main(arguments: list[str] | None = None) -> int:
    """Run the command line and answer its exit code. An error of ours is one paragraph on stderr."""
    logging.captureWarnings(True)
    try:
        answer: Any = cli.main(arguments, prog_name="ourvidz", standalone_mode=False)
    except click.exceptions.Exit as error:
        return error.exit_code
    except click.ClickException as error:
        error.show()
        return EXIT_WRONG_USE
    except (click.Abort, KeyboardInterrupt):
        return EXIT_INTERRUPTED
    except OurVidzError as error:
        click.echo(f"{type(error).__name__}: {error}", err=True)
        return _exit_code(error)
    except BrokenPipeError:
        return EXIT_JOB_FAILED  # the reader of our output has left
    except OSError as error:
        if error.filename is None:
            raise
        click.echo(
            f"{type(error).__name__}: {error.filename} cannot be used: {error.strerror}."
            " If it lies below OURVIDZ_STATE_DIR or OURVIDZ_WORK_DIR, set that to a directory this user may write to",
            err=True,
        )
        return EXIT_WRONG_USE
    return answer if isinstance(answer, int) else 0


def _exit_code(error: OurVidzError) -> int:
    if isinstance(error, SettingsError | PluginError):
        return EXIT_WRONG_USE
    if isinstance(error, QueueError):
        return EXIT_NO_SERVICE
    return EXIT_JOB_FAILED if isinstance(error, JobError) else EXIT_WRONG_USE


def entry_point() -> None:
    """The console script."""
    sys.exit(main())
