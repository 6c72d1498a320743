"""``ourvidz job-types`` and ``ourvidz plugins``: what is installed. Imports nothing heavy."""

from __future__ import annotations

import logging

import attrs
import click

from ourvidz_core.cli.common import open_registry, open_settings, print_json, table
from ourvidz_core.wire.payloads import json_of


@click.command("job-types")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
@click.option("--markdown", is_flag=True, help="Print a Markdown table.")
@click.option("--json-schema", is_flag=True, help="Print the JSON Schema (2020-12) of their messages.")
def job_types(as_json: bool, markdown: bool, json_schema: bool) -> None:
    """List the job types that the installed plugins own."""
    registry = open_registry(open_settings(at_least=logging.ERROR))
    if json_schema:
        from ourvidz_core.wire.schemas import messages_schema

        print_json(messages_schema(registry.job_types))
        return
    if as_json:
        print_json(
            [
                {**json_of(job_type), "plugin": registry.get(job_type.name).distribution}
                for job_type in registry.job_types
            ]
        )
        return
    rows = [
        (
            job_type.name,
            job_type.queue,
            job_type.content_type.value,
            job_type.quality.value if job_type.quality else "-",
            job_type.bucket,
            f"{job_type.vram_gb:g}",
            f"{job_type.expected_seconds:g}" if job_type.expected_seconds is not None else "-",
            registry.get(job_type.name).distribution,
        )
        for job_type in registry.job_types
    ]
    head = ("JOB TYPE", "QUEUE", "MAKES", "QUALITY", "BUCKET", "VRAM GIB", "EXPECTED S", "PLUGIN")
    click.echo(table(head, rows, markdown=markdown))


@click.group()
def plugins() -> None:
    """Look at the installed plugins."""


@plugins.command("list")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def list_plugins(as_json: bool) -> None:
    """List every plugin that was found, loaded or not, and why not."""
    # Whoever looks for a plugin that is required and missing wants to see the others, too.
    settings = attrs.evolve(open_settings(at_least=logging.CRITICAL), require_plugins=[])
    registry = open_registry(settings)
    if as_json:
        print_json([attrs.asdict(record) for record in registry.records])
        return
    if not registry.records:
        click.echo("no plugins are installed; pip install ourvidz-sdxl, for example")
        return
    rows = [
        (
            record.distribution,
            record.version,
            record.status.value,
            " ".join(record.job_types) if record.status == "loaded" else record.reason,
            " ".join(hook for hook in record.hooks if hook != "register_job_types"),
        )
        for record in registry.records
    ]
    click.echo(table(("DISTRIBUTION", "VERSION", "STATUS", "JOB TYPES", "HOOKS"), rows))
    for record in registry.records:
        for warning in record.warnings:
            click.echo(f"{record.distribution} {record.version}: {warning}", err=True)
