"""Which of the files: the last ones, the best ones, those until a step."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from itertools import pairwise
from typing import TYPE_CHECKING, Any, Literal

from polyak.errors import ConfigError, MissingFileError
from polyak.errors.formatting import listed, shown
from polyak.files.weights import growing
from polyak.strategy.numbers import given_integer

if TYPE_CHECKING:
    import os
    from collections.abc import Sequence

    from polyak.files.checkpoint import Checkpoint

__all__ = ["selected"]

_LARGEST = 1 << 24


def selected(
    checkpoints: Sequence[Checkpoint],
    *,
    last: int | None,
    best: int | None,
    metrics: Mapping[str, float] | str | os.PathLike[str] | None,
    mode: Literal["min", "max"],
    until: int | None,
    by_step: bool,
) -> list[Checkpoint]:
    """Return some of the files, in the order of their steps where that matters.

    Args:
        checkpoints: The files.
        last: So many of the largest steps. Defaults to all.
        best: So many of the best metric. Defaults to all.
        metrics: A number for each file: by its path, its name, its name without type, or its step; or a JSON file.
        mode: Whether a small number is good, or a large one.
        until: The largest step. Defaults to any.
        by_step: Whether the weights depend on the order of the steps.

    Raises:
        ConfigError: If a number is out of range, or a step or a metric is unknown.
    """
    if last is not None and best is not None:
        message = "last and best exclude each other; give one of them"
        raise ConfigError(message)
    if (best is None) != (metrics is None):
        message = "best needs metrics (--metrics m.json), a number for each file, and metrics need best (--best 5)"
        raise ConfigError(message)
    chosen = [*checkpoints]
    if until is not None:
        until = given_integer("until", until, 0)
        chosen = [one for one in _by_step(chosen) if one.step is not None and one.step <= until]
        if not chosen:
            message = f"until: no file is of step {until} or an earlier one; they begin at {_steps(checkpoints)}"
            raise ConfigError(message)
    if best is not None and metrics is not None:
        chosen = _best(chosen, given_integer("best", best, 1), _table(metrics), mode)
    if last is not None:
        chosen = _by_step(chosen)[-given_integer("last", last, 1) :]
    return _by_step(chosen) if by_step else chosen


def _by_step(checkpoints: Sequence[Checkpoint]) -> list[Checkpoint]:
    found = sorted(checkpoints, key=lambda one: -1 if one.step is None else one.step)
    for one, other in pairwise(found):
        if one.step is not None and one.step == other.step:
            message = f"{one.path.name!r} and {other.path.name!r} are both of step {one.step}; leave one of them out"
            raise ConfigError(message)
    growing([one.step for one in found])
    return found


def _steps(checkpoints: Sequence[Checkpoint]) -> str:
    return str(min(one.step for one in checkpoints if one.step is not None))


def _best(checkpoints: list[Checkpoint], count: int, table: Mapping[str, Any], mode: str) -> list[Checkpoint]:
    if mode not in {"min", "max"}:
        message = f"mode: got {shown(mode)}; expected 'min' or 'max'"
        raise ConfigError(message)
    numbers = [_metric(one, table) for one in checkpoints]
    sign = 1.0 if mode == "min" else -1.0
    order = sorted(range(len(checkpoints)), key=lambda i: (sign * numbers[i], i))
    return [checkpoints[i] for i in sorted(order[:count])]


def _metric(checkpoint: Checkpoint, table: Mapping[str, Any]) -> float:
    path = checkpoint.path
    stem = path.name.removesuffix(".tar").rpartition(".")[0] or path.name
    for key in (str(path), path.as_posix(), path.name, stem, str(checkpoint.step)):
        if key in table:
            value = table[key]
            if isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value):
                return float(value)
            message = f"the metric of {path.name!r} is {shown(value)}; expected a finite number"
            raise ConfigError(message)
    known = listed(map(repr, list(table)[:6]))
    message = f"the metrics have no number for {path.name!r}; there are {known or 'none'}. Name them like the files"
    raise ConfigError(message)


def _table(metrics: Mapping[str, float] | str | os.PathLike[str]) -> Mapping[str, Any]:
    if isinstance(metrics, Mapping):
        return {str(key): value for key, value in metrics.items()}
    from polyak.io.atomic import as_path, open_regular

    file = as_path(metrics, "metrics")
    try:
        with open_regular(file) as opened:
            found = json.loads(opened.read(_LARGEST))
    except FileNotFoundError:
        message = f"there is no file {str(file)!r} of metrics"
        raise MissingFileError(message) from None
    except (OSError, ValueError, RecursionError) as error:
        message = f"the metrics in {str(file)!r} cannot be read: {error}"
        raise ConfigError(message) from error
    if not isinstance(found, dict):
        message = f"{str(file)!r} holds {shown(found)}; expected a table of file names and numbers"
        raise ConfigError(message)
    return found
