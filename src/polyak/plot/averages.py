"""Plots of averages: what each past step counts, and how a run went. Needs matplotlib."""

from __future__ import annotations

from itertools import cycle, pairwise
from textwrap import fill
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from polyak.errors.extras import needed_for

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping

    from matplotlib.axes import Axes
    from numpy.typing import ArrayLike, NDArray

    from polyak.strategy.profile import Profile

    Floats = NDArray[np.float64]
    Looks = Mapping[str, Mapping[str, Any]]

__all__ = ["COLORS", "POOR", "curves", "metrics", "new_axes", "palette", "shares"]

# Okabe and Ito's colours, which any colour vision can distinguish, and two of Tol's; dashes mark the rounds.
COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#882255", "#999933")
_DASHES = ("-", (0, (5, 1.5)), (0, (1.5, 1)))
_LABEL = 26  # characters in a line of a joint label
_SIZE = 9.0  # points
_POINTS = 1_000_000  # of a line
POOR = 0.1
"""The error of a profile from which on the average is another one than was wanted."""


def palette(labels: Iterable[str]) -> dict[str, dict[str, Any]]:
    """Return a colour and a dash for each label, so that it looks the same in every plot.

    Examples:
        >>> palette(["ema", "swa"])["swa"]
        {'color': '#D55E00', 'linestyle': '-'}
    """
    looks = cycle([{"color": color, "linestyle": dash} for dash in _DASHES for color in COLORS])
    return dict(zip(labels, looks, strict=False))


def shares(
    profiles: Mapping[str, Profile],
    ax: Axes | None = None,
    *,
    scale: Literal["log", "linear"] = "log",
    looks: Looks | None = None,
) -> Axes:
    """Draw what each past optimiser step counts in each average, on a logarithmic scale.

    The share of an update is divided among the steps since the update before. Averages that differ in at most 1 % of
    their shares are one line under a joint label.

    Args:
        profiles: The profiles to compare, by the label of their line.
        ax: Where to draw. Defaults to a new figure.
        scale: Of the age: "log", on which windows of 10 and of 100 000 steps are both readable, or "linear", with the
            last step at the right, like the curves of a run.
        looks: Keywords of matplotlib's ``plot``, by label. Defaults to ``palette``.

    Raises:
        MissingExtraError: If matplotlib is not installed.

    Often confused with: a plot of the rates. The rate of an update is what it counted when it was made.

    Examples:
        >>> from polyak import EMA, SWA, Profile
        >>> ax = shares({"EMA": Profile.of(EMA(decay=0.99), 1000), "SWA": Profile.of(SWA(), 250)})
        >>> [line.get_label() for line in ax.lines]
        ['EMA', 'SWA']
    """
    ax = new_axes(ax)
    runs = {label: profile.runs.ending_at_zero() for label, profile in profiles.items() if len(profile)}
    # The zero after the oldest step lets a line fall where its window ends.
    edges = _ages(1 - min((int(one.edges[0]) for one in runs.values()), default=0))
    by_age = {label: one.between(-edges[::-1])[::-1] for label, one in runs.items()}
    ages = edges[:-1].astype(np.float64) + (scale == "log")
    lines = {label: (ages, y) for label, y in by_age.items()}
    _draw(ax, lines, looks, lambda a, b: float(np.abs(a - b) @ np.diff(edges)) <= 2 * 0.01)
    ax.set(xlabel="age in optimiser steps (1: the last)", ylabel="share of the average", xscale=scale, yscale="log")
    ax.yaxis.set_major_formatter(lambda share, _: f"{100 * share:g} %")
    if tops := [float(y.max()) for y in by_age.values() if y.any()]:
        ax.set_ylim(min(tops) / 100, max(tops) * 2)
    if scale == "linear":
        ax.invert_xaxis()
        ax.set_xlabel("optimiser steps before the last")
    if ax.lines:
        ax.legend(frameon=False)
    return ax


def curves(
    lines: Mapping[str, tuple[ArrayLike, ArrayLike]], ax: Axes | None = None, *, looks: Looks | None = None
) -> Axes:
    """Draw a measure of each set of weights over the run, such as the test loss, on a logarithmic scale.

    Every line is named at its right end; equal lines are one, under a joint label.

    Args:
        lines: Optimiser steps and positive values, by the label of their line.
        ax: Where to draw. Defaults to a new figure.
        looks: Keywords of matplotlib's ``plot``, by label. Defaults to ``palette``.

    Raises:
        MissingExtraError: If matplotlib is not installed.

    Examples:
        >>> ax = curves({"raw": ([1, 2, 3], [0.9, 0.5, 0.4]), "ema": ([1, 2, 3], [0.9, 0.4, 0.2])})
        >>> [text.get_text() for text in ax.texts]
        ['raw', 'ema']
    """
    ax = new_axes(ax)
    from matplotlib.ticker import LogLocator, NullLocator

    arrays = {label: (np.asarray(x, np.float64), np.asarray(y, np.float64)) for label, (x, y) in lines.items()}
    _draw(ax, arrays, looks, lambda a, b: bool(np.allclose(a, b, rtol=1e-4)))
    ax.set(xlabel="optimiser step", yscale="log")
    ax.yaxis.set(major_locator=LogLocator(subs=(1, 2, 5)), major_formatter="{x:g}", minor_locator=NullLocator())
    _name_ends(ax)
    return ax


def metrics(
    points: Iterable[tuple[float, float, float]],
    *,
    best: tuple[float, float, str],
    levels: Mapping[str, float] | None = None,
    ax: Axes | None = None,
    label: str = "metric",
) -> Axes:
    """Draw what averages of one run are worth against their half-lives.

    Args:
        points: The half-life as a fraction of the run, the metric, and the error of the profile; hollow where that is
            more than a tenth, and the average so another than was wanted.
        best: The half-life, the metric and the label of the best one.
        levels: Metrics of other weights, as horizontal lines, by their labels, such as the raw weights'.
        ax: Where to draw. Defaults to a new figure.
        label: What the metric is.

    Raises:
        MissingExtraError: If matplotlib is not installed.

    Examples:
        >>> ax = metrics([(0.01, 2.0, 0.0), (0.1, 1.5, 0.01)], best=(0.1, 1.5, "ema"), label="loss")
        >>> ax.get_xlabel()
        'half-life of the average, as part of the run'
    """
    ax = new_axes(ax)
    from matplotlib.ticker import LogLocator, NullLocator

    ordered = sorted(points)
    ax.plot([x for x, _, _ in ordered], [y for _, y, _ in ordered], color=COLORS[0], linewidth=1, label="averages")
    for exact in (True, False):
        here = [(x, y) for x, y, error in ordered if (error <= POOR) == exact]
        name = None if exact or not here else f"profile error above {POOR:.0%}"
        face = COLORS[0] if exact else "white"
        ax.scatter(
            [x for x, _ in here], [y for _, y in here], edgecolor=COLORS[0], facecolor=face, zorder=3, label=name
        )
    x, y, text = best
    ax.scatter([x], [y], s=160, facecolor="none", edgecolor=COLORS[1], linewidth=2, zorder=4, label=f"best: {text}")
    ax.set(xscale="log", xlabel="half-life of the average, as part of the run", ylabel=label)
    ax.xaxis.set(
        major_locator=LogLocator(subs=(1, 2, 5)), minor_locator=NullLocator(),
        major_formatter=lambda part, _: f"{100 * part:g} %",
    )  # fmt: skip
    for name, value in (levels or {}).items():
        ax.axhline(value, color="0.5", linestyle="--", linewidth=1, label=name)
    ax.legend(frameon=False)
    return ax


def _ages(longest: int) -> NDArray[np.int64]:
    """Return the ages 0 … ``longest`` at which a line has a point; every single one where they are few."""
    if longest <= _POINTS:
        return np.arange(longest + 1)
    return np.unique(np.concatenate(([0], np.geomspace(1, longest, _POINTS).round().astype(np.int64))))


def new_axes(ax: Axes | None) -> Axes:
    """Return the axes, or those of a new figure.

    Raises:
        MissingExtraError: If matplotlib is not installed.
    """
    with needed_for("polyak.plot", "matplotlib"):
        from matplotlib import pyplot as plt
    return plt.subplots(layout="constrained")[1] if ax is None else ax


def _draw(
    ax: Axes,
    lines: Mapping[str, tuple[Floats, Floats]],
    looks: Looks | None,
    alike: Callable[[Floats, Floats], bool],
) -> None:
    groups: list[list[str]] = []
    for label, (_, y) in lines.items():
        for group in groups:
            first = lines[group[0]][1]
            if first.shape == y.shape and alike(first, y):
                group.append(label)
                break
        else:
            groups.append([label])
    chosen = palette(lines) if looks is None else looks
    for group in groups:
        ax.plot(*lines[group[0]], label=fill(", ".join(group), _LABEL), **chosen.get(group[0], {}))


def _name_ends(ax: Axes) -> None:
    """Write each line's label next to its last point, shifted where labels would overlap."""
    ax.get_ylim()  # settles the scale
    to_axes = ax.transData + ax.transAxes.inverted()
    ends = [(line, np.asarray(line.get_xydata())[-1]) for line in ax.lines]
    ends = sorted((end for end in ends if np.isfinite(end[1][1])), key=lambda end: -float(end[1][1]))
    line_height = 1.25 * _SIZE / 72 * ax.figure.dpi / ax.bbox.height  # as a part of the axes
    heights = [line_height * (1 + str(line.get_label()).count("\n")) for line, _ in ends]
    places = _apart([float(to_axes.transform(end)[1]) for _, end in ends], heights)
    for (line, (x, y)), place in zip(ends, places, strict=True):
        color = line.get_color()
        thread = {"arrowstyle": "-", "relpos": (0, 0.5), "color": color, "linewidth": 0.5, "shrinkA": 0, "shrinkB": 0}
        text = ax.annotate(str(line.get_label()), (x, y), (1.06, place), textcoords=ax.transAxes, arrowprops=thread)
        text.set(color=color, size=_SIZE, va="center")


def _apart(places: list[float], heights: list[float]) -> list[float]:
    """Return falling places moved as little as needed, so that what is centred on them does not overlap."""
    moved = list(places)
    for _ in range(200):
        for i, j in pairwise(range(len(moved))):
            missing = (heights[i] + heights[j]) / 2 - (moved[i] - moved[j])
            if missing > 0:
                moved[i] += missing / 2
                moved[j] -= missing / 2
    return moved
