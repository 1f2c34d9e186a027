"""The history: what an averager remembers of its updates, and what its profile is computed from."""

from __future__ import annotations

import math
from array import array
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from polyak.strategy.profile import Profile
from polyak.strategy.updates import Updates

if TYPE_CHECKING:
    from collections.abc import Iterable

    from numpy.typing import NDArray

    from polyak.strategy.base import Strategy

__all__ = ["NO_LR", "Change", "History", "Identity"]


class Change(NamedTuple):
    """A setting that was changed in the middle of a run.

    Attributes:
        n: How many updates were averaged before.
        name: The setting.
        before: Its value until then, as plain types.
        after: Its value from then on.
    """

    n: int
    name: str
    before: Any
    after: Any


NO_LR = math.inf
"""What stands for the learning rate where none was given."""


class Identity(NamedTuple):
    """What tells one history from another that has as many updates.

    Attributes:
        start: The digest of the weights that the average started from; empty if nobody recorded them.
        marks: The optimiser step of each recorded snapshot and the digest of the average then.
    """

    start: str = ""
    marks: tuple[tuple[int, str], ...] = ()


class History:
    """The rates and strides of an averager's updates, run-length encoded.

    A constant decay makes one run, however long the training; a rate that changes at each update 33 bytes each.

    Attributes:
        rates: The rate of each run.
        strides: The steps between its updates.
        last: The number of its last update.
        changes: The settings that were changed on the way. Their rates are in the runs.
        identity: What tells it from other histories.
        lrs: The learning rate that the strategy was given; infinite if it uses none.
        counted: Whether the averager counted the steps: 1, or 0 if they were given.
        held: How many updates kept the old value of some elements.
    """

    def __init__(
        self,
        rates: Iterable[float] = (),
        strides: Iterable[int] = (),
        last: Iterable[int] = (),
        changes: Iterable[Change] = (),
        identity: Identity = Identity(),  # noqa: B008 - it is immutable
        lrs: Iterable[float] = (),
        counted: Iterable[int] = (),
        held: int = 0,
    ) -> None:
        self.changes, self.identity, self.held = tuple(changes), identity, held
        self._holding = 0
        self.rates = array("d", rates)
        self.strides = array("q", strides)
        self.last = array("q", last)
        runs = len(self.last)
        self.lrs = array("d", lrs) or array("d", [NO_LR]) * runs
        self.counted = array("b", counted) or array("b", [1]) * runs
        if not len(self.rates) == len(self.strides) == len(self.lrs) == len(self.counted) == runs:
            message = f"got {len(self.rates)} rates, {len(self.strides)} strides and {runs} ends of runs"
            raise ValueError(message)

    def __len__(self) -> int:
        return self.last[-1] if self.last else 0

    def record(self, n: int, rate: float, stride: int, *, lr: float | None = None, counted: bool = True) -> None:
        """Note update number ``n``; noting the same one twice changes nothing, wherever the first time was cut off."""
        runs = len(self.last)
        if len(self) >= n:
            return
        update = rate, stride, NO_LR if lr is None else lr, int(counted)
        fields: tuple[array[Any], ...] = (self.rates, self.strides, self.lrs, self.counted)
        if (
            runs
            and (self.rates[runs - 1], self.strides[runs - 1], self.lrs[runs - 1], self.counted[runs - 1]) == update
        ):
            self.last[-1] = n
            return
        # The ends are written last and tell how many runs there are.
        for values, value in zip(fields, update, strict=True):
            del values[runs:]
            values.append(value)
        self.last.append(n)

    def hold(self, n: int) -> None:
        """Note that update number ``n`` kept the old value of some elements; the same one twice is once."""
        self.held += n != self._holding
        self._holding = n

    @property
    def start(self) -> float:
        """The share of the start in an average of one running tensor."""
        rates, ends = np.array(self.rates[: len(self.last)], np.float64), np.array([0, *self.last], np.float64)
        return float(np.prod((1.0 - rates) ** np.diff(ends)))

    def profile(self, strategy: Strategy, last_step: int, start: int | None = None) -> Profile:
        """Return the profile of all updates so far.

        Args:
            strategy: The strategy.
            last_step: The optimiser step of the last update.
            start: The averager's option.
        """
        runs = len(self.last)
        ends = np.array([0, *self.last], np.int64)
        counts = ends[1:] - ends[:-1]

        def each(values: array[Any]) -> NDArray[Any]:
            return np.repeat(np.array(values[:runs]), counts)

        steps = np.cumsum(each(self.strides), dtype=np.int64)
        steps += last_step - steps[-1] if runs else 0
        shares = strategy.shares(each(self.rates).astype(np.float64))
        lr = None if all(value == NO_LR for value in self.lrs[:runs]) else each(self.lrs)
        counted = each(self.counted).astype(np.bool_) if 0 in self.counted[:runs] else True
        stride = self.strides[0] if runs else 0
        updates = Updates(steps, stride, lr, counted, start)
        return Profile(shares.updates, steps, shares.start, stride, updates, held=self.held)
