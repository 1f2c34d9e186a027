"""What the command line lists, in tables that stay whole when piped."""

from __future__ import annotations

import platform
from importlib.metadata import version
from typing import TYPE_CHECKING, NamedTuple

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from rich.text import Text

from polyak import __version__
from polyak.compat import STAND_INS
from polyak.engine.options import Options

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from polyak.registry import Merges, Plugin, Strategies
    from polyak.strategy.base import Strategy

__all__ = ["Listing", "list_plugins", "list_strategies", "show", "versions"]

_GAP = 3  # what a table puts around a column


class Listing(NamedTuple):
    """Rows of text below a head; ``wraps`` is the column whose lines a terminal may break, at spaces."""

    head: tuple[str, ...]
    rows: Sequence[tuple[str, ...]]
    wraps: int


def show(listing: Listing, console: Console | None = None) -> None:
    """Print a listing: as a table that fits the terminal, or one whole line for each row where none fits."""
    console = console or Console()
    needs = [
        max(map(len, cell.split() if number == listing.wraps else cell.splitlines()))
        for row in (listing.head, *listing.rows)
        for number, cell in enumerate(row)
    ]
    columns = len(listing.head)
    least = sum(max(needs[number::columns]) + _GAP for number in range(columns))
    if console.is_terminal and least <= console.width:
        _show_table(listing, console)
    else:
        _show_lines(listing, console)


def list_strategies(strategies: Strategies) -> Listing:
    """Return a row for each strategy that can be chosen."""
    rows = [
        (name, strategies.distribution(name), cls.source or "-", ",\n".join(_settings(cls)) or "-")
        for name, cls in strategies.items()
    ]
    return Listing(("strategy", "offered by", "source", "settings"), rows, wraps=2)


def list_plugins(plugins: Iterable[Plugin], strategies: Strategies, merges: Merges) -> Listing:
    """Return a row for each entry point: what it offers, or why it is not there."""
    rows = []
    for plugin in plugins:
        own = [key for named in (strategies, merges) for key in named if named.distribution(key) == plugin.distribution]
        offers = [key for key in own if key.rpartition(":")[2] in plugin.offers]
        state = "loaded" if not plugin.error else "disabled" if plugin.error.startswith("disabled") else "failed"
        what = plugin.error or (f"offers {', '.join(offers)}" if offers else "offers nothing")
        rows.append((plugin.name, plugin.distribution, plugin.version, plugin.target, state, what))
    return Listing(("plugin", "distribution", "version", "target", "state", "what"), rows, wraps=5)


def list_stand_ins() -> Listing:
    """Return a row for each class of another library that ``polyak.compat`` stands in for."""
    rows = [
        (f"polyak.compat.{one.module}.{name}", f"{one.library} {one.version}", one.differs)
        for one in STAND_INS
        for name in one.names
    ]
    return Listing(("class", "stands in for", "differs on purpose"), rows, wraps=2)


def versions() -> str:
    """Return the versions that a report of a defect should name."""
    packages = ", ".join(f"{name} {version(name)}" for name in ("torch", "pydantic", "pluggy"))
    return f"polyak {__version__}, Python {platform.python_version()}, {packages}"


def _settings(cls: type[Strategy]) -> list[str]:
    """Return the defaults of ``polyak.average(model, name)``: the settings, then the options the strategy chooses."""
    needed = [name for name, field in cls.model_fields.items() if field.is_required()]
    made: Strategy = cls.model_construct() if needed else cls.model_validate({})  # type: ignore[call-arg]  # the name has a default
    settings = {name: getattr(made, name) for name in cls.model_fields if name not in {"name", *needed}}
    chosen = Options().completed(made)
    usual = {**Options().model_dump(), "match": "name", "origin": None}
    options = {name: value for name, value in chosen.model_dump().items() if value != usual[name]}
    values = [f"{key}={value!r}" for key, value in {**settings, **options}.items()]
    return [*(f"{name} (required)" for name in needed), *values]


def _show_table(listing: Listing, console: Console) -> None:
    table = Table(box=SIMPLE_HEAD, pad_edge=False)
    for number, title in enumerate(listing.head):
        table.add_column(title, no_wrap=number != listing.wraps)
    for row in listing.rows:
        table.add_row(*map(Text, row))  # as Text: brackets in a message are no markup
    console.print(table)


def _show_lines(listing: Listing, console: Console) -> None:
    rows = [[" ".join(cell.split()) for cell in row] for row in (listing.head, *listing.rows)]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        line = "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True))
        console.out(line.rstrip(), highlight=False)
