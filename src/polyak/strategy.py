"""A strategy: frozen settings and one number per update."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from numbers import Real
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple, Self

from pydantic import BaseModel, ConfigDict, PrivateAttr
from typing_extensions import override

from polyak.errors import RateError, UnknownStrategyError
from polyak.recursion import Shares, recursion_shares

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    import numpy as np
    from numpy.typing import NDArray

    from polyak.clock import Clock

__all__ = ["RESERVED", "MissingStrategy", "Move", "Strategy", "checked_moves", "checked_rate", "checked_weight"]

RESERVED = frozenset(
    {
        "strategy", "start", "every", "origin", "buffers", "include", "exclude",
        "match", "device", "dtype", "nonfinite", "kernel", "capturable", "model",
    }
)  # fmt: skip
"""Names of engine options; a strategy may not define a field of the same name."""


class Move(NamedTuple):
    """A part of an update: ``target += rate * (source - target)`` for every averaged tensor.

    Attributes:
        target: The slot that is moved: ``"average"``, or one that the strategy declares.
        source: What it is moved towards: ``"weights"``, or a slot.
        rate: The coefficient; 1 replaces the target, and it may leave [0, 1] where the sum of all moves makes sense.

    Often confused with: the rate of an update, which is one number; a strategy of one tensor is one move with it.

    Examples:
        >>> from polyak import DoubleEMA
        >>> [(target, source, round(rate, 3)) for target, source, rate in DoubleEMA(decay=0.9).moves(1, 0.1)]
        [('first', 'weights', 0.1), ('second', 'first', 0.1), ('average', 'first', 1.0), ('average', 'second', -1.0)]
    """

    target: str
    source: str
    rate: float


class Strategy(BaseModel, ABC):
    """A probability distribution over past weights: ``average += rate(clock) * (weights - average)``.

    A subclass is frozen settings (pydantic fields, validated), a ``name`` for configs and ``rate``.
    It sees no tensors, names, devices or dtypes; the engine has those.

    Examples:
        >>> from typing import Literal
        >>> class Root(Strategy):
        ...     '''A horizon that grows like a power of the run.'''
        ...     name: Literal["root"] = "root"
        ...     power: float = 0.5
        ...     def rate(self, clock):
        ...         return clock.n**-self.power
        >>> Root(power=1.0)
        Root(name='root', power=1.0)

    Often confused with: an optimiser or a schedule of the learning rate. A strategy never touches
    the weights that are trained.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    name: str
    """The name in configs; a subclass declares it as ``name: Literal["..."] = "..."``."""

    source: ClassVar[str] = ""
    """Where the formula comes from: paper, year, arXiv id, or the library and version matched."""

    elementwise: ClassVar[bool] = False
    """Whether ``rate`` and ``weight`` are nothing but arithmetic (``+ - * / **`` and numpy's functions), so that one
    call with arrays in the clock gives the rates of a million updates."""

    @abstractmethod
    def rate(self, clock: Clock) -> float:
        """Return the coefficient of this update, a number in [0, 1]; 1 replaces the average."""

    def weight(self, clock: Clock) -> float:  # noqa: ARG002 - the default does not depend on the moment
        """Return the unnormalised share of this update; ``clock.mass`` sums those of the earlier ones.

        Only for strategies whose shares are known up to their sum: define ``weight``, and let ``rate``
        be ``w / (clock.mass + w)``. The engine keeps the sum and saves it with the state.
        """
        return 1.0

    def slots(self) -> tuple[str, ...]:
        """Return the names of what it keeps for each averaged tensor beside the average, where one is not enough."""
        return ()

    def moves(self, n: int, rate: float) -> Sequence[Move]:  # noqa: ARG002 - the default does not depend on the count
        """Return what update ``n`` does to the average and the slots, in this order; needed only with ``slots``.

        Before the first update every slot holds the weights at construction.

        Args:
            n: The 1-based count of averaged updates.
            rate: What ``rate(clock)`` returned, or 1 where the first update replaces the start.
        """
        return (Move("average", "weights", rate),)

    def shares(self, rates: NDArray[np.float64]) -> Shares:
        """Return what each update counts in the average after updates with these rates; needed only with ``slots``.

        Args:
            rates: The rate of each update 1..n, float64, shape (n,).
        """
        return recursion_shares(rates)

    @classmethod
    def with_mean_age(cls, age: float, steps: int) -> Self | None:  # noqa: ARG003 - the default has no parameter
        """Return the member of a one-parameter family whose mean age is about ``age``; None where this is no family.

        It lets ``polyak convert`` and sweeps walk along the family.

        Args:
            age: The mean age of the averaged weights, in optimiser steps.
            steps: The length of the run in optimiser steps.
        """
        return None

    def engine(self) -> Mapping[str, Any]:
        """Return the engine options this strategy means where the user names none.

        The keys are those of ``polyak.average``: ``origin``, ``match``, ``buffers``, ``kernel`` …
        """
        return {}

    @classmethod
    def __pydantic_init_subclass__(cls, **kwargs: Any) -> None:
        super().__pydantic_init_subclass__(**kwargs)
        if taken := sorted(RESERVED & cls.model_fields.keys()):
            message = (
                f"the strategy class {cls.__name__} defines {', '.join(map(repr, taken))}, which "
                f"{'is an option' if len(taken) == 1 else 'are options'} of the engine; choose another name. "
                f"Reserved: {', '.join(sorted(RESERVED))}."
            )
            raise TypeError(message)


class MissingStrategy(Strategy):
    """Stands for the strategy of a loaded state whose plugin is not installed: it only refuses to update."""

    model_config = ConfigDict(extra="allow")

    _slots: tuple[str, ...] = PrivateAttr(())

    @classmethod
    def of(cls, saved: Mapping[str, Any], slots: Iterable[str]) -> Self:
        """Return what stands for the strategy of a saved state that has these slots."""
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
            f"the loaded state was made by the strategy {self.name!r}, which is not installed here. The average can be "
            "evaluated and saved; to go on updating it, install the plugin that offers it (see `polyak plugins`)."
        )
        return UnknownStrategyError(message)


def checked_rate(strategy: Strategy, clock: Clock) -> float:
    """Return a strategy's rate.

    Raises:
        RateError: It is no finite number in [0, 1].
    """
    rate = strategy.rate(clock)
    if not isinstance(rate, Real) or not math.isfinite(rate) or not 0.0 <= rate <= 1.0:
        message = (
            f"the strategy {strategy!r} returned the rate {rate!r} at {clock}; expected a finite number in [0, 1]. "
            "Nothing was averaged."
        )
        raise RateError(message)
    return float(rate)


def checked_weight(strategy: Strategy, clock: Clock) -> float:
    """Return a strategy's weight.

    Raises:
        RateError: It is no finite number from 0 on.
    """
    weight = strategy.weight(clock)
    if not isinstance(weight, Real) or not math.isfinite(weight) or weight < 0.0:
        message = (
            f"the strategy {strategy!r} returned the weight {weight!r} at {clock}; expected a finite number >= 0. "
            "Nothing was averaged."
        )
        raise RateError(message)
    return float(weight)


def checked_moves(strategy: Strategy, n: int, rate: float) -> Sequence[Move]:
    """Return a strategy's moves.

    Raises:
        RateError: There is none, one has no finite rate, or is of a slot that the strategy does not declare.
    """
    moves = strategy.moves(n, rate)
    known = {"average", *strategy.slots()}
    for move in moves:
        if move.target not in known or move.source not in {"weights", *known} or not math.isfinite(move.rate):
            message = (
                f"the strategy {strategy!r} returned the move {move!r} for update {n}; expected a finite rate, and "
                f"slots among {', '.join(sorted(known))} (the source may be 'weights'). Nothing was averaged."
            )
            raise RateError(message)
    if not moves:
        message = f"the strategy {strategy!r} returned no moves for update {n}; expected at least one"
        raise RateError(message)
    return moves
