"""Pictures of a report: bars relative to the reference for each model, and lines for models that grow."""

from __future__ import annotations

import math
from functools import partial
from importlib import import_module
from itertools import groupby
from operator import attrgetter
from typing import TYPE_CHECKING

from polyak.bench.cases import CASES
from polyak.bench.fit import lines
from polyak.bench.number import number
from polyak.errors.extras import needed_for
from polyak.errors.formatting import byte_size
from polyak.io.atomic import write_whole
from polyak.plot import palette

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch

    from polyak.bench.report import Report, Row

__all__ = ["draw"]

_LOOKS = palette(["polyak", "library", "limit"])
_NAMES = {"polyak": "polyak", "library": "other libraries"}
_DASHES = (0, (4, 2))
_INCH = 0.27  # for each bar
_DECADES = 100.0  # from this range on, powers of ten are ticks enough


def draw(report: Report, file: Path) -> list[Path]:
    """Write one picture for each case, with the case in the file's name where there are several.

    Raises:
        MissingExtraError: If matplotlib is not installed.
    """
    by_case = {case: list(rows) for case, rows in groupby(report.rows, attrgetter("case"))}
    drawn = []
    for case, rows in by_case.items():
        if any(row.milliseconds for row in rows):
            figure = (_grown if CASES[case].alone else _bars)(rows, report.machine)
            figure.suptitle(
                CASES[case].title + _beside(rows), fontsize=11, fontweight="bold", x=0.01, ha="left", wrap=True
            )
            target = file if len(by_case) == 1 else file.with_stem(f"{file.stem}-{case}")
            write_whole(target, partial(figure.savefig, dpi=130, format=target.suffix[1:].lower()))
            drawn.append(target)
    return drawn


def _figure(panels: int, columns: int, height: float) -> tuple[Figure, list[Axes]]:
    with needed_for("the picture", "matplotlib"):
        import_module("matplotlib")
    from matplotlib.figure import Figure

    across = min(columns, panels)
    down = math.ceil(panels / across)
    figure = Figure(figsize=(1.5 + 6 * across, 1 + height * down), layout="constrained")
    every = figure.subplots(down, across, squeeze=False).ravel()
    for axes in every[panels:]:
        axes.set_axis_off()
    for axes in every:
        axes.spines[["top", "right", "left"]].set_visible(False)
    return figure, list(every[:panels])


def _bars(rows: Sequence[Row], machine: str) -> Figure:
    drawn = [row for row in rows if row.group != "limit"]
    panels = [list(panel) for _, panel in groupby(drawn, attrgetter("model", "setting"))]
    height = 0.8 + _INCH * max(map(len, panels))
    figure, every = _figure(len(panels), 2, height)
    for axes, panel in zip(every, panels, strict=True):
        first = panel[0]
        where = (first.model, first.setting)
        limits = [row for row in rows if row.group == "limit" and (row.model, row.setting) == where]
        _panel(axes, panel, [row.ratio.median for row in limits if row.ratio])
    handles = _explained(drawn, limited=any(row.group == "limit" and row.ratio for row in rows))
    look = {"frameon": False, "fontsize": 8, "title_fontsize": 8, "alignment": "left"}
    columns = 1 if len(panels) == 1 else len(handles)
    figure.legend(handles=handles, title=machine, loc="outside lower left", ncols=columns, **look)
    return figure


def _explained(rows: Sequence[Row], *, limited: bool) -> list[Patch | Line2D]:
    """Return the entries of the legend."""
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch

    groups = dict.fromkeys(row.group for row in rows)
    handles: list[Patch | Line2D] = [Patch(color=_LOOKS[name]["color"], label=_NAMES[name]) for name in groups]
    handles.append(Line2D([], [], color="black", lw=1, label="from a quarter to three quarters of the rounds"))
    if limited:
        limit = "the memory's limit: one pass over as many bytes"
        handles.append(Line2D([], [], color=_LOOKS["limit"]["color"], ls=_DASHES, lw=1.5, label=limit))
    return handles


def _panel(axes: Axes, rows: Sequence[Row], limits: Sequence[float]) -> None:
    sizes = max(rows, key=attrgetter("values"))
    about = ", ".join(filter(None, [sizes.setting, f"{sizes.tensors:,} tensors, {sizes.values / 1e6:.3g} M values"]))
    axes.set_title(f"{sizes.model} ({about})", loc="left", fontsize=10)
    for place, row in enumerate(rows):
        if row.ratio is None or row.milliseconds is None:
            axes.text(1, place, "  not measured: see the table", va="center", fontsize=8, color="dimgrey")
            continue
        ratio = row.ratio
        axes.barh(place, ratio.median - 1, left=1, height=0.7, color=_LOOKS[row.group]["color"])
        axes.plot([ratio.first, ratio.third], [place, place], color="black", lw=1)
        share = f", {number(100 * row.share.median)} % of a step" if row.share else ""
        held = "" if row.held is None else f", {byte_size(row.held, 'MiB')} on a rank"
        label = f"{number(ratio.median)} ×  ({number(row.milliseconds.median)} ms{share}{held})"
        end = max(ratio.third, 1.0)
        axes.annotate(label, (end, place), (4, 0), textcoords="offset points", va="center", fontsize=8)
    axes.axvline(1, color="black", lw=1)
    if limits:
        axes.axvline(min(limits), color=_LOOKS["limit"]["color"], ls=_DASHES, lw=1.5)
    _scale(axes, [row.ratio.median for row in rows if row.ratio], limits)
    axes.set_yticks(range(len(rows)), [row.subject for row in rows], fontsize=9)
    axes.set_ylim(len(rows) - 0.4, -0.6)
    axes.tick_params(axis="y", length=0)


def _scale(axes: Axes, ratios: Sequence[float], limits: Sequence[float]) -> None:
    from matplotlib.ticker import LogLocator, NullLocator

    low, high = min([*ratios, *limits, 0.5]), max([*ratios, 1.5])
    room = (high / low) ** 0.45  # right of the longest bar, for its label
    axes.set_xscale("log")
    axes.set_xlim(low / 1.3, high * max(room, 2))
    subs = (1.0,) if high / low > _DECADES else (1.0, 2.0, 5.0)
    axes.xaxis.set(major_locator=LogLocator(subs=subs), major_formatter="{x:g}", minor_locator=NullLocator())
    axes.grid(axis="x", alpha=0.25)
    axes.set_axisbelow(True)


def _grown(rows: Sequence[Row], machine: str) -> Figure:
    every = lines(rows)
    models = list(dict.fromkeys(line.model for line in every))
    figure, panels = _figure(len(models), 2, 5.8)
    figure.supxlabel(machine, fontsize=8, x=0.01, ha="left")
    looks = palette(dict.fromkeys(line.subject for line in every))
    for axes, model in zip(panels, models, strict=True):
        for line in (line for line in every if line.model == model):
            color = looks[line.subject]["color"]
            axes.plot(line.counts, line.times, "o", ms=4, color=color)
            fitted = [line.fixed + line.each * count for count in line.counts]
            axes.plot(line.counts, fitted, **looks[line.subject], label=f"{line.subject}: {line.equation}")
            axes.set_xlabel(f"number of {line.counted}")
        axes.set(title=model, xscale="log", yscale="log", ylabel="ms per update")
        axes.grid(alpha=0.25)
        axes.legend(
            frameon=False, fontsize=8, title="the line through the points", title_fontsize=8, alignment="left",
            loc="upper left", bbox_to_anchor=(0, -0.1),
        )  # fmt: skip
    return figure


def _beside(rows: Sequence[Row]) -> str:
    references = list(dict.fromkeys(row.reference for row in rows if row.reference))
    if CASES[rows[0].case].alone or not references:
        return ""
    named = references[0] if len(references) == 1 else "the first of each panel"
    return f"\ntime over that of {named}; bars to the left of 1 are faster"
