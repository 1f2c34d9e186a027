"""The recursion that every average is: ``average += rate * (weights - average)``, as plain arithmetic."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray

__all__ = ["Shares", "recursion_shares"]


class Shares(NamedTuple):
    """What each update counts in an average, and what is left of the weights that it started from.

    Attributes:
        updates: The share of each update 1..n, float64, shape (n,).
        start: The share of the start.

    Examples:
        >>> from polyak import LAWA
        >>> LAWA(window=2).shares(np.array([1.0, 0.5, 0.5]))
        Shares(updates=array([0. , 0.5, 0.5]), start=0.0)
    """

    updates: NDArray[np.float64]
    start: float


def recursion_shares(rates: NDArray[np.float64]) -> Shares:
    """Return ``share_i = rate_i * prod_{j>i} (1 - rate_j)``.

    Args:
        rates: The rate of each update 1..n, float64, shape (n,).

    Examples:
        >>> recursion_shares(np.array([1.0, 0.5, 0.5]))
        Shares(updates=array([0.25, 0.25, 0.5 ]), start=0.0)
    """
    # kept[i]: what is left, after all n updates, of an average as it was after update i.
    kept = np.ones(len(rates) + 1)
    kept[:-1] = np.cumprod((1.0 - rates)[::-1])[::-1]
    return Shares(rates * kept[1:], float(kept[0]))
