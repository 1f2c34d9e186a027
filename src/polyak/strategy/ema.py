"""The exponential moving average, and the one corrected for its start."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Annotated, ClassVar, Literal, Self

from pydantic import Field
from typing_extensions import override

from polyak.strategy.base import Strategy

if TYPE_CHECKING:
    from polyak.strategy.clock import Clock

__all__ = ["EMA", "DebiasedEMA", "Decay", "decay_of"]

Decay = Annotated[float, Field(ge=0, lt=1)]
"""What one optimiser step keeps of the average, in [0, 1)."""


def decay_of(age: float) -> float:
    """Return the decay of an EMA with this mean age in steps.

    Examples:
        >>> decay_of(99)
        0.99
    """
    return min(age / (1.0 + age), math.nextafter(1.0, 0.0))


class EMA(Strategy):
    """The exponential moving average: ``rate = 1 - decay ** stride``.

    The weights at construction count (``origin="initial"``), as in timm; with ``origin="first"`` the
    first update replaces them, as in ``torch.optim.swa_utils``.

    Source: Polyak & Juditsky, "Acceleration of Stochastic Approximation by Averaging" (1992), for
    averaging; matched with ``torch.optim.swa_utils.get_ema_multi_avg_fn`` of torch 2.15.

    Often confused with: a momentum of ``1 - decay`` (pytorch-ignite). Here ``decay`` is what is *kept*.

    Examples:
        >>> from polyak import Clock
        >>> round(EMA(decay=0.9).rate(Clock(n=1, step=10, stride=10)), 6)  # every=10 keeps the half-life
        0.651322
    """

    source: ClassVar[str] = "Polyak & Juditsky 1992; torch.optim.swa_utils"
    elementwise: ClassVar[bool] = True

    name: Literal["ema"] = "ema"
    decay: Decay = 0.999
    """What one optimiser step keeps of the average, in [0, 1)."""

    @override
    def rate(self, clock: Clock) -> float:
        return 1.0 - self.decay**clock.stride

    @classmethod
    @override
    def with_mean_age(cls, age: float, steps: int) -> Self:
        return cls(decay=decay_of(age))


class DebiasedEMA(Strategy):
    """The bias-corrected EMA: ``rate = (1 - decay ** stride) / (1 - decay ** elapsed)``.

    The same number as ``v_t / (1 - decay ** t)`` with ``v_0 = 0``, written so that the average is valid
    at every moment: the first update replaces the start, and early weights are not over-counted.

    Source: Kingma & Ba, "Adam" (2014), arXiv:1412.6980, section 3; ``optax.ema(debias=True)``.

    Often confused with: a warm-up of the decay (``ema_v3``), which forgets early weights faster for longer;
    and with a remedy for the lag of an average, which debiasing is not.

    Examples:
        >>> from polyak import Clock
        >>> DebiasedEMA(decay=0.9).rate(Clock(n=1, step=1))
        1.0
    """

    source: ClassVar[str] = "Kingma & Ba 2014, arXiv:1412.6980, section 3"
    elementwise: ClassVar[bool] = True

    name: Literal["ema_debiased"] = "ema_debiased"
    decay: Decay = 0.999
    """What one optimiser step keeps of the average, in [0, 1)."""

    @override
    def rate(self, clock: Clock) -> float:
        return (1.0 - self.decay**clock.stride) / (1.0 - self.decay**clock.elapsed)

    @classmethod
    @override
    def with_mean_age(cls, age: float, steps: int) -> Self:
        return cls(decay=decay_of(age))
