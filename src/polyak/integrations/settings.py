"""What every integration takes: a strategy with its settings and all options of ``polyak.average``, or a config."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from polyak.config.factory import config_of
from polyak.engine.options import Options

if TYPE_CHECKING:
    import os
    from collections.abc import Mapping

    from polyak.config import AveragerConfig
    from polyak.config.chosen import AnyStrategy

__all__ = ["chosen"]


def chosen(
    strategy: AnyStrategy | AveragerConfig | os.PathLike[str], given: Mapping[str, Any], where: str
) -> AveragerConfig:
    """Return the config that a strategy, a config or its file makes with what was given by name.

    Args:
        strategy: What ``polyak.average`` takes.
        given: Options of ``polyak.average`` and settings of the strategy.
        where: What is configured, for messages.

    Raises:
        ConfigError: If a file cannot be read, or a name or a value is wrong.
    """
    options = {name: value for name, value in given.items() if name in Options.model_fields}
    settings = {name: value for name, value in given.items() if name not in options}
    return config_of(strategy, options, settings, f"{where}: the settings")
