"""Which member of one family of averages is most like a given average."""

from __future__ import annotations

import math
from functools import cache
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from polyak.config import AveragerConfig
from polyak.errors import ArgumentError, ConfigError
from polyak.errors.formatting import shown
from polyak.registry import registry
from polyak.strategy.base import Strategy
from polyak.strategy.numbers import given_integer
from polyak.strategy.profile import Profile

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

__all__ = ["Conversion", "convert"]

_GRID = 32  # mean ages that are tried first
_YOUNGEST, _OLDEST = 0.01, 100.0  # mean ages that are tried: steps, and parts of the run
_CLOSE = 1e-7  # where the search for a mean age ends, relative to it
_GOLDEN = (math.sqrt(5) - 1) / 2
_WHOLE = 33  # ages that are tried at the end where a setting is a whole number, of which four are left at most


class Conversion(NamedTuple):
    """The member of a family that is nearest to an average.

    Attributes:
        strategy: That member.
        distance: The part of the average that still comes from other weights, from 0 to 1 (``Profile.distance``).
        profile: The profile of the member.
        wanted: The profile that it was to have.

    Examples:
        >>> found = convert("swa", "power", steps=1000)
        >>> found.strategy, found.distance < 1e-12
        (PowerEMA(name='power', sigma_rel=None, gamma=0.0), True)
    """

    strategy: Strategy
    distance: float
    profile: Profile
    wanted: Profile


def convert(
    strategy: str | Strategy | Mapping[str, Any],
    to: str | type[Strategy],
    *,
    steps: int,
    every: int = 1,
    to_every: int | None = None,
) -> Conversion:
    """Return the member of the family ``to`` whose profile after ``steps`` is nearest to the profile of ``strategy``.

    Nearest is the smallest total variation of the shares (``Profile.distance``). The mean ages are tried on a coarse
    grid first and refined from its best.

    Args:
        strategy: The average to be like: a strategy, its name, or a mapping of its name and settings.
        to: A family with one parameter, by name or class.
        steps: The length of the run in optimiser steps.
        every: The optimiser steps from one update to the next, of both averages.
        to_every: The same, of the average that is looked for, where it is another: the distance of the snapshots of
            ``lawa``, for example.

    Raises:
        UnknownStrategyError: If no strategy has that name.
        ConfigError: If a setting is wrong, ``to`` is not a one-parameter family, or no update falls into ``steps``.

    Often confused with: ``with_mean_age`` of a strategy, which has the same mean age and not the nearest shares.

    Examples:
        >>> import polyak
        >>> found = convert(polyak.EMA(decay=0.9999), "power", steps=100_000)
        >>> print(f"{found.strategy.sigma_rel:.4f}, {found.distance:.0%} elsewhere")
        0.0852, 2% elsewhere
        >>> convert({"name": "ema", "decay": 0.99}, "lawa", steps=10_000, to_every=10).strategy
        LAWA(name='lawa', window=17)
    """
    steps, every = given_integer("steps", steps, 1), given_integer("every", every, 1)
    spacing = every if to_every is None else given_integer("to_every", to_every, 1)
    if steps < max(every, spacing):
        message = (
            f"there is no update in steps={steps!r} with every={every!r} and to_every={spacing!r}; give more steps"
        )
        raise ConfigError(message)
    source = strategy if isinstance(strategy, Strategy) else _named(strategy)
    family = _family(to, steps)
    wanted = Profile.of(source, steps // every, every=every)

    @cache
    def distance(member: Strategy) -> float:
        return wanted.distance(Profile.of(member, steps // spacing, every=spacing))

    found = _nearest(lambda age: _member(family, age, steps), distance, steps)
    return Conversion(found, distance(found), Profile.of(found, steps // spacing, every=spacing), wanted)


def _named(strategy: str | Mapping[str, Any]) -> Strategy:
    return AveragerConfig.of({"strategy": strategy}, "convert(): the strategy").strategy


def _family(to: str | type[Strategy], steps: int) -> type[Strategy]:
    family = registry().resolve(to) if isinstance(to, str) else to
    if not (isinstance(family, type) and issubclass(family, Strategy)):
        message = f"convert() got {shown(to)} as the family; expected a strategy's name or class, such as 'power'"
        raise ArgumentError(message)
    if family.with_mean_age(1.0, steps) is None:
        known = [name for name, cls in registry().strategies().items() if cls.with_mean_age(1.0, steps) is not None]
        message = (
            f"{family.model_fields['name'].default!r} is no family with one parameter, of which the nearest member "
            f"could be found; expected one of {', '.join(known)}, or a strategy that defines with_mean_age()"
        )
        raise ConfigError(message)
    return family


def _member(family: type[Strategy], age: float, steps: int) -> Strategy:
    member = family.with_mean_age(age, steps)
    if member is None:
        message = f"{family.__name__}.with_mean_age({age!r}, {steps!r}) returned None; expected a member of the family"
        raise ConfigError(message)
    return member


def _nearest(member: Callable[[float], Strategy], distance: Callable[[Strategy], float], steps: int) -> Strategy:
    """Return the nearest member: the best of a grid of ages, then golden sections of the ages next to it."""

    def at(age: float) -> float:
        return distance(member(age))

    grid = np.geomspace(_YOUNGEST, _OLDEST * steps, _GRID).tolist()
    best = min(range(_GRID), key=[at(age) for age in grid].__getitem__)
    low, high = math.log(grid[max(best - 1, 0)]), math.log(grid[min(best + 1, _GRID - 1)])
    left = 2
    while high - low > _CLOSE:
        sections = high - _GOLDEN * (high - low), low + _GOLDEN * (high - low)
        younger, older = map(math.exp, sections)
        if member(younger) == member(older):
            # Whole numbers are few, and all windows beyond the run are one: drop repetitions at the ends.
            if member(older) == member(math.exp(high)):
                high = sections[0]
            elif member(younger) == member(math.exp(low)):
                low = sections[1]
            else:
                left = _WHOLE
                break
        elif at(younger) <= at(older):
            high = sections[1]
        else:
            low = sections[0]
    return member(min((0.0, grid[best], *np.geomspace(math.exp(low), math.exp(high), left).tolist()), key=at))
