"""What each file counts: equal parts, given numbers, a strategy over their steps, or the shape of a decay."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from polyak.config import AveragerConfig
from polyak.errors import ArgumentError, ConfigError
from polyak.errors.formatting import listed, shown
from polyak.strategy.base import Strategy, settings_of
from polyak.strategy.frozen import Frozen
from polyak.strategy.numbers import as_number
from polyak.strategy.profile import Profile
from polyak.strategy.updates import Updates

if TYPE_CHECKING:
    from collections.abc import Callable

    from polyak.config.chosen import AnyStrategy

__all__ = ["WSM", "Weights", "as_chosen", "described", "growing", "shares_of", "wsm"]

_TOLERANCE = 1e-6
_SHAPES: dict[str, Callable[[float], float]] = {
    "linear": lambda x: 1.0 - x,
    "minus_sqrt": lambda x: 1.0 - math.sqrt(x),
    "cosine": lambda x: 0.5 * (1.0 + math.cos(math.pi * x)),
}


class WSM(Frozen):
    """Weights that stand in for a decay of the learning rate over the part of the run that the files cover.

    File j of files 0..n-1 counts ``w_j - w_{j+1}`` with ``w_0 = 1``, ``w_n = 0`` and ``w_i = f(i / n)``, where ``f`` is
    the shape of the decay. For plain SGD the average is then what that decay would have reached; ``"linear"`` is
    uniform.

    Source: Tian et al., "WSM: Decay-Free Learning Rate Schedule via Checkpoint Merging" (2025), arXiv:2507.17634.

    Often confused with: an average over a run whose learning rate was decayed already, which needs none of it.
    """

    decay: Literal["linear", "minus_sqrt", "cosine"] = "linear"
    """The shape of the decay: ``1 - x``, ``1 - sqrt(x)`` or ``(1 + cos(pi x)) / 2``."""


def wsm(decay: Literal["linear", "minus_sqrt", "cosine"] = "linear") -> WSM:
    """Return weights in the shape of a decay.

    Args:
        decay: The shape.

    Raises:
        ConfigError: If there is no such shape.

    Examples:
        >>> [round(share, 3) for share in shares_of(wsm("minus_sqrt"), [1, 2, 3, 4])]
        [0.5, 0.207, 0.159, 0.134]
    """
    return WSM(decay=decay)


Weights = str | Sequence[float] | WSM | Strategy | type[Strategy] | Mapping[str, Any]
"""``"uniform"``, numbers, ``wsm()``, or what names a strategy."""


def as_chosen(weights: Weights) -> list[float] | WSM | Strategy | None:
    """Return weights in their own type; None for uniform.

    Raises:
        ArgumentError: If they are something else.
        ConfigError: If a number, a name or a setting is wrong.
    """
    if isinstance(weights, str) and weights == "uniform":
        return None
    if isinstance(weights, str) and weights == "wsm":
        return WSM()
    if isinstance(weights, WSM):
        return weights
    if isinstance(weights, (str, Mapping, Strategy)) or (isinstance(weights, type) and issubclass(weights, Strategy)):
        chosen: AnyStrategy = weights
        return AveragerConfig.of({"strategy": chosen}, "weights").strategy
    if isinstance(weights, Sequence) or hasattr(weights, "__array__"):
        numbers = [as_number(one) for one in weights]
        if all(number is not None and math.isfinite(number) for number in numbers):
            return [float(number) for number in numbers if number is not None]
    message = f"weights: got {shown(weights)}; expected 'uniform', finite numbers, a strategy or polyak.files.wsm()"
    raise ArgumentError(message)


def shares_of(
    chosen: list[float] | WSM | Strategy | None, steps: Sequence[int | None], *, normalize: bool = False
) -> list[float]:
    """Return the weight of each file.

    Args:
        chosen: What ``as_chosen`` returned.
        steps: The step of each file.
        normalize: Whether given numbers are divided by their sum.

    Raises:
        ConfigError: If there are more or fewer numbers than files, they do not add up to 1, or a step is unknown.
    """
    count = len(steps)
    if chosen is None:
        return [1.0 / count] * count
    if isinstance(chosen, WSM):
        shape = _SHAPES[chosen.decay]
        kept = [1.0, *(shape(i / count) for i in range(1, count)), 0.0]
        return [kept[j] - kept[j + 1] for j in range(count)]
    if isinstance(chosen, list):
        return _given(chosen, count, normalize=normalize)
    return _of_strategy(chosen, growing(steps))


def growing(steps: Sequence[int | None]) -> list[int]:
    """Return steps, each larger than the one before.

    Raises:
        ConfigError: If one is unknown, or two are equal.
    """
    known = [step for step in steps if step is not None]
    if len(known) < len(steps) or any(b <= a for a, b in itertools.pairwise(known)):
        found = listed("unknown" if step is None else str(step) for step in steps)
        message = (
            f"the files are of the steps {found}; expected different, known ones: in trainer_state.json, a key such as "
            "'global_step', the metadata or the file's name"
        )
        raise ConfigError(message)
    return known


def described(chosen: list[float] | WSM | Strategy | None) -> Any:  # noqa: ANN401 - any plain value
    """Return weights in plain types."""
    if isinstance(chosen, Strategy):
        return settings_of(chosen)
    if isinstance(chosen, WSM):
        return {"name": "wsm", **chosen.model_dump()}
    return "uniform" if chosen is None else chosen


def _given(numbers: list[float], count: int, *, normalize: bool) -> list[float]:
    if len(numbers) != count:
        message = f"weights: got {len(numbers)} numbers for {count} files; give one for each"
        raise ConfigError(message)
    total = math.fsum(numbers)
    if normalize:
        if not abs(total) > 0:
            message = f"weights: {listed(map(str, numbers))} add up to {total:g}, by which none can be divided"
            raise ConfigError(message)
        return [number / total for number in numbers]
    if abs(total - 1.0) > _TOLERANCE:
        message = (
            f"weights: {listed(map(str, numbers))} add up to {total:.6g}; expected 1. Give such numbers, or "
            "normalize=True (--normalize)"
        )
        raise ConfigError(message)
    return numbers


def _of_strategy(strategy: Strategy, steps: list[int]) -> list[float]:
    """Return the shares of a strategy whose first update is the first file, which replaces whatever was before.

    They are those of an averager with ``origin="first"`` whose ``every`` is the distance of the first two files: it
    stands for the distance before the first one, too.
    """
    stride = steps[1] - steps[0] if len(steps) > 1 else 1
    updates = Updates(np.array(steps, np.int64), stride, counted=False)
    return [float(share) for share in Profile.at(strategy, updates, "first").shares]
