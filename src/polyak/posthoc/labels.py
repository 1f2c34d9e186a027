"""What a target is called in tables and warnings."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from polyak.config import AveragerConfig
from polyak.config.chosen import plain_mapping
from polyak.strategy.base import Strategy
from polyak.strategy.profile import Profile

if TYPE_CHECKING:
    from collections.abc import Mapping

__all__ = ["label"]


def label(target: str | Strategy | Mapping[str, Any] | AveragerConfig | Profile, number: int = 1) -> str:
    """Return the name of a target with its settings; a profile has a number."""
    if isinstance(target, Profile):
        return f"profile {number}"
    if isinstance(target, str):
        return target
    own = _settings(target.named() if isinstance(target, AveragerConfig) else plain_mapping(target))
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
