"""The least squares of synthesis: which combination of known profiles is nearest to a wanted one."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from polyak.errors.extras import needed_for
from polyak.strategy.profile import Profile
from polyak.strategy.runs import Runs

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

    Floats = NDArray[np.float64]

__all__ = ["Fit", "fit", "mixed"]

_ROWS = 1 << 13  # runs of steps that are taken into the factorisation at a time
_NEVER = np.iinfo(np.int64).min
_NOTHING = 1e-18  # of the whole: the steps before are dropped
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


def fit(
    known: Sequence[Profile],
    wanted: Sequence[Profile],
    *,
    noise: Sequence[float] | None = None,
    nonnegative: bool = False,
    starts: Sequence[str] | None = None,
) -> list[Fit]:
    """Return, for each wanted profile, the combination of known ones with the sum 1 that is nearest.

    ``min ||sum(x_j * p_j) - q||`` with ``sum(x) = 1``, over the exact shares of single optimiser steps and of each
    start; the share of an update that represents several steps is divided among them. Large coefficients cost what they
    make of the snapshots' rounding: a nearer profile is not a nearer average then.

    Args:
        known: The profiles that can be combined.
        wanted: The profiles to come near to.
        noise: How much the values behind each known profile are rounded, relative to them. Defaults to not at all.
        nonnegative: Whether no coefficient may be negative (needs scipy).
        starts: Which weights each known and each wanted profile starts from. Defaults to the same weights for all.

    Raises:
        MissingExtraError: If ``nonnegative`` is set and SciPy is not installed.

    Source: Karras et al. (2023), arXiv:2312.02696, appendix C, for power functions and without the sum.
    """
    profiles = [*known, *wanted]
    factor = _factor(profiles, starts or [""] * len(profiles))
    basis = factor[:, : len(known)]
    rounded = np.asarray([0.0] * len(known) if noise is None else noise)
    solve = _nonnegative if nonnegative else _least_squares
    return [_fitted(basis, factor[:, len(known) + i], rounded, solve) for i in range(len(wanted))]


def mixed(known: Sequence[Profile], coefficients: Floats, last: int) -> Profile:
    """Return the shares of the optimiser steps up to ``last`` in a combination, as runs of equal shares."""
    runs = [profile.runs for profile in known]
    edges = np.unique(np.concatenate([*(one.edges for one in runs), [last]]).astype(np.int64))
    each = sum((x * one.between(edges) for one, x in zip(runs, coefficients, strict=True)), np.zeros(len(edges) - 1))
    start = sum(x * profile.start for profile, x in zip(known, coefficients, strict=True))
    lengths = np.diff(edges)
    return Profile(each * lengths, edges[1:], float(start), int(lengths[0]) if len(lengths) else 0)


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
    with needed_for("nonnegative=True", "scipy"):
        from scipy.optimize import nnls  # type: ignore[import-untyped]  # it has no types
    weight = _SUM * np.linalg.norm(target)
    x: Floats = nnls(np.vstack([basis, np.full(basis.shape[1], weight)]), np.append(target, weight))[0]
    x /= x.sum()
    return x


def _factor(profiles: Sequence[Profile], starts: Sequence[str]) -> Floats:
    """Return the R of the QR factorisation of all profiles, block by block: the matrix itself may be too large.

    Steps that count the same in each profile are one row, longer by the root of their number. Each start is a row.
    """
    shares = np.array([profile.start for profile in profiles])
    factor = np.array([shares * [start == one for start in starts] for one in dict.fromkeys(starts)])
    runs = [one.without_oldest(_NOTHING) for one in _runs(profiles)]
    edges = np.unique(np.concatenate([one.edges for one in runs]))
    for begin in range(0, len(edges) - 1, _ROWS):
        here = edges[begin : begin + _ROWS + 1]
        rows = np.column_stack([one.between(here) for one in runs]) * np.sqrt(np.diff(here))[:, None]
        if rows.any():
            reduced: Any = np.linalg.qr(np.vstack([factor, rows]), mode="r")  # typed as if it were Q and R
            factor = reduced
    return factor


def _runs(profiles: Sequence[Profile]) -> list[Runs]:
    """Return the runs of each profile; the first update, too, represents all steps since the last one of any profile.

    An average that starts late in a run whose steps jump has another stride for its first update.
    """
    firsts = np.unique([profile.steps[0] for profile in profiles if len(profile)])
    before = np.full(len(firsts), _NEVER)
    for profile in profiles:
        steps = np.concatenate(([_NEVER], profile.steps))
        before = np.maximum(before, steps[np.searchsorted(profile.steps, firsts)])
    return [
        _begun(profile.runs, int(before[np.searchsorted(firsts, profile.steps[0])])) if len(profile) else profile.runs
        for profile in profiles
    ]


def _begun(runs: Runs, before: int) -> Runs:
    if before == _NEVER or before >= runs.edges[0]:
        return runs
    first = runs.each[:1] * (runs.edges[1] - runs.edges[0]) / (runs.edges[1] - before)
    return Runs(np.concatenate(([before], runs.edges[1:])), np.concatenate((first, runs.each[1:])))
