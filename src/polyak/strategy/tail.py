"""The mean of the last part of a run, of known length or not."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal, Self

from pydantic import Field
from typing_extensions import override

from polyak.strategy.base import Strategy
from polyak.strategy.elementwise import at_least, at_most
from polyak.strategy.numbers import Count

if TYPE_CHECKING:
    from collections.abc import Mapping

    from polyak.strategy.clock import Clock

__all__ = ["TailAveraging"]


class TailAveraging(Strategy):
    """The plain mean of the last part of a run: ``rate = min(1, stride / (steps of the tail so far))``.

    With ``total_steps`` the tail is the last ``ceil(fraction * total_steps)`` optimiser steps. Before it begins the
    average follows the weights (rate 1), so that it can always be used, and past ``total_steps`` it continues as the
    mean since the tail began. Without ``total_steps`` it is an approximation that is good at every moment: the
    power function with the tail's mean age, ``rate = 1 - (1 - stride / elapsed) ** (2 / fraction - 1)``. Of its
    shares 21 % are elsewhere than the tail's at a fraction of 0.5, 26 % at 0.25 and 28 % at 0.1.

    Source: Rakhlin, Shamir & Sridharan, "Making Gradient Descent Optimal for Strongly Convex Stochastic
    Optimization" (2012), arXiv:1109.5647 (suffix averaging).

    Often confused with: ``swa`` with ``start=``, the same mean by the step of its beginning; and ``lawa``, the mean of
    the last snapshots at every moment, which has to keep them.

    Examples:
        >>> from polyak import Profile
        >>> Profile.of(TailAveraging(fraction=0.4, total_steps=5), 5).shares.tolist()
        [0.0, 0.0, 0.0, 0.5, 0.5]
    """

    source: ClassVar[str] = "Rakhlin, Shamir & Sridharan 2012, arXiv:1109.5647"
    elementwise: ClassVar[bool] = True

    name: Literal["tail"] = "tail"
    fraction: Annotated[float, Field(gt=0, le=1)] = 0.5
    """The part of the run that is averaged, in (0, 1]."""
    total_steps: Count | None = None
    """Optimiser steps of the whole run; without it, an approximation at every moment."""

    @override
    def rate(self, clock: Clock) -> float:
        if self.total_steps is None:
            kept: float = (1.0 - clock.stride / clock.elapsed) ** (2.0 / self.fraction - 1.0)
            return 1.0 - kept
        length = math.ceil(round(self.fraction * self.total_steps, 6))  # 0.07 * 100 is a little more than 7
        # Where averaging began within the tail, it is the mean since then.
        tail = at_least(at_most(clock.step - (self.total_steps - length), clock.elapsed), 1)
        rate: float = at_most(clock.stride / tail, 1.0)
        return rate

    @override
    def engine(self) -> Mapping[str, Any]:
        return {"origin": "first"}

    @classmethod
    @override
    def with_mean_age(cls, age: float, steps: int) -> Self:
        length = min(max(1, round(2 * age + 1)), steps)
        return cls(fraction=length / steps, total_steps=steps)
