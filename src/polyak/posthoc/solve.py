"""The least squares of synthesis: which combination of known profiles is nearest to a wanted one."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from polyak.errors import MissingExtraError
from polyak.profile import Profile

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

    Floats = NDArray[np.float64]

__all__ = ["Fit", "fit", "mixed"]

_ROWS = 1 << 13  # optimiser steps that are taken into the factorisation at a time
_NOTHING = 1e-18  # of the whole: the steps before are left out
_SAME = 1e-12
_CARE = 100.0  # weights are some hundred times as large as what they move by while they are averaged
_MILD = 10.0  # of the coefficients' absolute sum: up to here rounding is no concern
_SUM = 1e3  # how much more than a step's share the sum of the coefficients weighs, where they are not negative


class Fit(NamedTuple):
    """The coefficients of known profiles, and how near their sum is.

    Attributes:
        coefficients: One for each profile; their sum is 1.
        error: ``||sum(x * profile) - wanted|| / ||wanted||``, over single optimiser steps and the start.
        amplification: ``sum(|x|)``, at least 1: how much the snapshots' noise may grow.
        rounding: ``sum(|x| * noise)``: what their rounding may cost.
    """

    coefficients: Floats
    error: float
    amplification: float
    rounding: float


class _Column(NamedTuple):
    """A profile by single steps, from step ``first`` on, and the start.

    Runs that count from step 0, or begin at one that is less than ``every``, have steps before the first.
    """

    first: int
    shares: Floats
    start: float


def fit(
    known: Sequence[Profile],
    wanted: Sequence[Profile],
    *,
    noise: Sequence[float] | None = None,
    nonnegative: bool = False,
) -> list[Fit]:
    """Return, for each wanted profile, the combination of known ones with the sum 1 that is nearest.

    ``min ||sum(x_j * p_j) - q||`` with ``sum(x) = 1``, over the exact shares of single optimiser steps and of the
    start; the share of an update that stands for several steps is spread over them. Large coefficients cost what they
    make of the snapshots' rounding: a nearer profile is no nearer average then.

    Args:
        known: The profiles that can be combined.
        wanted: The profiles to come near to.
        noise: How much the values behind each known profile are rounded, relative to them; None: not at all.
        nonnegative: Whether no coefficient may be negative (needs scipy).

    Raises:
        MissingExtraError: scipy is not installed, and ``nonnegative``.

    Source: Karras et al. (2023), arXiv:2312.02696, appendix C, for power functions and without the sum.
    """
    factor = _factor([_column(profile) for profile in (*known, *wanted)])
    basis = factor[:, : len(known)]
    rounded = np.asarray([0.0] * len(known) if noise is None else noise)
    solve = _nonnegative if nonnegative else _least_squares
    return [_fitted(basis, factor[:, len(known) + i], rounded, solve) for i in range(len(wanted))]


def mixed(known: Sequence[Profile], coefficients: Floats, last: int) -> Profile:
    """Return what each optimiser step up to ``last`` counts in a combination."""
    columns = [_column(profile) for profile in known]
    first = min(1, *(column.first for column in columns))
    shares = np.zeros(last + 1 - first)
    for column, x in zip(columns, coefficients, strict=True):
        begin = column.first - first
        shares[begin : begin + len(column.shares)] += x * column.shares
    start = sum(x * column.start for column, x in zip(columns, coefficients, strict=True))
    return Profile(shares, np.arange(first, last + 1), float(start), 1)


def _fitted(basis: Floats, target: Floats, noise: Floats, solve: Any) -> Fit:  # noqa: ANN401 - a function below
    size = float(np.linalg.norm(target))
    apart = np.linalg.norm(basis - target[:, None], axis=0) / size
    if apart.min() <= _SAME:  # it lies there: any other combination would only add rounding
        x: Floats = (np.arange(len(apart)) == apart.argmin()).astype(np.float64)
    else:
        x = solve(basis, target)
        if np.abs(x).sum() > _MILD and noise.any():
            cost = np.diag(_CARE * size * noise)
            x = solve(np.vstack([basis, cost]), np.append(target, np.zeros(len(noise))))
    error = float(np.linalg.norm(basis @ x - target)) / size
    return Fit(x, error, float(np.abs(x).sum()), float(np.abs(x) @ noise))


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
    older = np.cumsum(np.abs(shares)) <= _NOTHING
    skipped = int(older.sum())
    return _Column(last - len(shares) + 1 + skipped, shares[skipped:], profile.start)
