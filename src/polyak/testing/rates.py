"""What can be said of a strategy by itself, in plain arithmetic: the oracle for everything the engine does with it."""

from __future__ import annotations

import math
from numbers import Real
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from polyak.errors import RateError
from polyak.strategy.clock import Clock
from polyak.strategy.profile import Profile

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from polyak.strategy.base import Strategy

__all__ = ["ROUNDING", "UPDATES", "Case", "expected", "learning_rate", "rates_are_shares", "require"]

UPDATES = 40
ROUNDING = 1e-14
"""Some ten roundings of float64, for values near 1."""
_LONG = 2000
_PEAK, _WARMUP, _RUN = 0.1, 5, 100


class Case(NamedTuple):
    """A strategy under test, and the learning rates it is given."""

    strategy: Strategy
    lr: Callable[[int], float]


def require(condition: object, message: str) -> None:
    """Raise an ``AssertionError`` unless the condition holds; unlike ``assert``, also under ``python -O``."""
    if not condition:
        raise AssertionError(message)


def learning_rate(step: int) -> float:
    """Return the learning rate that the checks give at a step: a warm-up from 0 to about 0.1, and down a cosine to 0.

    Both ends are 0, as many real schedules have it: a strategy that uses the learning rate must live with that.

    Examples:
        >>> [round(learning_rate(step), 3) for step in (1, 2, 6, 51, 101, 500)]
        [0.0, 0.02, 0.099, 0.05, 0.0, 0.0]
    """
    done = min(max(step - 1, 0), _RUN)
    return _PEAK * min(done / _WARMUP, (1 + math.cos(math.pi * done / _RUN)) / 2)


def rates_are_shares(case: Case) -> None:
    """Law 1 without the engine: long runs, strides, steps from 0, late starts, steps that jump, no learning rate."""
    expected(case, range(1, _LONG))
    expected(case, range(7, 7 * UPDATES, 7), stride=7)
    expected(case, range(UPDATES), counted=False)
    expected(case, range(_LONG, _LONG + UPDATES), counted=False, replaces=True)
    expected(case, [3, 10, 11, 50, 1000], counted=False)
    clock = Clock(n=2, step=2, mass=1.0)
    try:
        case.strategy.rate(clock)
    except RateError:
        pass
    except Exception as error:
        message = f"{_failed('rate', clock, error)}; a strategy that needs the learning rate raises polyak.RateError"
        raise AssertionError(message) from error


def expected(
    case: Case, steps: Sequence[int], *, stride: int = 1, counted: bool = True, replaces: bool | None = None
) -> Profile:
    """Return the profile after updates at these steps, from the strategy alone.

    Args:
        case: The strategy and its learning rates.
        steps: The optimiser step of each update.
        stride: The steps that the first update represents.
        counted: Whether the averager counts the steps.
        replaces: Whether the first update replaces the start. Defaults to the strategy's own choice.
    """
    if replaces is None:
        replaces = case.strategy.engine().get("origin") == "first"
    rates: list[float] = []
    mass, elapsed, last = 0.0, 0, steps[0] - stride
    for n, step in enumerate(steps, 1):
        elapsed += step - last
        moment = {"n": n, "step": step, "stride": step - last, "elapsed": elapsed}
        clock = Clock(**moment, lr=case.lr(step), mass=mass, counted=counted)
        rates.append(1.0 if replaces and n == 1 else _asked(case.strategy, "rate", clock, 1.0))
        mass += _asked(case.strategy, "weight", clock, math.inf)
        last = step
    shares = case.strategy.shares(np.array(rates))
    profile = Profile(shares.updates, np.arange(1, len(rates) + 1), shares.start)
    total = profile.start + profile.shares.sum()
    require(abs(total - 1) <= ROUNDING * math.sqrt(len(rates)), f"the shares add up to {total!r}; expected 1")
    return profile


def _asked(strategy: Strategy, method: str, clock: Clock, most: float) -> float:
    try:
        value, again = getattr(strategy, method)(clock), getattr(strategy, method)(clock)
    except Exception as error:
        raise AssertionError(_failed(method, clock, error)) from error
    number = isinstance(value, Real) and math.isfinite(value) and 0 <= float(value) <= most
    require(number, f"{method}() returned {value!r} at {clock}; expected a finite number in [0, {most:g}]")
    same = f"{method}() returned {value!r} and then {again!r} at one {clock}; it may depend on that alone"
    require(value == again, same)
    return float(value)


def _failed(method: str, clock: Clock, error: Exception) -> str:
    return f"{method}() raised {type(error).__name__}: {error} at {clock}"
