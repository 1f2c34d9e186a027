"""When the updates of an average are made, and the rates that a strategy has there."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from polyak.strategy.clock import Clock, Clocks

if TYPE_CHECKING:
    from collections.abc import Iterator

    from numpy.typing import NDArray

    from polyak.strategy.base import Strategy

__all__ = ["Updates", "rates_of"]

_FEW = 256  # kinds of updates whose rates are computed together


class Updates(NamedTuple):
    """The moments of updates 1..n.

    Attributes:
        steps: The optimiser step of each, int64, shape (n,); increasing.
        stride: The optimiser steps that the first one represents.
        lr: The learning rate given to all, or to each (shape (n,), infinite: none). Defaults to unknown.
        counted: Whether the averager counted the steps: of all, or of each (shape (n,)).
        start: The option ``start`` of the averager. Defaults to unknown.
    """

    steps: NDArray[np.int64]
    stride: int = 1
    lr: NDArray[np.float64] | float | None = None
    counted: NDArray[np.bool_] | bool = True
    start: int | None = None

    @classmethod
    def regular(cls, n: int, *, every: int, first: int, lr: float | None = None) -> Updates:
        """Return the moments of ``n`` updates, one each ``every`` steps, from the step ``first`` on."""
        return cls(first + every * np.arange(n, dtype=np.int64), every, lr)

    @property
    def strides(self) -> NDArray[np.int64]:
        """The optimiser steps that each represents."""
        return np.diff(self.steps, prepend=self.steps[:1] - self.stride)

    def clocks(self) -> list[Clock]:
        """Return the moments one by one; the mass is what the caller makes of it."""
        n = len(self.steps)
        lrs: list[float | None] = [self.lr] * n if not isinstance(self.lr, np.ndarray) else self.lr.tolist()
        counted = np.broadcast_to(self.counted, n).tolist()
        strides = self.strides
        moments = zip(self.steps.tolist(), strides.tolist(), np.cumsum(strides).tolist(), lrs, counted, strict=True)
        return [
            Clock(i, step, stride, None if lr is None or np.isinf(lr) else lr, 0.0, elapsed, seen)
            for i, (step, stride, elapsed, lr, seen) in enumerate(moments, 1)
        ]

    def grouped(self) -> list[tuple[Any, Clocks]]:
        """Return the updates of equal strides together: their indices, and their moments as arrays."""
        strides = self.strides
        clocks = Clocks(
            np.arange(1.0, len(strides) + 1.0), self.steps.astype(np.float64), 1.0, self.lr,  # type: ignore[arg-type]
            np.zeros(len(strides)), np.cumsum(strides).astype(np.float64), counted=True,
        )  # fmt: skip
        kinds = np.stack([strides, np.broadcast_to(self.counted, len(strides))])
        if (kinds == kinds[:, :1]).all():
            return [(slice(None), clocks.those(slice(None), kinds[:, 0]))] if len(strides) else []
        found, kind = np.unique(kinds, axis=1, return_inverse=True)
        ends = np.cumsum(np.bincount(kind.reshape(-1)))[:-1]
        groups = np.split(np.argsort(kind.reshape(-1), kind="stable"), ends)
        return [(group, clocks.those(group, found[:, i])) for i, group in enumerate(groups)]


def rates_of(strategy: Strategy, updates: Updates, *, replaced: bool = False) -> NDArray[np.float64]:
    """Return the rate of each update.

    Args:
        strategy: The strategy.
        updates: Their moments.
        replaced: Whether the first update replaces the start, so that its rate is 1 and not asked for.
    """
    n = len(updates.steps)
    groups = updates.grouped() if strategy.elementwise and not isinstance(updates.lr, np.ndarray) else []
    if n and not 0 < len(groups) <= _FEW:
        return np.fromiter(_one_by_one(strategy, updates, replaced=replaced), np.float64, n)
    weights, rates = np.empty(n), np.empty(n)
    moments: Any  # the names and the meanings of a clock, as arrays
    for chosen, moments in groups:
        weights[chosen] = strategy.weight(moments)
    mass = np.concatenate(([0.0], np.cumsum(weights)[:-1])) if n else weights
    for chosen, moments in groups:
        rates[chosen] = strategy.rate(moments._replace(mass=mass[chosen]))
    rates[: int(replaced)] = 1.0
    return rates


def _one_by_one(strategy: Strategy, updates: Updates, *, replaced: bool) -> Iterator[float]:
    mass = 0.0
    for moment in updates.clocks():
        clock = replace(moment, mass=mass) if mass else moment
        yield 1.0 if replaced and clock.n == 1 else strategy.rate(clock)
        mass += strategy.weight(clock)
