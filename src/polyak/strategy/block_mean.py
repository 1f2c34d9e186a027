"""The mean of one block of steps after the other."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar, Literal

from typing_extensions import override

from polyak.strategy.base import Strategy
from polyak.strategy.elementwise import at_most
from polyak.strategy.numbers import Count

if TYPE_CHECKING:
    from collections.abc import Mapping

    from polyak.strategy.clock import Clock

__all__ = ["BlockMean"]


class BlockMean(Strategy):
    """The plain mean of the current block of steps: ``rate = min(1, stride / (steps of the block so far))``.

    The blocks are the optimiser steps 1 … length, length + 1 … 2 length, and so on. Each starts from nothing. At the
    step that ends a block the average is exactly the mean of that block, which is what snapshots keep: means
    of blocks make up any later average without negative coefficients.

    Source: elementary (the batch means of time series), as the snapshots from which polyak synthesises averages.

    Often confused with: ``lawa``, a window that moves along with the run and never restarts.

    Examples:
        >>> from polyak import Profile
        >>> Profile.of(BlockMean(length=4), 8).shares.tolist()
        [0.0, 0.0, 0.0, 0.0, 0.25, 0.25, 0.25, 0.25]
    """

    source: ClassVar[str] = "batch means"
    elementwise: ClassVar[bool] = True

    name: Literal["block_mean"] = "block_mean"
    length: Count
    """Optimiser steps in a block."""

    @override
    def rate(self, clock: Clock) -> float:
        # Where averaging began within the block, it is the mean since then.
        block = at_most((clock.step - 1) % self.length + 1, clock.elapsed)
        rate: float = at_most(clock.stride / block, 1.0)
        return rate

    @override
    def engine(self) -> Mapping[str, Any]:
        return {"origin": "first"}
