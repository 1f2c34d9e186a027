"""The EMA of timm in its three generations, number for number.

Where timm is wrong these are right: a tied tensor moves once per update (timm: once per name),
and integer buffers are copied (timm V1 and V2: averaged and cut off).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal, Self

from pydantic import Field
from typing_extensions import override

from polyak.strategy.base import Strategy
from polyak.strategy.elementwise import at_least, at_most, where
from polyak.strategy.ema import Decay, decay_of
from polyak.strategy.numbers import Steps

if TYPE_CHECKING:
    from collections.abc import Mapping

    from polyak.strategy.clock import Clock

__all__ = ["EMAV1", "EMAV2", "EMAV3"]


class EMAV1(Strategy):
    """timm's ``ModelEma``: the constant rate ``1 - decay`` at each update, tensors matched by name.

    Source: timm 1.0.31, ``timm.utils.ModelEma``. Equal to it up to its rounding: in float32 its ``decay * average +
    (1 - decay) * weights`` lets even constant weights drift, by 1e-6 of the largest value in 300 steps at decay 0.9
    and 1e-5 at 0.9999; ours keeps them.

    Often confused with: ``ema``, whose decay is per optimiser step whatever ``every`` is.

    Examples:
        >>> from polyak import Clock
        >>> round(EMAV1(decay=0.9).rate(Clock(n=1, step=10, stride=10)), 6)
        0.1
    """

    source: ClassVar[str] = "timm 1.0.31, ModelEma"
    elementwise: ClassVar[bool] = True

    name: Literal["ema_v1"] = "ema_v1"
    decay: Decay = 0.9999
    """What one update keeps of the average, in [0, 1)."""

    @override
    def rate(self, clock: Clock) -> float:
        return 1.0 - self.decay

    @classmethod
    @override
    def with_mean_age(cls, age: float, steps: int) -> Self:
        return cls(decay=decay_of(age))


class EMAV2(Strategy):
    """timm's ``ModelEmaV2``: the constant rate ``1 - decay`` at each update, tensors matched by order.

    Source: timm 1.0.31, ``timm.utils.ModelEmaV2``. Equal to it up to its rounding, as ``ema_v1`` is.

    Often confused with: ``ema_v1``, which differs in the matching only.

    Examples:
        >>> EMAV2().engine()["match"]
        'order'
    """

    source: ClassVar[str] = "timm 1.0.31, ModelEmaV2"
    elementwise: ClassVar[bool] = True

    name: Literal["ema_v2"] = "ema_v2"
    decay: Decay = 0.9999
    """What one update keeps of the average, in [0, 1)."""

    @override
    def rate(self, clock: Clock) -> float:
        return 1.0 - self.decay

    @override
    def engine(self) -> Mapping[str, Any]:
        return {"match": "order"}

    @classmethod
    @override
    def with_mean_age(cls, age: float, steps: int) -> Self:
        return cls(decay=decay_of(age))


class EMAV3(Strategy):
    """timm's ``ModelEmaV3``: ``rate = 1 - clip(1 - (1 + t / warmup_gamma) ** -warmup_power, min_decay, decay)``.

    Here ``t = step - update_after_step - 1``; the rate is 1 while ``t <= 0``, and without ``use_warmup`` it
    is ``1 - decay``. Matched by order, with the foreach kernel.

    timm applies all of this only where the caller passes ``step=``, and silently none of it otherwise. Here calls
    are counted where no ``step=`` is given, so that ``use_warmup`` and ``update_after_step`` work; with
    neither, an update without ``step=`` has the constant rate from the first on, as in timm.

    Source: timm 1.0.31, ``timm.utils.ModelEmaV3``, bit for bit with its foreach path. The warm-up is
    Katherine Crowson's (k-diffusion, ``EMAWarmup``).

    Often confused with: TensorFlow's warm-up ``(1 + t) / (10 + t)`` (torch-ema, diffusers).

    Examples:
        >>> from polyak import Clock
        >>> strategy = EMAV3(decay=0.9999, use_warmup=True)
        >>> [round(strategy.rate(Clock(n=n, step=n)), 3) for n in (1, 2, 9, 1000)]
        [1.0, 0.63, 0.231, 0.01]
    """

    source: ClassVar[str] = "timm 1.0.31, ModelEmaV3"
    elementwise: ClassVar[bool] = True

    name: Literal["ema_v3"] = "ema_v3"
    decay: Decay = 0.9999
    """What one update keeps of the average at the most, in [0, 1)."""
    min_decay: Decay = 0.0
    """What one update keeps at the least, during warm-up."""
    update_after_step: Steps = 0
    """Optimiser steps during which the average follows the weights."""
    use_warmup: bool = False
    """Whether the decay rises from 0 towards ``decay``."""
    warmup_gamma: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 1.0
    """The warm-up's time scale in steps."""
    warmup_power: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 2 / 3
    """The warm-up's exponent; 1 with gamma 1 is a plain mean, 2/3 suits a million steps, 3/4 fewer."""
    foreach: bool = True
    """Whether one call updates all tensors (the same as ``kernel="auto"``) or one each (``"loop"``)."""
    exclude_buffers: bool = False
    """Whether buffers are copied (the same as ``buffers="copy"``)."""

    @override
    def rate(self, clock: Clock) -> float:
        if clock.counted and not self.use_warmup and not self.update_after_step:
            return 1.0 - self.decay
        t = clock.step - self.update_after_step - 1
        decay: float = self.decay
        if self.use_warmup:
            warm = 1.0 - (1.0 + at_least(t, 0) / self.warmup_gamma) ** -self.warmup_power
            decay = at_least(at_most(warm, self.decay), self.min_decay)
        rate: float = where(t <= 0, 1.0, 1.0 - decay)
        return rate

    @override
    def engine(self) -> Mapping[str, Any]:
        return {
            "match": "order",
            "kernel": "auto" if self.foreach else "loop",
            "buffers": "copy" if self.exclude_buffers else "auto",
        }

    @classmethod
    @override
    def with_mean_age(cls, age: float, steps: int) -> Self:
        return cls(decay=decay_of(age))
