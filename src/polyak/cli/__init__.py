"""The command line: what is installed, what averages count and cost, and which one to choose after a run."""

from __future__ import annotations

import json
import logging
from pathlib import Path  # noqa: TC003 - typer reads the annotations
from typing import Annotated

import typer

from polyak import AveragerConfig, __version__
from polyak.cli.bench import bench
from polyak.cli.convert import convert
from polyak.cli.files import average, diff, inspect
from polyak.cli.merge import list_merges, merge
from polyak.cli.plan import plan
from polyak.cli.posthoc import snapshots, sweep, synthesize
from polyak.cli.profile import profile
from polyak.cli.soup import soup
from polyak.cli.tables import list_plugins, list_stand_ins, list_strategies, show, versions
from polyak.config.files import write
from polyak.registry import registry

__all__ = ["app"]

app = typer.Typer(
    help="Weight averaging for PyTorch: which average, what it costs, and which one after the run.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)


def _version(wanted: bool) -> None:  # noqa: FBT001 - typer calls it with the flag
    if wanted:
        typer.echo(f"polyak {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    _: Annotated[bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version.")] = False,  # noqa: FBT002 - a flag
) -> None:
    pass


app.command("average")(average)
app.command("inspect")(inspect)
app.command("diff")(diff)
app.command("merge")(merge)
app.command("merges")(list_merges)
app.command("soup")(soup)
app.command("profile")(profile)
app.command("convert")(convert)
app.command("snapshots")(snapshots)
app.command("synthesize")(synthesize)
app.command("sweep")(sweep)
app.command("bench")(bench)
app.command("plan")(plan)


@app.command("strategies")
def _strategies() -> None:
    """List all strategies: name, settings with defaults, source, and the distribution that offers each."""
    show(list_strategies(registry().strategies()))


@app.command("compat")
def _compat() -> None:
    """List the classes of other libraries that polyak stands in for, and what differs on purpose."""
    show(list_stand_ins())


@app.command("plugins")
def _plugins() -> None:
    """List the plugins: what loaded, what failed and why."""
    logging.getLogger("polyak").addHandler(logging.NullHandler())  # the table says it all
    names = registry()
    typer.echo(versions())
    if names.plugins:
        show(list_plugins(names.plugins, names.strategies(), names.merges()))
    else:
        typer.echo("No plugins are installed.")


@app.command("schema")
def _schema(
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="The file to write; else standard output.")
    ] = None,
) -> None:
    """Write the JSON schema of config files, for editors; installed plugins are part of it."""
    text = json.dumps(AveragerConfig.model_json_schema(), indent=2) + "\n"
    if output is None:
        typer.echo(text, nl=False)
    else:
        write(output, text)
