"""The profile: what each past update counts in the average."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Self

import numpy as np

from polyak.errors import ArgumentError, ConfigError, RateError
from polyak.errors.formatting import shown
from polyak.strategy.base import Strategy
from polyak.strategy.numbers import LARGEST, as_number, given_integer
from polyak.strategy.runs import Runs
from polyak.strategy.shares import recursion_shares
from polyak.strategy.updates import Updates, rates_of

if TYPE_CHECKING:
    from collections.abc import Iterable

    from matplotlib.axes import Axes
    from numpy.typing import NDArray


__all__ = ["Profile"]

_LONGEST = 100_000_000  # updates, whose profile has some gigabytes


@dataclass(frozen=True, eq=False, repr=False)
class Profile:
    """The shares of an average: what each past update counts in it, and what is left of the start.

    The average equals ``start * origin + sum(shares * weights)``, where they all add up to 1; with one running tensor
    ``share_i = rate_i * prod_{j>i} (1 - rate_j)``. Ages are in optimiser steps before the last update.

    Attributes:
        shares: The share of each update 1..n, float64, shape (n,).
        steps: The optimiser step of each update, int64, shape (n,); increasing.
        start: The share left on the weights that the average started from.
        stride: The optimiser steps that the first update represents; 0: as many as the second.
        updates: When its updates were made, as far as it is known.
        held: How many updates kept the old value of some elements, because the new one would not have been finite: the
            shares of those elements are others.

    Source: field notes of every paper on averaging; the identity itself is elementary.

    Often confused with: the *rates*. The rate of an update is what it counted when it was made, its share what is left.

    Examples:
        >>> profile = Profile.from_rates([1.0, 0.5, 0.5])
        >>> profile.shares.tolist(), profile.start
        ([0.25, 0.25, 0.5], 0.0)
    """

    shares: NDArray[np.float64]
    steps: NDArray[np.int64]
    start: float = 0.0
    stride: int = 0
    updates: Updates | None = field(default=None, repr=False)
    held: int = 0

    def __post_init__(self) -> None:
        if len(self.shares) != len(self.steps):
            message = f"got {len(self.shares)} shares and {len(self.steps)} steps; give one step per share"
            raise ConfigError(message)

    @classmethod
    def from_rates(cls, rates: Iterable[float], steps: Iterable[int] | None = None) -> Self:
        """Return the profile of these rates of one running tensor, at steps 1, 2, 3 … where none are given.

        Raises:
            RateError: If a rate is not a finite number.
            ConfigError: If there are more or fewer steps than rates, or they are no integers that grow.
        """
        try:
            numbers = np.fromiter(rates, np.float64)
        except (TypeError, ValueError):
            numbers = np.array([np.nan])
        if not np.isfinite(numbers).all():
            message = f"the rates are finite numbers, one for each update; got {shown(rates)}"
            raise RateError(message)
        shares = recursion_shares(numbers)
        s = np.arange(1, len(shares.updates) + 1) if steps is None else _growing(steps)
        return cls(shares.updates, s, shares.start)

    @classmethod
    def of(
        cls,
        strategy: Strategy | type[Strategy],
        n: int,
        *,
        every: int = 1,
        start: int = 0,
        first: int | None = None,
        origin: str | None = None,
        lr: float | None = None,
    ) -> Self:
        """Return the profile that ``strategy`` has after ``n`` updates.

        A million updates take milliseconds for ``elementwise`` strategies.

        Args:
            strategy: A strategy object, or a class whose settings all have defaults.
            n: The count of averaged updates.
            every: The optimiser steps from one to the next.
            start: The first optimiser step that may be averaged.
            first: The first that is. Defaults to what ``every`` and ``start`` say, for steps counted from 1.
            origin: "initial" or "first", as in ``polyak.average``. Defaults to the strategy's own, "first" after a
                ``start``.
            lr: The learning rate, for strategies that use it.

        Raises:
            ArgumentError: If ``strategy`` is not a strategy.
            ConfigError: If a number or the origin is out of its range.

        Examples:
            >>> from polyak import SWA
            >>> Profile.of(SWA(), 4).shares.tolist()
            [0.25, 0.25, 0.25, 0.25]
        """
        if isinstance(strategy, type) and issubclass(strategy, Strategy):
            strategy = strategy()  # type: ignore[call-arg]  # every class that has a rate has a name
        if not isinstance(strategy, Strategy):
            message = f"Profile.of() got {shown(strategy)}; expected a strategy such as polyak.EMA(decay=0.999)"
            if isinstance(strategy, (str, dict)):
                message += f", or AveragerConfig(strategy={shown(strategy)}).profile(step)"
            raise ArgumentError(message)
        n = given_integer("n", n, 0, _LONGEST)
        every, start = given_integer("every", every, 1), given_integer("start", start, 0)
        first = None if first is None else given_integer("first", first, 0)
        if lr is not None and (lr := as_number(given := lr)) is None:
            message = f"lr: got {shown(given)}; expected a learning rate, a finite number"
            raise ConfigError(message)
        if origin not in {None, "initial", "first"}:
            message = f"origin: got {shown(origin)}; expected 'initial', 'first' or None (the strategy's own)"
            raise ConfigError(message)
        begin = max(every, -(-start // every) * every) if first is None else first
        if (last := begin + max(0, n - 1) * every) > LARGEST:
            message = f"n={n} updates, one each every={every} steps, end at step {last}; expected at most {LARGEST}"
            raise ConfigError(message)
        origin = origin or ("first" if start else strategy.engine().get("origin", "initial"))
        return cls.at(strategy, Updates.regular(n, every=every, first=begin, lr=lr), origin)

    @classmethod
    def at(cls, strategy: Strategy, updates: Updates, origin: str) -> Self:
        """Return the profile that ``strategy`` has after these updates."""
        shares = strategy.shares(rates_of(strategy, updates, replaced=origin == "first"))
        return cls(shares.updates, updates.steps, shares.start, updates.stride, updates)

    def __len__(self) -> int:
        return len(self.shares)

    def __repr__(self) -> str:
        return f"<profile of {len(self)} updates, half-life {self.half_life:.4g}, mean age {self.mean_age:.4g} steps>"

    @cached_property
    def ages(self) -> NDArray[np.float64]:
        """Steps between each update and the last one, shape (n,)."""
        return (self.steps[-1] - self.steps).astype(np.float64) if len(self) else np.empty(0)

    @cached_property
    def runs(self) -> Runs:
        """What each single optimiser step counts; an update's share is divided among its steps."""
        edges = np.concatenate((self.steps[:1] - self._strides[:1], self.steps))
        return Runs(edges, self.shares / self._strides)

    @cached_property
    def by_age(self) -> NDArray[np.float64]:
        """What each single optimiser step counts, the last one first; an update's share is divided among its steps.

        Raises:
            ConfigError: If there are too many steps; ``shares`` and ``steps`` say the same in less memory.
        """
        if (length := int(self._strides.sum())) > _LONGEST:
            message = (
                f"the profile reaches over {length} optimiser steps, and by_age has a number for each of at most "
                f"{_LONGEST}; use shares and steps"
            )
            raise ConfigError(message)
        return np.repeat(self.runs.each, self._strides)[::-1]

    @cached_property
    def _strides(self) -> NDArray[np.int64]:
        later = np.diff(self.steps)
        first = self.stride or (later[0] if len(later) else 1)
        return np.concatenate(([first], later))[: len(self)].clip(1)

    def _moment(self, values: NDArray[np.float64]) -> float:
        total = self.shares.sum()
        return float(self.shares @ values / total) if total else math.nan

    @property
    def mean_age(self) -> float:
        """The mean age of the averaged weights in optimiser steps, without the start."""
        return self._moment(self.ages)

    @property
    def spread(self) -> float:
        """The standard deviation of the age in optimiser steps, without the start; NaN where shares are negative."""
        variance = self._moment((self.ages - self.mean_age) ** 2)
        return math.sqrt(max(0.0, variance)) if self.shares.min(initial=0.0) >= 0 else math.nan

    @property
    def half_life(self) -> float:
        """The age in steps within which the younger half of all shares lies; inf where the start holds more."""
        half = np.flatnonzero(np.cumsum(self.shares[::-1]) >= 0.5 - 1e-12)  # a sum that negative shares make fall again
        return float((self.ages + self._strides)[::-1][half[0]]) if len(half) else math.inf

    @property
    def effective_size(self) -> float:
        """The number of equal shares with the same noise: ``1 / sum(share**2)``, the start counted as one more."""
        return float(1.0 / (np.sum(self.shares**2) + self.start**2))

    def distance(self, other: Profile) -> float:
        """Return the part of one average that comes from other weights than the other's, from 0 to 1.

        The total variation ``sum(|share - other share|) / 2`` over single optimiser steps, both profiles ending at
        the last one, and over the start. 0: the same average; 1: no step in common; above 1 only with negative shares.

        Often confused with: the distance of the averaged *weights*, which is smaller: neighbouring steps have nearly
        the same weights.

        Examples:
            >>> from polyak import EMA, SWA
            >>> round(Profile.of(SWA(), 100).distance(Profile.of(SWA(), 50)), 6)
            0.5
            >>> round(Profile.of(EMA(decay=0.9), 100).distance(Profile.of(EMA(decay=0.99), 100)), 2)
            0.71
        """
        if not isinstance(other, Profile):
            message = f"a profile has a distance from another profile; got {shown(other)}"
            raise ArgumentError(message)
        mine, theirs = self.runs.ending_at_zero(), other.runs.ending_at_zero()
        edges = np.union1d(mine.edges, theirs.edges)
        apart = np.abs(mine.between(edges) - theirs.between(edges)) @ np.diff(edges)
        return float(apart + abs(self.start - other.start)) / 2

    def plot(self, ax: Axes | None = None, *, label: str = "share") -> Axes:
        """Draw what each past step counts; several profiles in one picture: ``polyak.plot.shares``.

        Args:
            ax: Where to draw. Defaults to a new figure.
            label: The name of the line.

        Raises:
            MissingExtraError: If matplotlib is not installed.

        Examples:
            >>> from polyak import EMA
            >>> ax = Profile.of(EMA(decay=0.99), 1000).plot(label="EMA")
            >>> [line.get_label() for line in ax.lines]
            ['EMA']
        """
        from polyak.plot import shares

        return shares({label: self}, ax)


def _growing(steps: Iterable[int]) -> NDArray[np.int64]:
    try:
        found = np.asarray(steps) if hasattr(steps, "__array__") else np.array([*steps])
    except (TypeError, ValueError):
        found = np.array([np.nan])
    are_integers = not found.size or (found.dtype.kind in "iu" and found.max() <= LARGEST)
    numbers = found.astype(np.int64) if are_integers else np.array([-1])
    if numbers.ndim != 1 or (np.diff(numbers, prepend=-1) <= 0).any():
        message = f"steps: got {shown(steps)}; expected integers from 0 on, each larger than the one before"
        raise ConfigError(message)
    return numbers
