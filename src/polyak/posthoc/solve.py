"""The least squares of synthesis: which combination of known profiles is nearest to a wanted one."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from polyak.errors import MissingExtraError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

    from polyak.profile import Profile

    Floats = NDArray[np.float64]

__all__ = ["Fit", "fit", "mixed"]

_ROWS = 1 << 13  # optimiser steps that are taken into the factorisation at a time
_NOTHING = 1e-18  # of the whole: the steps before are left out
_SAME = 1e-12
_SUM = 1e3  # how much more than a step's share the sum of the coefficients weighs, where they are not negative


class Fit(NamedTuple):
    """The coefficients of known profiles, and how near their sum is.

    Attributes:
        coefficients: One for each profile; their sum is 1.
        error: ``||sum(x * profile) - wanted|| / ||wanted||``, over single optimiser steps and the start.
    """

    coefficients: Floats
    error: float


class _Column(NamedTuple):
    """A profile by single steps, from step ``first`` on; the earlier ones, and the start, as their sum says."""

    first: int
    shares: Floats
    start: float


def fit(known: Sequence[Profile], wanted: Sequence[Profile], *, nonnegative: bool = False) -> list[Fit]:
    """Return, for each wanted profile, the combination of known ones with the sum 1 that is nearest.

    ``min ||sum(x_j * p_j) - q||`` with ``sum(x) = 1``, over the exact shares of single optimiser steps and of the
    start; the share of an update that stands for several steps is spread over them.

    Args:
        known: The profiles that can be combined.
        wanted: The profiles to come near to.
        nonnegative: Whether no coefficient may be negative (needs scipy).

    Raises:
        MissingExtraError: scipy is not installed, and ``nonnegative``.

    Source: Karras et al. (2023), arXiv:2312.02696, appendix C, for power functions and without the sum.
    """
    factor = _factor([_column(profile) for profile in (*known, *wanted)])
    basis = factor[:, : len(known)]
    solve = _nonnegative if nonnegative else _least_squares
    return [_fitted(basis, factor[:, len(known) + i], solve) for i in range(len(wanted))]


def mixed(known: Sequence[Profile], coefficients: Floats, last: int) -> tuple[Floats, float]:
    """Return what each optimiser step 1..last counts in a combination, and the start."""
    shares = np.zeros(last)
    for profile, x in zip(known, coefficients, strict=True):
        column = _column(profile)
        shares[column.first - 1 : column.first - 1 + len(column.shares)] += x * column.shares
    return shares, float(sum(x * profile.start for profile, x in zip(known, coefficients, strict=True)))


def _fitted(basis: Floats, target: Floats, solve: Any) -> Fit:  # noqa: ANN401 - one of the two functions below
    size = np.linalg.norm(target)
    apart = np.linalg.norm(basis - target[:, None], axis=0) / size
    if apart.min() <= _SAME:  # it lies there: any other combination would only add rounding
        return Fit((np.arange(len(apart)) == apart.argmin()).astype(np.float64), float(apart.min()))
    x: Floats = solve(basis, target)
    return Fit(x, float(np.linalg.norm(basis @ x - target) / size))


def _least_squares(basis: Floats, target: Floats) -> Floats:
    n = basis.shape[1]
    centre = np.full(n, 1.0 / n)
    # Every direction in which the sum of the coefficients does not change.
    level = np.linalg.qr(np.column_stack([np.ones(n), np.eye(n)[:, : n - 1]]))[0][:, 1:]
    moved = np.linalg.lstsq(basis @ level, target - basis @ centre, rcond=None)[0]
    x: Floats = centre + level @ moved
    return x


def _nonnegative(basis: Floats, target: Floats) -> Floats:
    try:
        from scipy.optimize import nnls  # type: ignore[import-untyped]  # it has no types
    except ImportError as error:
        message = 'coefficients that are not negative need scipy: pip install "polyak[posthoc]"'
        raise MissingExtraError(message) from error
    weight = _SUM * np.linalg.norm(target)
    x: Floats = nnls(np.vstack([basis, np.full(basis.shape[1], weight)]), np.append(target, weight))[0]
    x /= x.sum()
    return x


def _factor(columns: Sequence[_Column]) -> Floats:
    """Return the R of the QR factorisation of all columns, block by block: the matrix itself may be too large."""
    factor = np.array([[column.start for column in columns]])
    last = max(column.first + len(column.shares) for column in columns)
    for begin in range(min(column.first for column in columns), last, _ROWS):
        rows = np.zeros((min(_ROWS, last - begin), len(columns)))
        for number, (first, shares, _) in enumerate(columns):
            a, b = max(first, begin), min(first + len(shares), begin + len(rows))
            if a < b:
                rows[a - begin : b - begin, number] = shares[a - first : b - first]
        if rows.any():
            reduced: Any = np.linalg.qr(np.vstack([factor, rows]), mode="r")  # typed as if it were Q and R
            factor = reduced
    return factor


def _column(profile: Profile) -> _Column:
    if not len(profile):
        return _Column(1, np.empty(0), profile.start)
    shares = profile.by_age[::-1]
    last = int(profile.steps[-1])
    shares = shares[-last:]  # steps before the first do not exist
    older = np.cumsum(np.abs(shares)) <= _NOTHING
    skipped = int(older.sum())
    return _Column(last - len(shares) + 1 + skipped, shares[skipped:], profile.start)
