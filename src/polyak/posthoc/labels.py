"""What a target is called in tables and warnings."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from polyak.config import AveragerConfig
from polyak.config.chosen import AnyStrategy, plain_mapping
from polyak.errors.formatting import shown
from polyak.strategy.base import Strategy
from polyak.strategy.profile import Profile

__all__ = ["label"]


def label(target: AnyStrategy | AveragerConfig | Profile, number: int = 1) -> str:
    """Return the name of a target with its settings, and in short what is none; a profile has a number."""
    if isinstance(target, Profile):
        return f"profile {number}"
    if isinstance(target, str):
        return target
    if isinstance(target, type) and issubclass(target, Strategy):
        return str(target.model_fields["name"].default)
    plain = target.named() if isinstance(target, AveragerConfig) else plain_mapping(target)
    if not isinstance(plain, (Strategy, Mapping)):
        return shown(target)
    own = _settings(plain)
    name = own.pop("name", "ema")
    return f"{name}({', '.join(f'{key}={_short(value)}' for key, value in own.items())})"


def _short(value: object) -> str:
    return repr(value) if isinstance(value, float) else str(value)


def _settings(target: Strategy | Mapping[str, Any]) -> dict[str, Any]:
    """Return the name and all settings of a target in one mapping, however deep it says them."""
    if isinstance(target, Strategy):
        return {"name": target.name, **target.model_dump(exclude_unset=True, exclude={"name"})}
    own = dict(target)
    inner = own.pop("strategy", None)
    if inner is None:
        return own
    return {**({"name": inner} if isinstance(inner, str) else _settings(inner)), **own}
