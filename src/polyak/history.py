"""The history: what an averager remembers of its updates, and what its profile is computed from."""

from __future__ import annotations

from array import array
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from polyak.profile import Profile

if TYPE_CHECKING:
    from collections.abc import Iterable

    from polyak.strategy import Strategy

__all__ = ["Change", "History", "Identity"]


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

    A constant decay makes one run, however long the training; a rate that changes at each update 24 bytes each.

    Attributes:
        rates: The rate of each run.
        strides: The steps between its updates.
        last: The number of its last update.
        changes: The settings that were changed on the way. Their rates are in the runs.
        identity: What tells it from other histories.
    """

    def __init__(
        self,
        rates: Iterable[float] = (),
        strides: Iterable[int] = (),
        last: Iterable[int] = (),
        changes: Iterable[Change] = (),
        identity: Identity = Identity(),  # noqa: B008 - it is immutable
    ) -> None:
        self.changes, self.identity = tuple(changes), identity
        self.rates = array("d", rates)
        self.strides = array("q", strides)
        self.last = array("q", last)
        if not len(self.rates) == len(self.strides) == len(self.last):
            message = f"got {len(self.rates)} rates, {len(self.strides)} strides and {len(self.last)} ends of runs"
            raise ValueError(message)

    def __len__(self) -> int:
        return self.last[-1] if self.last else 0

    def record(self, n: int, rate: float, stride: int) -> None:
        """Note update number ``n``; noting the same one twice changes nothing, wherever the first time was cut off."""
        runs = len(self.last)
        if len(self) >= n:
            return
        if runs and (self.rates[runs - 1], self.strides[runs - 1]) == (rate, stride):
            self.last[-1] = n
            return
        # The ends are written last and tell how many runs there are.
        del self.rates[runs:], self.strides[runs:]
        self.rates.append(rate)
        self.strides.append(stride)
        self.last.append(n)

    @property
    def start(self) -> float:
        """The share of the start in an average of one running tensor."""
        rates, ends = np.array(self.rates[: len(self.last)], np.float64), np.array([0, *self.last], np.float64)
        return float(np.prod((1.0 - rates) ** np.diff(ends)))

    def profile(self, strategy: Strategy, last_step: int) -> Profile:
        """Return the profile of all updates so far, the last of which was made at ``last_step``."""
        runs = len(self.last)
        ends = np.array([0, *self.last], np.int64)
        counts = ends[1:] - ends[:-1]
        rates = np.repeat(np.array(self.rates[:runs], np.float64), counts)
        steps = np.cumsum(np.repeat(np.array(self.strides[:runs], np.int64), counts))
        shares = strategy.shares(rates)
        moved = steps + (last_step - steps[-1]) if len(steps) else steps
        return Profile(shares.updates, moved, shares.start, self.strides[0] if runs else 0)
