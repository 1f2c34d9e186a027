"""A strategy: frozen settings and one number per update."""

from __future__ import annotations

import inspect
import math
from abc import abstractmethod
from numbers import Real
from types import FunctionType
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple, Self

from typing_extensions import override

from polyak.errors import ArgumentError, ConfigError, RateError
from polyak.errors.hints import habit
from polyak.strategy.frozen import Frozen, nearest
from polyak.strategy.shares import Shares, recursion_shares

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    import numpy as np
    from numpy.typing import NDArray

    from polyak.strategy.clock import Clock

__all__ = ["RESERVED", "Move", "Strategy", "checked_moves", "checked_rate", "checked_weight", "settings_of", "variant"]

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


class Strategy(Frozen):
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
        """Return the unnormalised share of this update; ``clock.mass`` sums the earlier shares.

        Only for strategies whose shares are known up to their sum: define ``weight``, and let ``rate``
        be ``w / (clock.mass + w)``. The engine keeps the sum and saves it with the state.
        """
        return 1.0

    def slots(self) -> tuple[str, ...]:
        """Return the names of the tensors it keeps for each averaged tensor in addition to the average."""
        return ()

    def moves(self, n: int, rate: float) -> Sequence[Move]:  # noqa: ARG002 - the default does not depend on the count
        """Return the moves of the average and the slots at update ``n``, in order; needed only with ``slots``.

        Before the first update every slot holds the weights at construction.

        Args:
            n: The 1-based count of averaged updates.
            rate: What ``rate(clock)`` returned, or 1 where the first update replaces the start.
        """
        return (Move("average", "weights", rate),)

    def shares(self, rates: NDArray[np.float64]) -> Shares:
        """Return the share of each update in the average after updates with these rates; needed only with ``slots``.

        Args:
            rates: The rate of each update 1..n, float64, shape (n,).
        """
        return recursion_shares(rates)

    @classmethod
    def with_mean_age(cls, age: float, steps: int) -> Self | None:  # noqa: ARG003 - the default has no parameter
        """Return the member of a one-parameter family whose mean age is about ``age``, or None if this is not a family.

        It lets ``polyak convert`` and sweeps walk along the family.

        Args:
            age: The mean age of the averaged weights, in optimiser steps.
            steps: The length of the run in optimiser steps.
        """
        return None

    def engine(self) -> Mapping[str, Any]:
        """Return the engine options this strategy means where the user names none.

        The keys are options of ``polyak.average``: ``origin``, ``match``, ``buffers``, ``kernel`` …
        """
        return {}

    @classmethod
    @override
    def _hint(cls, key: str) -> str:
        # An option may be meant: the name itself, or what other libraries call it.
        if key in RESERVED or (habit(key, RESERVED) and not habit(key, cls.model_fields)):
            option = f"{key!r} is an option" if key in RESERVED else f"{nearest(key, RESERVED).strip()} It is an option"
            return f" {option} of the averager: give it to polyak.average() together with the strategy."
        return super()._hint(key)

    @classmethod
    def _origin_of(cls, method: str) -> type:
        return next(base for base in cls.__mro__ if method in vars(base))

    @classmethod
    @override
    def _by_name(cls, value: object) -> str:
        if hasattr(value, "parameters"):  # a module; strategies import no torch
            return f"{cls.__name__} is a strategy; write polyak.average(model, polyak.{cls.__name__}(...))"
        return super()._by_name(value)

    @classmethod
    def __pydantic_init_subclass__(cls, **kwargs: Any) -> None:
        super().__pydantic_init_subclass__(**kwargs)
        if cls.slots is not Strategy.slots and Strategy in {cls._origin_of("moves"), cls._origin_of("shares")}:
            message = (
                f"the strategy class {cls.__name__} has slots and lacks moves() or shares(): say what an update does "
                "to them, and what each update counts in the average"
            )
            raise ArgumentError(message)
        if isinstance(rate := vars(cls).get("rate"), FunctionType):
            try:
                inspect.signature(rate).bind(None, None)
            except TypeError:
                message = f"{cls.__name__}.rate{inspect.signature(rate)} takes no clock; define it as rate(self, clock)"
                raise ArgumentError(message) from None
        if taken := sorted(RESERVED & cls.model_fields.keys()):
            message = (
                f"the strategy class {cls.__name__} defines {', '.join(map(repr, taken))}, which "
                f"{'is an option' if len(taken) == 1 else 'are options'} of the engine; choose another name. "
                f"Reserved: {', '.join(sorted(RESERVED))}."
            )
            raise ArgumentError(message)


def _is_number(value: object) -> bool:
    return (type(value) is float or isinstance(value, Real)) and math.isfinite(value)


def settings_of(strategy: Strategy) -> dict[str, Any]:
    """Return a strategy's name and settings as plain types; computed fields do not count.

    Raises:
        ConfigError: If a setting has no plain form, or is excluded from it.
    """
    kind = type(strategy)
    try:
        said: dict[str, Any] = strategy.model_dump(mode="json", round_trip=True)
    except ValueError as error:  # pydantic's, and what a serialiser of the user's raises
        message = f"the settings of {kind.__name__} cannot be saved: {error}. Give each a type of plain values"
        raise ConfigError(message) from error
    if lost := [name for name in kind.model_fields if name not in said]:
        message = f"{kind.__name__} excludes {', '.join(map(repr, lost))} from what is saved, and a resume needs it"
        raise ConfigError(message)
    return said


def variant(strategy: Strategy) -> str:
    """Return the name of a strategy's class if it has the ``name`` of the class that it comes from, or ""."""
    own = type(strategy)
    known = (other.model_fields.get("name") for other in own.__mro__[1:] if issubclass(other, Strategy))
    return own.__qualname__ if any(field and field.default == strategy.name for field in known) else ""


def checked_rate(strategy: Strategy, clock: Clock) -> float:
    """Return a strategy's rate.

    Raises:
        RateError: If the rate is not a finite number in [0, 1].
    """
    rate = strategy.rate(clock)
    if not (_is_number(rate) and 0.0 <= rate <= 1.0):
        message = (
            f"the strategy {strategy!r} returned the rate {rate!r} at {clock}; expected a finite number in [0, 1]. "
            "Nothing was averaged."
        )
        raise RateError(message)
    return float(rate)


def checked_weight(strategy: Strategy, clock: Clock) -> float:
    """Return a strategy's weight.

    Raises:
        RateError: If the weight is not a finite number from 0 on.
    """
    weight = strategy.weight(clock)
    if not (_is_number(weight) and weight >= 0.0):
        message = (
            f"the strategy {strategy!r} returned the weight {weight!r} at {clock}; expected a finite number >= 0. "
            "Nothing was averaged."
        )
        raise RateError(message)
    return float(weight)


def checked_moves(strategy: Strategy, n: int, rate: float) -> Sequence[Move]:
    """Return a strategy's moves.

    Raises:
        RateError: If there is no move, one has no finite rate, or names a slot that the strategy does not declare.
    """
    moves = strategy.moves(n, rate)
    slots = strategy.slots()
    if not slots and type(strategy).moves is Strategy.moves:
        return moves
    known = {"average", *slots}
    if not slots and tuple(moves) != (Move("average", "weights", rate),):
        message = (
            f"the strategy {strategy!r} has no slots and returned the moves {moves!r} for update {n}; without slots an "
            "update is one move, of the average towards the weights by rate(): declare slots(), or leave moves() out"
        )
        raise RateError(message)
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
