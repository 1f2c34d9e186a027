"""The table and the picture of averaged files."""

from __future__ import annotations

import math
from functools import partial
from importlib import import_module
from typing import TYPE_CHECKING

from polyak.bench.table import Table
from polyak.errors.extras import needed_for
from polyak.io.atomic import write_whole
from polyak.plot import palette

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from matplotlib.axes import Axes

    from polyak.bench.files import FilesReport, FilesRow

__all__ = ["busy_files", "draw_files", "files_table"]

_OTHERS = ("load all", "one at a time", "read")
_BUSY = 0.5


def files_table(report: FilesReport) -> Table:
    """Return a row for each method and format, and the machine below them."""
    head = ("format", "method", "files", "MiB/s", "peak, MiB", *(f"× {name}" for name in _OTHERS))
    rows = [
        (
            row.format, row.method, _state(row), f"{row.rate:,.0f}", f"{row.peak:,.0f}",
            *(f"{ratio:.2f}" if math.isfinite(ratio := report.against(row, other)) else "-" for other in _OTHERS),
        )
        for row in report.rows
    ]  # fmt: skip
    took_part = ", ".join(f"{name} {release}" for name, release in report.versions.items())
    notes = [
        "MiB/s of input. Peak: above an interpreter with torch. Cold: the files were dropped from memory before.",
        f"Machine: {report.machine}. Versions: {took_part}.",
        *busy_files(report),
    ]
    return Table("files", _title(report), head, rows, notes)


def busy_files(report: FilesReport) -> list[str]:
    """Return that other programs used the processors, where that was often."""
    share = max((row.busy for row in report.rows), default=0.0)
    if share <= _BUSY:
        return []
    used = f"{100 * share:.0f} %"
    return [f"Other programs used the processors in up to {used} of a row's samples: run it where nothing else runs."]


def draw_files(report: FilesReport, file: Path) -> None:
    """Write a picture: the rate of each method, with its range and its memory.

    Raises:
        MissingExtraError: If matplotlib is not installed.
    """
    with needed_for("the picture", "matplotlib"):
        import_module("matplotlib")
    from matplotlib.figure import Figure

    panels: dict[tuple[str, bool], list[FilesRow]] = {}
    for row in report.rows:
        panels.setdefault((row.format, row.cold), []).append(row)
    figure = Figure(figsize=(12, 1 + 1.9 * math.ceil(len(panels) / 2)), layout="constrained")
    every = figure.subplots(math.ceil(len(panels) / 2), 2, squeeze=False).ravel()
    for axes in every[len(panels) :]:
        axes.set_axis_off()
    for axes, rows in zip(every, panels.values(), strict=False):
        _panel(axes, rows)
    figure.suptitle(_title(report), fontsize=11, fontweight="bold", x=0.01, ha="left")
    figure.supxlabel("\n".join([report.machine, *busy_files(report)]), fontsize=8, x=0.01, ha="left")
    write_whole(file, partial(figure.savefig, dpi=130, format=file.suffix[1:].lower()))


def _panel(axes: Axes, rows: Sequence[FilesRow]) -> None:
    looks = palette(["polyak", "library", "limit"])
    for place, row in enumerate(rows):
        group = "limit" if row.method == "read" else "polyak" if row.method.startswith("polyak") else "library"
        axes.barh(place, row.rate, height=0.7, color=looks[group]["color"])
        axes.plot([min(row.rates), max(row.rates)], [place, place], color="black", lw=1)
        label = f"{row.rate:,.0f} MiB/s, {row.peak:,.0f} MiB of memory"
        end = (max(row.rates), place)
        axes.annotate(label, end, (4, 0), textcoords="offset points", va="center", fontsize=8)
    axes.set(xscale="log", xlabel="MiB of input per second")
    low, high = min(min(row.rates) for row in rows), max(max(row.rates) for row in rows)
    axes.set_xlim(low / 2, high * (high / low) ** 0.5 * 4)
    axes.set_title(f".{rows[0].format}, {_state(rows[0])}", loc="left", fontsize=10)
    axes.set_yticks(range(len(rows)), [row.method for row in rows], fontsize=9)
    axes.set_ylim(len(rows) - 0.4, -0.6)
    axes.tick_params(axis="y", length=0)
    axes.spines[["top", "right", "left"]].set_visible(False)


def _state(row: FilesRow) -> str:
    return "cold" if row.cold else "hot"


def _title(report: FilesReport) -> str:
    rounds = len(report.rows[0].rates)
    return f"Averaging {report.files} files of {report.size} MiB, medians of {rounds} interleaved rounds"
