"""Plots of checkpoints: how far they are apart, what lies between them, and what a soup kept."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from polyak.plot.averages import COLORS, new_axes, palette

if TYPE_CHECKING:
    from collections.abc import Sequence

    from matplotlib.axes import Axes

__all__ = ["between", "depths", "scores"]

_SIZE = 9.0  # points


def depths(tensors: Sequence[tuple[str, float]], ax: Axes | None = None, *, level: float | None = None) -> Axes:
    """Draw a number for each tensor by its depth, one colour for each kind of tensor: the last parts of its name.

    Args:
        tensors: Name and number of each tensor, in order.
        ax: Where to draw. Defaults to a new figure.
        level: The number of all tensors together, as a horizontal line.

    Raises:
        MissingExtraError: If matplotlib is not installed.
    """
    ax = new_axes(ax)
    kinds: dict[str, list[tuple[int, float]]] = {}
    for depth, (name, number) in enumerate(tensors):
        parts = [part for part in name.split(".") if not part.isdigit()]
        kinds.setdefault(".".join(parts[-2:]), []).append((depth, number))
    many = sorted(kinds, key=lambda kind: -len(kinds[kind]))[: len(COLORS) - 1]
    looks = palette(many)
    for kind, points in kinds.items():
        color = looks[kind]["color"] if kind in looks else "0.6"
        x, y = zip(*points, strict=True)
        ax.plot(x, y, "o", markersize=4, color=color, label=kind if kind in looks else None)
    if level is not None and np.isfinite(level):
        ax.axhline(level, color="0.3", linewidth=1, linestyle=(0, (5, 1.5)), label="all together")
    numbers = np.array([number for _, number in tensors])
    if (numbers[np.isfinite(numbers)] > 0).any():
        ax.set_yscale("symlog", linthresh=max(1e-12, float(numbers[(numbers > 0) & np.isfinite(numbers)].min())))
    ax.set_xlabel("depth: tensors in the order of the file")
    ax.set_ylabel("relative distance")
    ax.legend(fontsize=_SIZE - 2, frameon=False, ncols=2)
    return ax


def between(
    positions: Sequence[float], values: Sequence[float], ax: Axes | None = None, *, label: str = "loss"
) -> Axes:
    """Draw values along the straight line between two checkpoints.

    Args:
        positions: Where each value is, from 0 to 1.
        values: The values.
        ax: Where to draw. Defaults to a new figure.
        label: What the values are.

    Raises:
        MissingExtraError: If matplotlib is not installed.
    """
    ax = new_axes(ax)
    ends = [positions[0], positions[-1]], [values[0], values[-1]]
    ax.plot(*ends, color="0.6", linewidth=1, linestyle=(0, (5, 1.5)), label="between the values at both ends")
    ax.plot(positions, values, "o-", markersize=4, color=COLORS[0], label=label)
    ax.set_xlabel("position between the checkpoints: 0 is the first, 1 the second")
    ax.set_ylabel(label)
    ax.legend(fontsize=_SIZE, frameon=False)
    return ax


def scores(
    candidates: Sequence[tuple[str, float]], kept: Sequence[float], ax: Axes | None = None, *, label: str = "score"
) -> Axes:
    """Draw what each file scored alone, best first, and the score of the soup after each of them was tried.

    Args:
        candidates: Name and score of each file, in the order in which they were tried.
        kept: The score of the soup after each.
        ax: Where to draw. Defaults to a new figure.
        label: What the scores are.

    Raises:
        MissingExtraError: If matplotlib is not installed.
    """
    ax = new_axes(ax)
    places = range(len(candidates))
    ax.plot(places, [score for _, score in candidates], "o", markersize=5, color=COLORS[1], label="the file alone")
    ax.plot(places, kept, "s-", markersize=4, color=COLORS[0], label="the soup after it was tried")
    ax.set_xticks(places, [name for name, _ in candidates], rotation=60, ha="right", fontsize=_SIZE - 2)
    ax.set_ylabel(label)
    ax.legend(fontsize=_SIZE, frameon=False)
    return ax
