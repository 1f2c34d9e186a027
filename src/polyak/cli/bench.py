"""``polyak bench``: what averaging costs on this machine."""

from __future__ import annotations

from pathlib import Path  # noqa: TC003 - typer reads the annotations
from typing import TYPE_CHECKING, Annotated

import typer

from polyak.cli.outputs import check_folder, check_picture
from polyak.cli.reporting import errors_reported
from polyak.cli.tables import Listing, show
from polyak.errors import ConfigError

if TYPE_CHECKING:
    from polyak.bench import Report
    from polyak.bench.table import Table

__all__ = ["bench"]

Names = list[str] | None


def bench(  # noqa: PLR0913, PLR0917 - each is one axis, and users complete from this signature
    cases: Annotated[
        Names,
        typer.Argument(
            help="update (default), construction, host, precision, bank, adamw, scaling, step, ranks, or files alone."
        ),
    ] = None,
    model: Annotated[
        Names,
        typer.Option(
            help="resnet18, resnet50 (default), convnext_tiny, vit_b_16, gpt2, tiny-tensors, batchnorms, or "
            "module:callable, which returns a module, or a module and the inputs of a training step. May be repeated.",
        ),
    ] = None,
    strategy: Annotated[Names, typer.Option(help="A strategy's name (default: ema), or all. May be repeated.")] = None,
    kernel: Annotated[Names, typer.Option(help="A kernel (default: all of them). May be repeated.")] = None,
    against: Annotated[
        Names,
        typer.Option(
            help="timm-v1, timm-v2, timm-v3, torch, torch-swa, ema-pytorch, torch-ema, diffusers (default: all that "
            "are installed). May be repeated.",
        ),
    ] = None,
    ranks: Annotated[
        list[int] | None,
        typer.Option(
            help="Processes, for the case ranks (default: 1, 2 and 4, as many as have a core or a device). "
            "May be repeated."
        ),
    ] = None,
    threads: Annotated[
        int | None,
        typer.Option(help="Threads that torch computes with (default: as torch chooses, and for update also 1)."),
    ] = None,
    device: Annotated[str | None, typer.Option(help="Where the models live (default: accelerator, or cpu).")] = None,
    size: Annotated[int, typer.Option(help="MiB of each of five files, for the case files.")] = 256,
    rounds: Annotated[int, typer.Option(help="Interleaved rounds, for the case files.")] = 5,
    seconds: Annotated[float, typer.Option(help="About how long one case measures one model.")] = 15.0,
    json: Annotated[Path | None, typer.Option(help="A file for the numbers.")] = None,
    plot: Annotated[Path | None, typer.Option(help="A file for the picture; one for each case.")] = None,
) -> None:
    """Measure the time and memory of averaging on this machine, next to other libraries and the memory's own limit."""
    from polyak.bench import Settings, measure

    with errors_reported():
        _check(json, plot)
        if cases and "files" in cases:
            _of_files(cases, size, rounds, json, plot)
            return
        settings = Settings(
            models=tuple(model or ["resnet50"]), strategies=tuple(strategy or ["ema"]), kernels=tuple(kernel or []),
            against=tuple(against) if against else None, device=device, threads=threads, seconds=seconds,
            ranks=tuple(ranks or []),
        )  # fmt: skip
        report = measure(tuple(cases or (["ranks"] if ranks else ["update"])), settings)
        if json is not None:
            report.write(json)
        _show(report)
        if plot is not None:
            from polyak.bench.picture import draw

            for file in draw(report, plot):
                typer.echo(f"drawn: {file}")


def _of_files(cases: list[str], size: int, rounds: int, json: Path | None, plot: Path | None) -> None:
    from polyak.bench.file_table import draw_files, files_table
    from polyak.bench.files import measure_files

    if cases != ["files"]:
        message = "the case files is measured alone; leave the other cases out"
        raise ConfigError(message)
    # An interruption of the minutes that this takes leaves the rounds before it.
    report = measure_files(size, rounds=rounds, after=None if json is None else lambda found: found.write(json))
    _print(files_table(report))
    if plot is not None:
        draw_files(report, plot)
        typer.echo(f"drawn: {plot}")


def _show(report: Report) -> None:
    from polyak.bench.table import caption, tables

    for shown in tables(report):
        _print(shown)
    for line in caption(report):
        typer.echo(line)


def _print(table: Table) -> None:
    typer.echo(f"{table.title}\n")
    show(Listing(table.head, table.rows, wraps=len(table.head) - 1))
    for note in table.notes:
        typer.echo(note)
    typer.echo("")


def _check(json: Path | None, plot: Path | None) -> None:
    # What would fail after minutes of measuring fails before them.
    check_folder(json)
    check_picture(plot)
