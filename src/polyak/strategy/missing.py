"""The placeholder for a strategy whose plugin is not installed."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Self

from pydantic import ConfigDict, PrivateAttr
from typing_extensions import override

from polyak.errors import UnknownStrategyError
from polyak.errors.formatting import shown
from polyak.strategy.base import Strategy

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    import numpy as np
    from numpy.typing import NDArray

    from polyak.strategy.base import Move
    from polyak.strategy.clock import Clock
    from polyak.strategy.shares import Shares

__all__ = ["MissingStrategy"]


class MissingStrategy(Strategy):
    """Replaces the strategy of a loaded state whose plugin is not installed: it only refuses to update."""

    model_config = ConfigDict(extra="allow")

    _slots: tuple[str, ...] = PrivateAttr(())

    @classmethod
    def of(cls, saved: Mapping[str, Any], slots: Iterable[str]) -> Self:
        """Return the substitute for the strategy of a saved state that has these slots."""
        new = cls.model_validate(saved)
        new._slots = tuple(slot for slot in slots if slot != "average")  # noqa: SLF001 - its own class
        return new

    @override
    def slots(self) -> tuple[str, ...]:
        return self._slots

    @override
    def rate(self, clock: Clock) -> float:
        raise self._missing()

    @override
    def moves(self, n: int, rate: float) -> Sequence[Move]:
        raise self._missing()

    @override
    def shares(self, rates: NDArray[np.float64]) -> Shares:
        if self._slots:
            raise self._missing()
        return super().shares(rates)

    @override
    def weight(self, clock: Clock) -> float:
        # Asked at every update, the rate not: with origin="first" the first one replaces the average.
        raise self._missing()

    def _missing(self) -> UnknownStrategyError:
        message = (
            f"the loaded state was made by the strategy {shown(self.name)}, which is not installed here. The average "
            "can be evaluated and saved; to go on updating it, install the plugin that offers it "
            "(see `polyak plugins`)."
        )
        return UnknownStrategyError(message)
