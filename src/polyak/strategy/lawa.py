"""The mean of the last snapshots."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar, Literal, Self

import numpy as np
from typing_extensions import override

from polyak.errors import ConfigError
from polyak.strategy.base import Move, Strategy
from polyak.strategy.elementwise import at_most
from polyak.strategy.numbers import Count
from polyak.strategy.shares import Shares

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from numpy.typing import NDArray

    from polyak.strategy.clock import Clock

__all__ = ["LAWA"]

_MOST = 100_000  # copies, for which the names alone take a tenth of a second


class LAWA(Strategy):
    """The mean of the latest weights: ``average = mean of the last min(n, window) snapshots``, one per update.

    ``every=`` is the distance of the snapshots in optimiser steps. It keeps them all: ``window`` copies of the model
    for each average. The mean is computed from them at each update, so that no rounding accumulates.

    Source: Kaddour, "Stop Wasting My Time! Saving Days of ImageNet and BERT Training with Latest Weight Averaging"
    (2022), arXiv:2209.14981.

    Often confused with: ``swa``, which forgets nothing; ``tail``, which needs one copy and the length of the run; and
    an EMA of the same mean age, ``decay = (window - 1) / (window + 1)``.

    Examples:
        >>> from polyak import Profile
        >>> Profile.of(LAWA(window=2), 4).shares.tolist()
        [0.0, 0.0, 0.5, 0.5]
    """

    source: ClassVar[str] = "Kaddour 2022, arXiv:2209.14981"
    elementwise: ClassVar[bool] = True

    name: Literal["lawa"] = "lawa"
    window: Count = 10
    """How many snapshots are kept and averaged."""

    @override
    def rate(self, clock: Clock) -> float:
        rate: float = 1.0 / at_most(clock.n, self.window)
        return rate

    @override
    def slots(self) -> tuple[str, ...]:
        if self.window > _MOST:
            message = f"window={self.window:,} keeps as many copies of the model; expected at most {_MOST:,}"
            raise ConfigError(message)
        return tuple(f"snapshot_{i}" for i in range(self.window))

    @override
    def moves(self, n: int, rate: float) -> Sequence[Move]:
        taken = Move(f"snapshot_{(n - 1) % self.window}", "weights", 1.0)
        held = min(n, self.window)
        return (taken, *(Move("average", f"snapshot_{i}", 1.0 / (i + 1)) for i in range(held)))

    @override
    def shares(self, rates: NDArray[np.float64]) -> Shares:
        shares = np.zeros(len(rates))
        shares[-self.window :] = 1.0 / max(1, min(len(rates), self.window))
        return Shares(shares, 0.0 if len(rates) else 1.0)

    @override
    def engine(self) -> Mapping[str, Any]:
        return {"origin": "first"}

    @classmethod
    @override
    def with_mean_age(cls, age: float, steps: int) -> Self:
        return cls(window=min(max(1, round(2 * age + 1)), steps))
