"""TensorFlow's warm-up of the decay, as torch-ema and diffusers have it."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, ClassVar, Literal, Self

from typing_extensions import override

from polyak.strategy.base import Strategy
from polyak.strategy.elementwise import at_least, at_most, where
from polyak.strategy.ema import Decay, decay_of
from polyak.strategy.numbers import Steps

if TYPE_CHECKING:
    from polyak.strategy.clock import Clock

__all__ = ["TFEMA"]


class TFEMA(Strategy):
    """The EMA with TensorFlow's warm-up: ``rate = 1 - min(decay, (1 + t) / (10 + t))`` at step t.

    Here ``t`` counts the optimiser steps averaged so far, from 1, less those that the average ``follow``s. An update
    that represents several steps keeps the product of their decays. The window grows with the run, to about a ninth
    of it, until the decay is reached.

    Source: ``num_updates`` of TensorFlow's ``ExponentialMovingAverage``; matched with torch-ema 0.3 (its default) and,
    with ``follow=1``, diffusers 0.42.1 (``EMAModel`` without ``use_ema_warmup``).

    Often confused with: the warm-up of timm and k-diffusion, ``1 - (1 + t) ** -power`` (``ema_v3``).

    Examples:
        >>> from polyak import Clock
        >>> [round(1 - TFEMA().rate(Clock(n=n, step=n)), 3) for n in (1, 10, 1000, 100_000)]
        [0.182, 0.55, 0.991, 0.999]
    """

    source: ClassVar[str] = "torch-ema 0.3; diffusers 0.42.1, EMAModel"
    elementwise: ClassVar[bool] = True

    name: Literal["ema_tf"] = "ema_tf"
    decay: Decay = 0.999
    """What one optimiser step keeps of the average at the most, in [0, 1)."""
    follow: Steps = 0
    """Optimiser steps during which the average follows the weights; diffusers' ``update_after_step`` plus 1."""

    @override
    def rate(self, clock: Clock) -> float:
        now = clock.elapsed - self.follow
        before = now - clock.stride
        since = at_least(before, 0)
        # The last step of the warm-up: later ones would keep more than the decay.
        last = at_least(at_most(now, math.floor((10.0 * self.decay - 1.0) / (1.0 - self.decay))), since)
        if clock.stride == 1:
            kept = at_most((since + 2) / (since + 11), self.decay)
        else:  # all but nine factors of the product over (1 + t) / (10 + t) cancel
            kept = math.prod((since + j) / (last + j) for j in range(2, 11)) * self.decay ** at_least(now - last, 0)
        rate: float = where(before < 0, 1.0, 1.0 - kept)
        return rate

    @classmethod
    @override
    def with_mean_age(cls, age: float, steps: int) -> Self:
        return cls(decay=decay_of(age))
