"""The ways to name a strategy, alone or with options: everything that takes one takes all of them."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Mapping, Sequence
from dataclasses import fields, is_dataclass
from typing import Any

from torch import Tensor, nn

from polyak.errors import ArgumentError, ConfigError
from polyak.errors.formatting import listed, shown, type_name
from polyak.strategy.base import Strategy

__all__ = ["AnyStrategy", "plain_mapping", "refuse_swapped", "whole", "written"]

_DEEPEST = 32

AnyStrategy = str | Strategy | type[Strategy] | Mapping[str, Any]
"""A name, an object, a class, or a mapping of a name and settings.

Wherever a mapping is taken, so are an ``argparse.Namespace``, a dataclass, and the containers of OmegaConf.
"""


def plain_mapping(value: object, depth: int = 0) -> Any:  # noqa: ANN401 - anything that is no mapping comes back as it is
    """Return a dictionary of what other libraries keep settings in, and everything else as it is.

    Raises:
        ConfigError: If settings are nested too deep, as a mapping in itself is.
    """
    if depth > _DEEPEST:
        message = "the settings have too many values within one another; expected two or three levels"
        raise ConfigError(message)
    if isinstance(value, Namespace):
        value = vars(value)
    elif is_dataclass(value) and not isinstance(value, type):
        value = {field.name: getattr(value, field.name) for field in fields(value)}
    if isinstance(value, Mapping) and not any(isinstance(tensor, Tensor) for tensor in value.values()):
        return {key: plain_mapping(part, depth + 1) for key, part in value.items()}
    if isinstance(value, Sequence) and not isinstance(value, (str, bytes, tuple, list)):
        return [plain_mapping(part, depth + 1) for part in value]
    return value


def whole(value: object) -> Any:  # noqa: ANN401 - what is neither comes back as it is
    """Return the data of a config: a mapping with "strategy" and options, also where a strategy alone is given."""
    value = plain_mapping(value)
    named = isinstance(value, Mapping) and "name" in value and "strategy" not in value
    is_class = isinstance(value, type) and issubclass(value, Strategy)
    return {"strategy": value} if named or is_class or isinstance(value, (str, Strategy)) else value


def written(strategy: AnyStrategy, settings: Mapping[str, Any]) -> Mapping[str, Any] | Strategy:
    """Return a strategy in the form that a config takes.

    Args:
        strategy: A name, a class, a mapping or an object.
        settings: Settings given together with a name, a class or a mapping.

    Raises:
        ArgumentError: If ``strategy`` is something else.
        ConfigError: If settings are given together with an object, or a name is given twice.
    """
    strategy = plain_mapping(strategy)
    if isinstance(strategy, Strategy):
        if settings:
            message = (
                f"the settings {listed(map(repr, sorted(settings)))} came with the object {shown(strategy)}; "
                "set them on it instead"
            )
            raise ConfigError(message)
        return strategy
    if isinstance(strategy, type) and issubclass(strategy, Strategy):
        return strategy(**settings)
    if not isinstance(strategy, (str, Mapping)):
        message = (
            "a strategy is a name such as 'ema', a mapping with a 'name', a class or an object such as polyak.EMA(), "
            f"or a whole config; got {shown(strategy)}"
        )
        raise ArgumentError(message)
    if "name" in settings:
        message = f"name={shown(settings['name'])} came with the strategy {shown(strategy)}; give one of them"
        raise ConfigError(message)
    return {**({"name": strategy} if isinstance(strategy, str) else strategy), **settings}


def refuse_swapped(call: str, model: object, other: object) -> None:
    """Refuse a model in the place of the strategy.

    Raises:
        ArgumentError: If it is there.
    """
    if _is_model(other) and not _is_model(model):
        message = (
            f"{call}() got {shown(model)} as the model and a {type_name(other)} after it: are the arguments "
            f"swapped? The model comes first: polyak.{call}(model, ...)"
        )
        raise ArgumentError(message)


def _is_model(value: object) -> bool:
    return isinstance(value, nn.Module) or (
        isinstance(value, Mapping) and bool(value) and all(isinstance(tensor, Tensor) for tensor in value.values())
    )
