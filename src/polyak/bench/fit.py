"""The line through the times of models that grow: what an update costs in any case, and what each piece adds."""

from __future__ import annotations

from itertools import groupby
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from polyak.bench.cases.scaling import SERIES
from polyak.bench.number import number

if TYPE_CHECKING:
    from collections.abc import Sequence

    from polyak.bench.report import Row

__all__ = ["Line", "fit", "lines"]


class Line(NamedTuple):
    """What one subject takes for one series of models: ``milliseconds = fixed + each * count``.

    Attributes:
        model: The name of the series.
        subject: Who was measured.
        counted: What is counted: "tensors" or "values".
        counts: How many there were in each model.
        times: Medians in milliseconds.
        fixed: The intercept in milliseconds.
        each: The slope in milliseconds.
    """

    model: str
    subject: str
    counted: str
    counts: list[int]
    times: list[float]
    fixed: float
    each: float

    @property
    def equation(self) -> str:
        """The line as text."""
        return f"{number(1e3 * self.fixed)} µs + {number(1e6 * self.each)} ns per {self.counted.removesuffix('s')}"


def fit(counts: Sequence[float], times: Sequence[float]) -> tuple[float, float]:
    """Return intercept and slope of the line that is nearest in relative terms, so that small models count as well.

    Examples:
        >>> [round(value, 6) for value in fit([1, 10, 100], [3.0, 12.0, 102.0])]
        [2.0, 1.0]
    """
    x, y = np.asarray(counts, np.float64), np.asarray(times, np.float64)
    if len(x) == 1:
        return 0.0, float(y[0] / x[0])
    solution = np.linalg.lstsq(np.stack([1 / y, x / y], axis=1), np.ones_like(y), rcond=None)[0]
    return float(solution[0]), float(solution[1])


def lines(rows: Sequence[Row]) -> list[Line]:
    """Return the lines of the rows of the case ``scaling``, in the order of the rows."""
    measured = [row for row in rows if row.milliseconds is not None]
    order = list(dict.fromkeys((row.model, row.subject) for row in measured))
    ordered = sorted(measured, key=lambda row: order.index((row.model, row.subject)))
    return [_line(*key, list(points)) for key, points in groupby(ordered, lambda row: (row.model, row.subject))]


def _line(model: str, subject: str, points: Sequence[Row]) -> Line:
    counted = SERIES[model].counted
    counts = [getattr(row, counted) for row in points]
    times = [row.milliseconds.median for row in points if row.milliseconds is not None]
    return Line(model, subject, counted, counts, times, *fit(counts, times))
