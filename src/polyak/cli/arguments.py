"""What is written on the command line about averages: ``NAME KEY=VALUE ...``, several of them with ``+`` between."""

from __future__ import annotations

import json
import math
from itertools import product
from typing import TYPE_CHECKING, Any

from polyak.config import AveragerConfig
from polyak.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from polyak.strategy.profile import Profile

__all__ = ["average_at", "check_steps", "grid", "named", "settings", "split", "with_start"]

_CADENCE = ("start", "every", "origin")
_LARGEST = 10_000  # combinations of a grid
_LONGEST = 50_000_000  # a profile counts every single step


def split(words: Iterable[str]) -> list[list[str]]:
    """Return the words between the plus signs.

    Raises:
        ConfigError: If a strategy between two separators, before the first or after the last one is missing.
    """
    groups: list[list[str]] = [[]]
    for word in words:
        if word == "+":
            groups.append([])
        else:
            groups[-1].append(word)
    if not all(groups):
        message = "expected an average on both sides of '+', as in: ema decay=0.999 + swa start=0.75"
        raise ConfigError(message)
    return groups


def named(words: Sequence[str]) -> dict[str, Any]:
    """Return the config in ``NAME KEY=VALUE ...``.

    Raises:
        ConfigError: If the first word is not a name, or another one is not a ``KEY=VALUE``.
    """
    name, *others = words
    if "=" in name:
        message = f"got {name!r} where an average begins; expected NAME KEY=VALUE ..., as in: ema decay=0.999"
        raise ConfigError(message)
    return {"name": name, **settings(others)}


def settings(words: Iterable[str]) -> dict[str, Any]:
    """Return the settings in ``KEY=VALUE`` words; a value is JSON, a number, or else text.

    Raises:
        ConfigError: If a word is not such a pair, or a key is given twice.
    """
    found: dict[str, Any] = {}
    for word in words:
        key, text = _pair(word)
        if key in found:
            message = f"{key!r} is given twice: {found[key]!r} and {text!r}; give it once"
            raise ConfigError(message)
        found[key] = _value(text)
    return found


def grid(words: Iterable[str]) -> list[dict[str, Any]]:
    """Return every combination of the settings in ``KEY=VALUE,VALUE,...`` words.

    Raises:
        ConfigError: If a word is no such list, a key is given twice, or there are too many combinations.
    """
    axes: dict[str, list[Any]] = {}
    for word in words:
        key, text = _pair(word)
        if key in axes:
            message = f"--grid has {key!r} twice; give all its values once, as in {key}=V1,V2"
            raise ConfigError(message)
        axes[key] = [_value(one) for one in text.split(",")]
    if (count := math.prod(map(len, axes.values()))) > _LARGEST:
        message = f"--grid has {count:,} combinations; expected at most {_LARGEST:,}. Give fewer values"
        raise ConfigError(message)
    return [dict(zip(axes, chosen, strict=True)) for chosen in product(*axes.values())]


def with_start(config: Mapping[str, Any], steps: int) -> dict[str, Any]:
    """Return a config whose ``start``, where it is a fraction of the run, is a step: the first one after that part."""
    start = config.get("start")
    if isinstance(start, float) and 0 < start < 1:
        return {**config, "start": round(start * steps) + 1}
    return dict(config)


def average_at(words: Sequence[str], steps: int, every: int) -> Profile:
    """Return the profile of a written average at the end of a run.

    Raises:
        ConfigError: If a name or a setting is wrong, or an average has no updates.
    """
    config = with_start(named(words), steps)
    cadence = {"every": every, **{key: config.pop(key) for key in _CADENCE if key in config}}
    where = repr(" ".join(words))
    profile = AveragerConfig.of({**cadence, "strategy": config}, where).profile(steps)
    if not len(profile):
        message = f"{where} has no update in {steps} steps; check start= and every="
        raise ConfigError(message)
    return profile


def check_steps(steps: int) -> None:
    """Refuse a text that is not a length of a run.

    Raises:
        ConfigError: If the text is not a number of steps.
    """
    if not 1 <= steps <= _LONGEST:
        message = (
            f"--steps: got {steps}; expected the optimiser steps of the run, from 1 to {_LONGEST:,}. Of a longer run, "
            "take a part of it and the same part of every half-life"
        )
        raise ConfigError(message)


def _pair(word: str) -> tuple[str, str]:
    key, equals, text = word.partition("=")
    if not (key and equals and text):
        message = f"got {word!r}; expected KEY=VALUE, as in decay=0.999"
        raise ConfigError(message)
    if key == "name":
        message = f"got {word!r}; expected a setting. Give the name of the strategy in its own place"
        raise ConfigError(message)
    return key, text


def _value(text: str) -> Any:  # noqa: ANN401 - JSON
    for read in (json.loads, float):  # JSON has no .5
        try:
            return read(text)
        except (ValueError, RecursionError):
            pass
    return text
