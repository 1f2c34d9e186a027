"""Stochastic weight averaging: every update counts the same."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar, Literal

from typing_extensions import override

from polyak.strategy.base import Strategy

if TYPE_CHECKING:
    from collections.abc import Mapping

    from polyak.strategy.clock import Clock

__all__ = ["SWA"]


class SWA(Strategy):
    """The plain mean of all averaged weights: ``rate = 1 / n``.

    Choose its beginning with ``start=`` (the paper: after 75 % of the run) and its cadence with ``every=``
    (the paper: once per epoch or per cycle of the learning rate). The first update replaces the start.

    Source: Izmailov et al., "Averaging Weights Leads to Wider Optima and Better Generalization" (2018),
    arXiv:1803.05407, algorithm 1; matched with ``torch.optim.swa_utils.AveragedModel`` of torch 2.15.

    Often confused with: an average over the last k snapshots (LAWA), which forgets; this one never does.

    Examples:
        >>> from polyak import Clock
        >>> [SWA().rate(Clock(n=n, step=n)) for n in (1, 2, 4)]
        [1.0, 0.5, 0.25]
    """

    source: ClassVar[str] = "Izmailov et al. 2018, arXiv:1803.05407"
    elementwise: ClassVar[bool] = True

    name: Literal["swa"] = "swa"

    @override
    def rate(self, clock: Clock) -> float:
        return 1.0 / clock.n

    @override
    def engine(self) -> Mapping[str, Any]:
        return {"origin": "first"}
