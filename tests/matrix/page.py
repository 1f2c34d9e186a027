"""The page that the matrix writes: a picture, a summary, and one section for each table."""

from __future__ import annotations

import json
import os
from dataclasses import asdict
from statistics import median
from typing import TYPE_CHECKING

from .cell import EXACT
from .versions import machine, versions

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path

    from .cell import Cell

HEAD = """\
# The matrix

Every strategy of polyak and of its installed plugins, compared with the other libraries' real classes and with the
sum of its own shares in float64, on the same weights. `python3 noxfile.py -s matrix` (or `python -m tests.matrix`, with
`--strategies`, `--architectures`, `--steps`, `--out`) writes this page and its picture; the code is in `tests/matrix`.

![How far polyak's averages are from each reference, and how long the references take](assets/matrix.png)
"""


def summary(cells: Sequence[Cell]) -> str:
    """Return in a few lines what the table says."""
    exact = [cell for cell in cells if cell.reference == EXACT and cell.error is not None]
    theirs = [cell for cell in cells if cell.reference != EXACT and cell.error is not None]
    if not exact:
        return "- Nothing could be measured."
    lines = [f"Against float64, the largest of all {len(exact)} differences is {_largest(exact):.0e}."]
    if alike := [cell for cell in theirs if not cell.odd]:
        same = sum(cell.error == 0 for cell in alike)
        lines.append(
            f"Of {len(theirs)} comparisons with libraries, {same} agree in every bit and {len(alike) - same} differ by "
            f"{_largest(alike):.0e} at the most."
        )
    for remark in dict.fromkeys(cell.remark for cell in cells if cell.odd):
        odd = [cell for cell in cells if cell.odd and cell.remark == remark]
        where = ", ".join(dict.fromkeys(f"{cell.reference} on {cell.architecture}" for cell in odd))
        why = remark or "this needs an explanation"
        lines.append(f"{len(odd)} differ by up to {_largest(odd):.0e} ({where}): {why}.")
    if theirs:
        factor = median(cell.speed or 1.0 for cell in theirs)
        lines.append(f"Updates of the libraries take {factor:.1f} times as long as polyak's (median).")
    return "\n".join(f"- {line}" for line in lines)


def _largest(cells: Sequence[Cell]) -> float:
    return max(cell.error or 0.0 for cell in cells)


def page(cells: Sequence[Cell], *sections: str) -> str:
    """Return the whole page."""
    took_part = ", ".join(f"{name} {number}" for name, number in versions().items())
    ran_on = f"## What it ran on\n\n{took_part}.\n\n{machine()}.\n"
    return "\n".join([HEAD, summary(cells), "", *sections, "", ran_on])


def as_json(cells: Sequence[Cell], steps: int) -> str:
    """Return the numbers for other programs."""
    told = {"machine": machine(), "versions": versions(), "steps": steps, "cells": [asdict(cell) for cell in cells]}
    return json.dumps(told, indent=1) + "\n"


def write(path: Path, make: Callable[[Path], object]) -> None:
    """Let ``make`` write a file beside ``path``, and rename it when it is whole."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}.part")
    try:
        make(part)
        os.replace(part, path)  # noqa: PTH105 - overwrites on every system, as Path.replace does
    finally:
        part.unlink(missing_ok=True)
