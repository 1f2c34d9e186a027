"""What the parts of an engine share: its settings, its state and its hold on a model."""

from __future__ import annotations

from types import MappingProxyType
from typing import TYPE_CHECKING

from polyak.engine.binding import Binding
from polyak.engine.cadence import Progress
from polyak.engine.history import History
from polyak.engine.holds import Holds
from polyak.engine.nonfinite import looks
from polyak.engine.options import Options
from polyak.engine.settings import Settings
from polyak.engine.state import State
from polyak.engine.writes import writes
from polyak.errors.calls import warn_user
from polyak.strategy.base import settings_of
from polyak.tensors.generators import OwnGenerators
from polyak.tensors.modes import Untracked

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from contextlib import AbstractContextManager

    from torch import Tensor

    from polyak.engine.plan.plan import Plan
    from polyak.engine.unsettled import Unsettled
    from polyak.strategy.base import Strategy
    from polyak.strategy.profile import Profile
    from polyak.tensors.adapter import Adapter
    from polyak.tensors.entries import Given
    from polyak.tensors.home import Home

__all__ = ["Core"]


class Core:
    """The settings, the state and the binding of one averager.

    Args:
        strategy: The strategy.
        options: The engine's options, completed by the strategy.
        binding: The hold on a model.
        state: The state to start from.
        knows: Whether a strategy's name can be resolved here; a state of an unknown one loads all the same.

    Attributes:
        pending: The update that another thread is making, or whose weights only their device has looked at.
        warned: The kinds of warnings that were given.
        holds: What the updates held.
        built: How often each tensor had been written to at construction. None once a state was loaded.
    """

    def __init__(
        self, strategy: Strategy, options: Options, binding: Binding, state: State, knows: Callable[[str], bool] = bool
    ) -> None:
        self.strategy, self.options, self.binding, self.knows = strategy, options, binding, knows
        self.pending: Unsettled | None = None
        self.warned: set[str] = set()
        self.holds = Holds()
        self.built: list[int] | None = None
        self._settled = state

    @classmethod
    def of(
        cls,
        model: Given,
        strategy: Strategy,
        options: Options | None,
        knows: Callable[[str], bool],
        adapter: Adapter | None,
        home: Home | None = None,
    ) -> Core:
        """Return the core of a new averager of a model.

        Raises:
            ModelError: If the model has nothing that can be averaged.
            ConfigError: If a glob matches no tensor, or the strategy's settings cannot be saved.
        """
        settings_of(strategy)  # refused now, and not when a state is saved
        options = (options or Options()).completed(strategy)
        binding = Binding(model, options, adapter, home)
        stored = binding.allocate(strategy.slots())
        state = State(stored, Progress(), History(), skipped=0, generators=OwnGenerators(seed=options.seed or 0))
        core = cls(strategy, options, binding, state, knows)
        core.built = None if binding.plan is None else writes(binding.plan.live)
        return core

    @property
    def state(self) -> State:
        """All that changes; waits for an update that is pending."""
        self.synchronize()
        return self._settled

    @state.setter
    def state(self, state: State) -> None:
        self._settled = state

    @property
    def lock(self) -> AbstractContextManager[object]:
        """What a thread holds while it updates, saves or loads the average."""
        return self.binding.lock

    @property
    def checks(self) -> bool:
        """Whether updates look at the weights, and are not made where these are not finite."""
        return looks(self.options.nonfinite)

    @property
    def holding(self) -> bool:
        """Whether elements keep their old value where the new one would not be finite."""
        return self.options.nonfinite == "hold"

    @property
    def settings(self) -> Settings:
        """The strategy, the options, and what was changed since they were built."""
        return Settings(self.strategy, self.options, self.state.history.changes)

    @settings.setter
    def settings(self, settings: Settings) -> None:
        self.strategy, self.options, self.state.history.changes = settings
        self.binding.follow(settings.options)

    def synchronize(self) -> None:
        """Wait for an update that is pending."""
        if self.pending is not None:
            with self.lock:  # of several threads that wait one calls the listeners
                if (pending := self.pending) is not None:
                    pending.wait()

    def current(self) -> Plan:
        """Return the plan of the averager's own model, for reading the average through it."""
        self.settle()
        if self.binding.depth and self.binding.plan is not None:
            return self.binding.plan
        return self.binding.planned(self.binding.own(), self.state)

    def settle(self) -> None:
        """Copy the weights over an average that its first update will replace: until then they are the average."""
        state, root = self.state, self.binding.model
        if self.binding.home is not None:  # the user's tensors are the average as they are
            self.binding.rehouse(state)
            return
        if self.options.origin != "first" or state.progress.n or root is None or self.binding.holds_average(root):
            return
        plan = self.binding.planned(root, state)
        with Untracked():
            plan.moves.replace(state.generators, self.options.nonfinite)

    def averages(self) -> Mapping[str, Tensor]:
        """Return the tensors that hold the average now, by name; read-only."""
        self.settle()
        stored = self.state.stored
        holding = self.binding.holding(stored)
        return MappingProxyType({s.name: s.whole(t) for s, t in zip(stored, holding, strict=True)})

    def profile(self) -> Profile:
        """Return the share of each update and of the start."""
        self.holds.settle()
        return self.state.history.profile(self.strategy, self.state.progress.averaged, self.options.start)

    def warn(self, kind: str, message: str) -> None:
        """Warn of one kind of thing, once, at the user's line."""
        if kind not in self.warned:
            self.warned.add(kind)
            warn_user(message)
