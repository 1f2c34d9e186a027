"""``python -m tests.matrix``: strategies × architectures × libraries, as a table, a page and a picture."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

import polyak

from . import hard, page, picture, table
from .architectures import ARCHITECTURES
from .cell import Cell
from .measure import measure
from .race import keep_freed_memory
from .versions import machine

DOCS = Path(__file__).parents[2] / "docs"


def options() -> argparse.Namespace:
    """Return what the user asked for."""
    names, architectures = list(polyak.strategies()), list(ARCHITECTURES)
    parser = argparse.ArgumentParser(prog="python -m tests.matrix", description=__doc__)
    parser.add_argument("--strategies", nargs="+", choices=names, default=names, metavar="NAME", help=", ".join(names))
    parser.add_argument(
        "--architectures", nargs="+", choices=architectures, default=architectures, metavar="NAME",
        help=", ".join(architectures),
    )  # fmt: skip
    parser.add_argument("--steps", type=int, default=16, help="updates of each average (default: %(default)s)")
    parser.add_argument("--out", type=Path, default=DOCS, metavar="DIR", help="where matrix.md and assets/ are written")
    chosen = parser.parse_args()
    if chosen.steps < 1:
        parser.error(f"--steps {chosen.steps}: give at least 1")
    return chosen


def main() -> int:
    """Measure, print the table, and write the page, its picture and the numbers; 1 where an average is wrong."""
    chosen, console = options(), Console()
    torch.set_num_threads(1)  # a race measures the time of its own thread
    keep_freed_memory()
    cells = _measured(chosen, console)
    console.print(table.terminal(cells, console.width))
    console.print(page.summary(cells), soft_wrap=True)
    assets = chosen.out / "assets"
    page.write(assets / "matrix.png", lambda path: picture.draw(cells, path, machine()))
    page.write(assets / "matrix.json", lambda path: path.write_text(page.as_json(cells, chosen.steps)))
    text = page.page(cells, table.section(cells, chosen.steps))
    page.write(chosen.out / "matrix.md", lambda path: path.write_text(text))
    console.print(
        f"written: {chosen.out / 'matrix.md'}, {assets / 'matrix.png'}, {assets / 'matrix.json'}", soft_wrap=True
    )
    right = hard.report(chosen.out, console)
    return int(not right or any(cell.odd and not cell.remark for cell in cells))


def _measured(chosen: argparse.Namespace, console: Console) -> list[Cell]:
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    cells: list[Cell] = []
    with Progress(*columns, console=console, disable=not console.is_terminal, transient=True) as progress:
        task = progress.add_task("", total=len(chosen.strategies) * len(chosen.architectures))
        for strategy in chosen.strategies:
            for architecture in chosen.architectures:
                progress.update(task, description=f"{strategy} on {architecture}")
                cells += measure(strategy, architecture, chosen.steps)
                progress.advance(task)
    return cells


sys.exit(main())
