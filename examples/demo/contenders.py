"""The averages that the demo compares: every installed strategy, or those that the user names."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import polyak
from demo.training import network
from polyak import AveragerConfig, ConfigError, PolyakError

HALF_LIFE = 0.05
"""About the half-life that the demo gives to every decay, as a part of the run. The libraries' own defaults (0.999,
0.9999) are made for runs of 100 000 steps; after a few hundred such an average is still mostly the untrained start."""


@dataclass(frozen=True)
class Contender:
    """One average under comparison.

    Attributes:
        label: What the table and the picture call it.
        config: How to build it; None where the demo cannot.
        problem: Why it cannot.
    """

    label: str
    config: AveragerConfig | None
    problem: str = ""

    @property
    def settings(self) -> str:
        """What was chosen for this run, in words; where nothing was, the strategy's defaults."""
        if self.config is None:
            return ""
        options = self.config.model_dump(exclude_unset=True, exclude={"strategy"})
        chosen = self.config.strategy.model_dump(exclude_unset=True, exclude={"name"}) | options
        defaults = self.config.strategy.model_dump(exclude={"name"})
        words = [f"{key}={_short(value)}" for key, value in (chosen or defaults).items()]
        return " ".join(words if chosen or not defaults else [*words, "(default)"])


def every_strategy(total: int) -> list[Contender]:
    """Return one contender for each installed strategy, with settings that suit a run of ``total`` steps."""
    return [_fitting(name, total) for name in polyak.strategies()]


def named(names: list[str], settings: Mapping[str, Any], total: int) -> list[Contender]:
    """Return the strategies of these names, with ``settings`` in place of the demo's own.

    Raises:
        ConfigError: An unknown name, or a setting that one of them does not have.
    """
    return [_contender(name, {**_suited(name, total), **settings}) for name in names]


def from_files(paths: list[str]) -> list[Contender]:
    """Return the averages in config files, as they are.

    Raises:
        ConfigError: A file that is missing or wrong.
    """
    return [_tried(Contender(Path(path).name, AveragerConfig.from_file(path))) for path in paths]


def parsed(pairs: list[str]) -> dict[str, Any]:
    """Return the settings in ``KEY=VALUE`` pairs; a value is JSON (0.99, true, "text"), or else a text.

    Raises:
        ConfigError: There is no ``=``, or the key is what ``--strategy`` decides.
    """
    settings: dict[str, Any] = {}
    for pair in pairs:
        key, equals, value = pair.partition("=")
        if not equals or not key.strip():
            message = f"--set {pair}: expected KEY=VALUE, such as --set decay=0.99"
            raise ConfigError(message)
        if key.strip() in {"name", "strategy"}:
            message = f"--set {pair}: choose the strategy with --strategy {value}"
            raise ConfigError(message)
        try:
            settings[key.strip()] = json.loads(value)
        except ValueError:
            settings[key.strip()] = value.strip()
    return settings


def _fitting(name: str, total: int) -> Contender:
    try:
        return _contender(name, _suited(name, total))
    except PolyakError:
        pass  # it gives a name that we know another meaning
    try:
        return _contender(name, {})
    except PolyakError as error:
        return Contender(name, None, f"not run, the demo cannot guess its settings: {error}")


def _suited(name: str, total: int) -> dict[str, Any]:
    """Return settings for a run of ``total`` steps, by the names of the fields; a plugin's have them too."""
    if name == "swa":
        return {"start": round(0.75 * total)}  # as in its paper
    if name == "lawa":
        return {"every": max(1, total // 40)}  # its ten snapshots are spread over the last quarter
    fields = polyak.strategies()[name].model_fields if name in polyak.strategies() else {}
    rate = 1 - 0.5 ** (1 / max(1, HALF_LIFE * total))
    suited: dict[str, Any] = {
        "decay": 1 - float(f"{rate:.2g}"), "steps": total, "use_warmup": True, "halflife": HALF_LIFE * total,
        "length": max(1, total // 10),
    }  # fmt: skip
    return {key: value for key, value in suited.items() if key in fields}


def _contender(name: str, settings: Mapping[str, Any]) -> Contender:
    options = {key: value for key, value in settings.items() if key in AveragerConfig.model_fields}
    own = {key: value for key, value in settings.items() if key not in options}
    data = {**options, "strategy": {**own, "name": name}}
    return _tried(Contender(name, AveragerConfig.of(data, f"the settings of {name!r}")))


def _tried(contender: Contender) -> Contender:
    # What fits no network of the demo, such as a glob that matches nothing, is known before the training.
    if contender.config:
        contender.config.build(network())
    return contender


def _short(value: object) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)
