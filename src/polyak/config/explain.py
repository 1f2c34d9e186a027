"""What is wrong with a config, in words: where, what was got, what is allowed, and the nearest known name."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from polyak.engine.options import Options
from polyak.errors.formatting import listed
from polyak.errors.hints import habit
from polyak.registry import registry
from polyak.strategy.base import Strategy
from polyak.strategy.frozen import line, nearest

if TYPE_CHECKING:
    from pydantic import ValidationError
    from pydantic_core import ErrorDetails

__all__ = ["explain"]

_OPTIONS = sorted([*Options.model_fields, "strategy"])


def explain(error: ValidationError, data: Mapping[str, Any]) -> list[str]:
    """Return a line for each thing that is wrong with ``data``."""
    strategy = _strategy(data)
    settings = sorted(strategy.model_fields) if strategy else []

    def option(key: str) -> str:
        meant = "" if key in settings else habit(key, [*_OPTIONS, *settings])
        if key in settings or any(repr(name) in meant for name in settings if name not in _OPTIONS):
            return f"{meant} It is a setting of the strategy: write it next to the strategy's name, inside 'strategy'."
        return f"{meant or nearest(key, _OPTIONS)} Known: {listed(_OPTIONS)}."

    def setting(key: str) -> str:
        if key in _OPTIONS:
            return f" {key!r} is an option of the averager: move it out of 'strategy'."
        hint = nearest(key, [*settings, *_OPTIONS])
        others = [name for name, cls in registry().strategies().items() if key in cls.model_fields]
        if not hint and others:
            hint = f" It is a setting of {listed(map(repr, others))}."
        return f"{hint} Known: {listed(settings)}."

    return [
        line(detail, setting if len(detail["loc"]) > 1 else option) + _part_of_run(detail) for detail in error.errors()
    ]


def _part_of_run(detail: ErrorDetails) -> str:
    start = detail["input"]
    if detail["loc"] != ("start",) or not isinstance(start, float) or not 0 < start < 1:
        return ""
    return (
        f" A part of the run works on the command line only, where its length is known (polyak profile, sweep). "
        f"Here give the optimiser step: start=round({start} * steps) + 1."
    )


def _strategy(data: Mapping[str, Any]) -> type[Strategy] | None:
    given = data.get("strategy", "ema")
    if isinstance(given, Strategy):
        return type(given)
    if isinstance(given, type) and issubclass(given, Strategy):
        return given
    name = given.get("name") if isinstance(given, Mapping) else given
    return registry().resolve(name) if isinstance(name, str) else None
