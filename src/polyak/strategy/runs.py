"""Runs of optimiser steps with equal shares: what a profile is over single steps, however many there are."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray

__all__ = ["Runs"]


class Runs(NamedTuple):
    """Shares of single optimiser steps: each step after ``edges[i]`` up to ``edges[i + 1]`` has the share ``each[i]``.

    Attributes:
        edges: The last step before the first run, and the last step of each run; int64, shape (k + 1,), increasing.
        each: The share of each step of a run, float64, shape (k,).

    Examples:
        >>> runs = Runs(np.array([0, 2, 10**12]), np.array([0.25, 0.5e-12]))
        >>> runs.between(np.array([0, 1, 2, 10**12])).tolist()
        [0.25, 0.25, 5e-13]
    """

    edges: NDArray[np.int64]
    each: NDArray[np.float64]

    def between(self, edges: NDArray[np.int64]) -> NDArray[np.float64]:
        """Return the share of each step between consecutive edges, which include the runs' edges; 0 outside."""
        if not len(self.each):
            return np.zeros(max(0, len(edges) - 1))
        run = np.searchsorted(self.edges, edges[:-1], side="right") - 1
        inside = (run >= 0) & (run < len(self.each))
        return np.where(inside, self.each[run.clip(0, len(self.each) - 1)], 0.0)

    def ending_at_zero(self) -> Runs:
        """Return the same shares by age: the last step is step 0."""
        return self._replace(edges=self.edges - self.edges[-1:])

    def without_oldest(self, nothing: float) -> Runs:
        """Return the runs without the oldest ones, whose shares sum to no more than ``nothing``."""
        skipped = int((np.cumsum(np.abs(self.each) * np.diff(self.edges)) <= nothing).sum())
        return Runs(self.edges[min(skipped, len(self.each)) :], self.each[skipped:])
