"""``polyak convert``: which member of another family of averages is most like one."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from polyak.cli.arguments import check_steps, named
from polyak.cli.reporting import errors_reported
from polyak.cli.tables import Listing, show
from polyak.io.progress import track
from polyak.planning.convert import Conversion, convert as converted
from polyak.registry import registry
from polyak.strategy import PowerEMA

if TYPE_CHECKING:
    from polyak.strategy.base import Strategy
    from polyak.strategy.profile import Profile

__all__ = ["convert"]

_HEAD = ("average", "settings", "elsewhere", "mean age", "half-life")


def convert(
    average: Annotated[
        list[str], typer.Argument(metavar="NAME KEY=VALUE ...", help="The average to be like: a strategy's settings.")
    ],
    steps: Annotated[int, typer.Option(help="Optimiser steps of the run.")],
    to: Annotated[
        list[str] | None, typer.Option(help="A family of averages (default: all of them). May be repeated.")
    ] = None,
    every: Annotated[int, typer.Option(help="Optimiser steps from one update to the next.")] = 1,
    to_every: Annotated[
        int | None, typer.Option(help="--every for the average being looked for, if different (for lawa).")
    ] = None,
) -> None:
    """Print which members of other families of averages are most like one at the end of a run, the nearest first."""
    with errors_reported():
        check_steps(steps)
        wanted = named(average)
        found = {
            name: converted(wanted, name, steps=steps, every=every, to_every=to_every)
            for name in track(to or _families(steps, wanted["name"]), "searching families")
        }
    ordered = sorted(found.items(), key=lambda one: one[1].distance)
    show(Listing(_HEAD, [_source(average, ordered[0][1]), *(_row(*one) for one in ordered)], wraps=1))
    typer.echo("Elsewhere: the part of the average that comes from other weights. Ages are in optimiser steps.")


def _families(steps: int, name: str) -> list[str]:
    known = registry().strategies().items()
    return [other for other, cls in known if other != name and cls.with_mean_age(1.0, steps) is not None]


def _source(words: list[str], found: Conversion) -> tuple[str, ...]:
    return (words[0], " ".join(words[1:]) or "-", "(wanted)", *_ages(found.wanted))


def _row(name: str, found: Conversion) -> tuple[str, ...]:
    return (name, _settings(found.strategy), f"{found.distance:.2%}", *_ages(found.profile))


def _settings(strategy: Strategy) -> str:
    if isinstance(strategy, PowerEMA):
        return f"sigma_rel={_figure(strategy.width)} (gamma={_figure(strategy.exponent)})"
    given = strategy.model_dump(exclude_defaults=True)
    return " ".join(f"{key}={_figure(value)}" for key, value in given.items() if key != "name") or "-"


def _figure(value: object) -> str:
    """Return a setting with five digits, of what is missing to 1 where that is less: decays differ there."""
    if not isinstance(value, float):
        return str(value)
    near = 1 - value if 0 < value < 1 else value
    least = min(abs(value), abs(near)) or 1.0
    digits = max(0, 4 - int(f"{least:e}".partition("e")[2]))
    return f"{round(value, digits):.15g}"


def _ages(profile: Profile) -> tuple[str, str]:
    return f"{profile.mean_age:.1f}", f"{profile.half_life:.0f}"
