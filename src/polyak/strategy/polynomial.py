"""Polynomial-decay averaging: shares that grow like a power of the step."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal, Self

import numpy as np
from pydantic import Field
from typing_extensions import override

from polyak.strategy.base import Strategy

if TYPE_CHECKING:
    from collections.abc import Mapping

    from polyak.strategy.clock import Clock

__all__ = ["PolynomialAveraging"]

_SHIFT = 16  # from here on Stirling's series is exact with the terms below
_YOUNGEST = 1e-9  # steps of mean age, at which only the last weights count


class PolynomialAveraging(Strategy):
    """Polynomial-decay averaging: ``rate = (eta + 1) / (t + eta)`` at step t, for shares like ``i ** eta``.

    Here ``t`` counts the optimiser steps averaged so far. An update that represents several steps keeps the product
    of what they keep, a ratio of Gamma functions. The mean age is always the same part of the run, 1 / (eta + 2).

    Source: Shamir & Zhang, "Stochastic Gradient Descent for Non-smooth Optimization" (ICML 2013),
    arXiv:1212.1824.

    Often confused with: ``power``, which has these shares in the limit and a width in place of ``eta``; and with
    ``swa``, which is ``eta=0``.

    Examples:
        >>> from polyak import Profile
        >>> (Profile.of(PolynomialAveraging(eta=1), 4).shares * 10).round(12).tolist()
        [1.0, 2.0, 3.0, 4.0]
    """

    source: ClassVar[str] = "Shamir & Zhang 2013, arXiv:1212.1824"
    elementwise: ClassVar[bool] = True

    name: Literal["polynomial"] = "polynomial"
    eta: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 3.0
    """The exponent of the shares; 0 is the plain mean, and the larger, the younger the average."""

    @override
    def rate(self, clock: Clock) -> float:
        if clock.stride == 1:
            return (self.eta + 1.0) / (clock.elapsed + self.eta)
        if not self.eta:
            return clock.stride / clock.elapsed
        return 1.0 - _kept(clock.elapsed - clock.stride, clock.elapsed, self.eta + 1.0)

    @override
    def engine(self) -> Mapping[str, Any]:
        return {"origin": "first"}

    @classmethod
    @override
    def with_mean_age(cls, age: float, steps: int) -> Self:
        return cls(eta=max(0.0, (steps - 1) / max(age, _YOUNGEST) - 2.0))


def _kept(before: float, now: float, a: float) -> float:
    """Return the product over the steps after ``before`` up to ``now`` of ``(t - 1) / (t - 1 + a)``.

    It is ``ratio(before) / ratio(now)`` with ``ratio(x) = Gamma(x + a) / Gamma(x)``. The difference of two values of
    lgamma would have lost eight digits after a million steps.
    """
    steps = range(_SHIFT)
    early = math.prod((before + j) / (before + j + a) * ((now + j + a) / (now + j)) for j in steps)
    x, y = before + _SHIFT, now + _SHIFT
    powers = (x - 0.5) * np.log1p(a / x) - (y - 0.5) * np.log1p(a / y) - a * np.log1p((y - x) / (x + a))
    stirling = _stirling(x + a) - _stirling(x) - _stirling(y + a) + _stirling(y)
    kept: float = early * np.exp(powers + stirling)
    return kept


def _stirling(x: float) -> float:
    """Return the error of Stirling's formula for the logarithm of the Gamma function."""
    z = 1.0 / (x * x)
    return (1 / 12 - z * (1 / 360 - z * (1 / 1260 - z * (1 / 1680 - z * (1 / 1188 - z * 691 / 360360))))) / x
