"""``polyak soup``: the mean of those checkpoints that make it better."""

from __future__ import annotations

from pathlib import Path  # noqa: TC003 - typer reads the annotations
from typing import Annotated, Literal

import typer

from polyak.cli.functions import function_called
from polyak.cli.outputs import check_picture, picture
from polyak.cli.reporting import errors_reported

__all__ = ["soup"]


def soup(
    files: Annotated[list[Path], typer.Argument(metavar="FILE ...", help="Checkpoints: files, or folders.")],
    evaluate: Annotated[str, typer.Option(metavar="MODULE:FUNCTION", help="It takes a state dict, returns a score.")],
    work: Annotated[Path, typer.Option(help="A folder for the journal, by which an interrupted run goes on.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="The file or folder to write.")],
    how: Annotated[Literal["greedy", "uniform"], typer.Option(help="Which files: those that help, or all.")] = "greedy",
    rule: Annotated[
        Literal["strict", "not_worse"], typer.Option(help="Whether a file that changes no score is kept.")
    ] = "strict",
    mode: Annotated[Literal["max", "min"], typer.Option(help="Whether large scores are good, or small ones.")] = "max",
    key: Annotated[str | None, typer.Option(help="Where the weights are in a dictionary, such as ema.")] = None,
    match: Annotated[
        Literal["same", "common"], typer.Option(help="common: leave out tensors that some files lack.")
    ] = "same",
    plot: Annotated[Path | None, typer.Option(help="A .png, .svg or .pdf file for the picture.")] = None,
) -> None:
    """Average those checkpoints that make the average better by a function of yours; goes on after an interruption."""
    from polyak.files import soup as cooked

    with errors_reported():
        check_picture(plot)
        made = cooked(
            files, function_called(evaluate), how=how, rule=rule, mode=mode, work=work, out=output, key=key, match=match
        )
        typer.echo(made.table())
        typer.echo(f"soup of {len(made.kept)}: {made.score:.6g}, {made.gain:+.3g} better than the best file alone")
        typer.echo(f"evaluated {made.evaluations} times; the journal is in {work}")
        if plot is not None:
            name = evaluate.partition(":")[2]
            picture(
                plot, lambda axes: made.plot(axes, label=name), f"{how} soup of {len(made.kept)} of {len(files)} files"
            )
            typer.echo(f"drawn: {plot}")
        typer.echo(f"written: {made.out}")
