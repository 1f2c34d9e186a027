"""``polyak profile``: what each past step counts in averages, on paper."""

from __future__ import annotations

from pathlib import Path  # noqa: TC003 - typer reads the annotations
from typing import TYPE_CHECKING, Annotated

import typer

from polyak.cli.arguments import average_at, check_steps, split
from polyak.cli.outputs import check_picture, picture
from polyak.cli.reporting import errors_reported
from polyak.cli.tables import Listing, show

if TYPE_CHECKING:
    from polyak.strategy.profile import Profile

__all__ = ["profile"]

_HEAD = ("average", "mean age", "half-life", "spread", "spread/run", "equal shares", "start")
_VISIBLE = 0.005  # of the average


def profile(
    averages: Annotated[
        list[str],
        typer.Argument(
            metavar="NAME KEY=VALUE ... [+ NAME ...]",
            help="Strategies with their settings; start=, every= and origin= may be among them, and a start below 1 "
            "is a part of the run.",
        ),
    ],
    steps: Annotated[int, typer.Option(help="Optimiser steps of the run.")],
    every: Annotated[int, typer.Option(help="Optimiser steps from one update to the next.")] = 1,
    plot: Annotated[Path | None, typer.Option(help="A .png, .svg or .pdf file for the picture.")] = None,
) -> None:
    """Print what each past step counts in averages at the end of a run, and how far they are from the first of them."""
    with errors_reported():
        check_steps(steps)
        check_picture(plot)
        profiles = {" ".join(words): average_at(words, steps, every) for words in split(averages)}
        first = next(iter(profiles.values()))
        several = len(profiles) > 1
        apart = {label: (f"{first.distance(one):.1%}",) * several for label, one in profiles.items()}
        rows = [(label, *_figures(one, steps), *apart[label]) for label, one in profiles.items()]
        show(Listing((*_HEAD, *("from the first",) * several), rows, wraps=0))
        _explain(several=several)
        if plot is not None:
            from polyak.plot import shares

            named = {_label(label, one): one for label, one in profiles.items()}
            picture(plot, lambda axes: shares(named, axes), f"What each past step counts, after {steps:,} steps")
            typer.echo(f"drawn: {plot}")


def _figures(one: Profile, steps: int) -> tuple[str, ...]:
    # Negative shares have no spread.
    spread = ("-", "-") if (one.shares < 0).any() else (f"{one.spread:.1f}", f"{one.spread / steps:.4f}")
    return (f"{one.mean_age:.1f}", f"{one.half_life:.0f}", *spread, f"{one.effective_size:.1f}", f"{one.start:.2%}")


def _label(label: str, one: Profile) -> str:
    """Return the name of a line, with what a line on a logarithmic scale does not show."""
    hidden = [f"start:\N{NO-BREAK SPACE}{one.start:.0%}"] if one.start >= _VISIBLE else []
    if (negative := -one.shares[one.shares < 0].sum()) > 0:
        hidden.append(f"negative:\N{NO-BREAK SPACE}{negative:.0%}")
    return f"{label} ({', '.join(hidden)})" if hidden else label


def _explain(*, several: bool) -> None:
    typer.echo(
        "Ages and half-lives are in optimiser steps; spread/run is sigma_rel. Equal shares: as many would leave as "
        "much noise. start: what the weights before the first update still count."
    )
    if several:
        typer.echo("From the first: the part of the average that comes from other weights than the first one's.")
