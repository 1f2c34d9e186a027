"""The first table, strategies × architectures × references: for the terminal and as a section of the page."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby
from operator import attrgetter

from rich import box
from rich.console import Console
from rich.measure import Measurement
from rich.table import Table

import polyak

from .architectures import build, size
from .cell import SETTINGS, Cell, needed, settled
from .subjects import LIBRARIES, REFERENCES

_ROOMY = Console(width=1000)
READING = """\
Each cell compares polyak's average with the reference's after the same {steps} noisy steps of all weights and buffers.
Strategies run with {settings} where they have these settings, and with their defaults otherwise.

- **The difference** is the largest one between two floating tensors, as a share of the largest value of that tensor.
  float32 itself resolves 1.2e-07; 0 is the same in every bit. Compared is what the library promises:
  parameters only where it has *no buffers*.
- **The factor** is the library's time per update over polyak's: above 1 polyak is faster. It is the median over
  rounds in which the two make one update each in turn, in one thread on the CPU. polyak runs as it comes.
- **The column float64** is polyak with its defaults against the sum of all weights in float64, each with the share
  that the strategy states for it.
- **tied twice**: the library moves a tensor that has two names twice per update; polyak moves it once, on purpose.
- A cell without numbers says why the library cannot do it. torch's `AveragedModel` takes a function of your own, with
  which it could do any strategy whose rate depends on the number of updates alone; it ships none for these.
"""


def text(cell: Cell) -> str:
    """Return a cell in few words."""
    if cell.error is None:
        return cell.remark
    error = "0" if cell.error == 0 else f"{cell.error:.0e}"
    factor = f"{cell.speed:.1f}×" if cell.speed is not None else ""
    return " ".join(filter(None, [error, factor, cell.remark]))


def terminal(cells: Sequence[Cell], width: int) -> Table:
    """Return the table for a terminal: a column for each reference, or a row where so many columns are too wide."""
    title = "polyak against its references: largest relative difference, their time / polyak's"
    wide = _wide(cells)
    wide.title = title
    if Measurement.get(_ROOMY, _ROOMY.options, wide).minimum <= width:
        return wide
    narrow = _narrow(cells)
    narrow.title = title
    return narrow


def _wide(cells: Sequence[Cell]) -> Table:
    table = Table()
    for column in ("strategy", "architecture", *REFERENCES):
        table.add_column(column, no_wrap=column in {"strategy", "architecture"})
    for strategy, rows in _rows(cells):
        for i, (architecture, row) in enumerate(rows):
            above = rows[i - 1][1] if i else [None] * len(row)
            styled = (f"[{_style(cell)}]{_ditto(cell, other)}[/]" for cell, other in zip(row, above, strict=True))
            table.add_row(strategy if i == 0 else "", architecture, *styled, end_section=i == len(rows) - 1)
    return table


def _narrow(cells: Sequence[Cell]) -> Table:
    """Return one row for each reference that a strategy was compared with; the page says why others were not."""
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for column in ("strategy", "architecture", "reference", "difference", "time"):
        table.add_column(column, overflow="fold")
    for strategy, rows in _rows(cells):
        compared = [cell for _, row in rows for cell in row if cell.error is not None]
        if not compared:
            table.add_row(strategy, "", "", rows[0][1][0].remark, "", end_section=True)
        previous: Cell | None = None
        for cell in compared:
            same = previous is not None and cell.architecture == previous.architecture
            error = f"{'0' if cell.error == 0 else f'{cell.error:.0e}'} {cell.remark}".rstrip()
            factor = f"{cell.speed:.1f}×" if cell.speed is not None else ""
            names = "" if previous else strategy, "" if same else cell.architecture, cell.reference
            table.add_row(*names, f"[{_style(cell)}]{error}[/]", factor, end_section=cell is compared[-1])
            previous = cell
    return table


def section(cells: Sequence[Cell], steps: int) -> str:
    """Return the section of the page."""
    settings = " and ".join(f"`{key}={value}`" for key, value in SETTINGS.items())
    lines = ["## Every strategy against every library", "", READING.format(steps=steps, settings=settings)]
    lines += [_line("strategy", "architecture", *REFERENCES), _line(*["---"] * (2 + len(REFERENCES)))]
    for strategy, rows in _rows(cells):
        lines += [_line(f"`{strategy}`", architecture, *map(_markdown, row)) for architecture, row in rows]
    return "\n".join([*lines, "", _architectures(cells), "", _calls(cells)])


def _rows(cells: Sequence[Cell]) -> list[tuple[str, list[tuple[str, list[Cell]]]]]:
    return [
        (strategy, [(architecture, list(row)) for architecture, row in groupby(rows, attrgetter("architecture"))])
        for strategy, rows in groupby(cells, attrgetter("strategy"))
    ]


def _ditto(cell: Cell, above: Cell | None) -> str:
    repeats = above is not None and above.error is None and above.remark == cell.remark
    return "″" if repeats else text(cell)


def _style(cell: Cell) -> str:
    if cell.error is None:
        return "dim"
    return "yellow" if cell.odd else "green" if cell.error == 0 else "default"


def _markdown(cell: Cell) -> str:
    if cell.error is None:
        return f"*{cell.remark}*"
    return f"**{text(cell)}**" if cell.odd else text(cell)


def _architectures(cells: Sequence[Cell]) -> str:
    names = dict.fromkeys(cell.architecture for cell in cells)
    sizes = {name: size(build(name)) for name in names}
    told = (f"{name}: {tensors} tensors, {values:,} values" for name, (tensors, values) in sizes.items())
    return (
        f"The architectures have random weights: {'; '.join(told)}. The networks for images are torchvision's, with "
        "the `VisionTransformer` reduced to 4 layers of width 128; the language model's output layer is its embedding."
    )


def _calls(cells: Sequence[Cell]) -> str:
    lines = ["### What each library was asked for", "", _line("strategy", "library", "theirs", "polyak")]
    lines += [_line(*["---"] * 4)]
    for name in dict.fromkeys(cell.strategy for cell in cells if not needed(cell.strategy)):
        strategy = settled(name)
        for library in LIBRARIES:
            setup = library.setup(strategy)
            if not isinstance(setup, str):
                ours = _polyak_call(strategy, setup.ours)
                lines.append(_line(f"`{name}`", library.distribution, f"`{library.said(setup)}`", f"`{ours}`"))
    return "\n".join([*lines, "", "Where timm warms up it is given the step: `update(model, step=step)`."])


def _polyak_call(strategy: polyak.Strategy, options: dict[str, str]) -> str:
    shown = {**strategy.model_dump(exclude_defaults=True), **options}
    settings = (f"{key}={value!r}" for key, value in shown.items())
    return f"polyak.average({', '.join(['model', repr(strategy.name), *settings])})"


def _line(*cells: str) -> str:
    return f"| {' | '.join(cells)} |"
