"""The double exponential moving average, which does not lag."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar, Literal, Self

import numpy as np
from typing_extensions import override

from polyak.strategy.base import Move, Strategy
from polyak.strategy.ema import Decay, decay_of
from polyak.strategy.shares import Shares, recursion_shares

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from numpy.typing import NDArray

    from polyak.strategy.clock import Clock

__all__ = ["DoubleEMA"]


class DoubleEMA(Strategy):
    """The double EMA: ``average = 2 * EMA(weights) - EMA(EMA(weights))``, both of ``rate = 1 - decay ** stride``.

    Its mean age is 0: on weights that move along a line it is where they are, while an EMA is ``decay / (1 - decay)``
    steps behind. In return weights older than about ``2 / (1 - decay)`` steps have negative shares (an extrapolation)
    and noise is reduced less. It keeps two more tensors per average. Buffers are copied by default: an extrapolated
    running variance may be negative.

    Source: Mulloy, "Smoothing Data with Faster Moving Averages" (1994); on weights: Block & Zhang, "EMA Without the
    Lag: Bias-Corrected Iterate Averaging Schemes" (2025), arXiv:2508.00180, as a baseline.

    Often confused with: an EMA of an EMA, which lags twice as much; and ``ema_debiased``, which corrects the start and
    not the lag.

    Examples:
        >>> from polyak import Profile
        >>> profile = Profile.of(DoubleEMA(decay=0.9), 1000)
        >>> abs(round(profile.mean_age, 6)), bool(profile.shares.min() < 0)
        (0.0, True)
    """

    source: ClassVar[str] = "Mulloy 1994; Block & Zhang 2025, arXiv:2508.00180"
    elementwise: ClassVar[bool] = True

    name: Literal["dema"] = "dema"
    decay: Decay = 0.999
    """What one optimiser step keeps of each of the two averages, in [0, 1)."""

    @override
    def rate(self, clock: Clock) -> float:
        return 1.0 - self.decay**clock.stride

    @override
    def engine(self) -> Mapping[str, Any]:
        return {"buffers": "copy"}

    @override
    def slots(self) -> tuple[str, ...]:
        return "first", "second"

    @override
    def moves(self, n: int, rate: float) -> Sequence[Move]:
        return (
            Move("first", "weights", rate),
            Move("second", "first", rate),
            Move("average", "first", 1.0),
            Move("average", "second", -1.0),
        )

    @override
    def shares(self, rates: NDArray[np.float64]) -> Shares:
        once = recursion_shares(rates)
        later = np.cumsum(rates[::-1])[::-1]  # times its share in the first average: that in the second
        # Adding 0.0 makes a start of -0.0, which reads badly, 0.0.
        return Shares(once.updates * (2.0 - later), once.start * (1.0 - float(rates.sum())) + 0.0)

    @classmethod
    @override
    def with_mean_age(cls, age: float, steps: int) -> Self:
        # Its own mean age is 0 for every decay; the mean age of its first average distinguishes them.
        return cls(decay=decay_of(age))
