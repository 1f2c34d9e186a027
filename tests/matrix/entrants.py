"""Who runs side by side on one model: polyak, once for each set of options, and every library that has the strategy."""

from __future__ import annotations

import math
from itertools import count
from typing import TYPE_CHECKING, Any

import polyak

from .subjects import LIBRARIES

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from torch import Tensor, nn

    from .subjects import Library, Setup

DEFAULTS: dict[str, Any] = {}


def learning_rate(step: int) -> float:
    """Return the learning rate that strategies are told."""
    return 0.1 * (1 + math.cos(step / 5)) + 0.01


class Entrants:
    """All averages of one model by one strategy.

    Attributes:
        setups: How each library is asked, by its name; where it is not able, why.
        updates: One update of each, by name; each counts its steps.
    """

    def __init__(self, model: nn.Module, strategy: polyak.Strategy) -> None:
        self._model = model
        self.setups = {library.distribution: library.setup(strategy) for library in LIBRARIES}
        self.updates: dict[str, Callable[[], None]] = {}
        self._averagers: dict[str, polyak.Averager] = {}
        self._theirs: dict[str, tuple[Library, Any]] = {}
        able = [setup for setup in self.setups.values() if not isinstance(setup, str)]
        for options in (DEFAULTS, *(setup.ours for setup in able)):
            self._enter_polyak(strategy, options)
        for library in LIBRARIES:
            setup = self.setups[library.distribution]
            if not isinstance(setup, str):
                self._enter(library, setup)

    def _enter_polyak(self, strategy: polyak.Strategy, options: Mapping[str, Any]) -> None:
        averager, steps = polyak.average(self._model, strategy, **options), count(1)

        def update() -> None:
            step = next(steps)
            averager.update(step=step, lr=learning_rate(step))

        self._averagers[key(options)] = averager
        self.updates[key(options)] = update

    def _enter(self, library: Library, setup: Setup) -> None:
        average, steps = library.start(setup, self._model), count(1)

        def update() -> None:
            library.update(average, self._model, next(steps) if setup.stepped else None)

        self._theirs[library.distribution] = library, average
        self.updates[library.distribution] = update

    def ours(self, options: Mapping[str, Any]) -> dict[str, Tensor]:
        """Return polyak's average with these options, under every name."""
        averager = self._averagers[key(options)]
        return {**averager.averages, **averager.averaged_state_dict()}

    def theirs(self, name: str) -> Mapping[str, Tensor]:
        """Return what a library promises to keep."""
        library, average = self._theirs[name]
        return library.averages(average, self._model)

    def unbuffered(self, name: str) -> bool:
        """Return whether a library leaves out buffers that the model has."""
        return not self._theirs[name][0].buffers and any(True for _ in self._model.buffers())


def key(options: Mapping[str, Any]) -> str:
    """Return the name of polyak with these options."""
    return f"polyak {dict(options)}"
