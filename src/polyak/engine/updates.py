"""The engine's half that takes weights in: updates now, beside the training, or in a graph."""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING, Any

import torch
from typing_extensions import override

from polyak.engine.averager import Averager
from polyak.engine.binding import Binding
from polyak.engine.cadence import Progress, given_lr, tick
from polyak.engine.cuda_graphs import Captured, recording, refuse_recording
from polyak.engine.history import History
from polyak.engine.options import Options
from polyak.engine.pending import LOOK, Seen, Turn, doubt_weights, replaces_start
from polyak.engine.sources import WithSources, writes
from polyak.engine.state import State
from polyak.engine.transaction import Background, alone, carry_out, whole
from polyak.errors import AppliedError, ConfigError, MismatchError, PolyakWarning
from polyak.errors.calls import refuse_arguments
from polyak.strategy.base import checked_moves, checked_rate, checked_weight, settings_of
from polyak.strategy.clock import WatchedClock
from polyak.tensors.generators import OwnGenerators
from polyak.tensors.modes import Untracked

if TYPE_CHECKING:
    from collections.abc import Callable
    from contextlib import AbstractContextManager

    from polyak.engine.plan.plan import Plan
    from polyak.strategy.base import Strategy
    from polyak.strategy.clock import Clock
    from polyak.tensors.adapter import Adapter
    from polyak.tensors.entries import Model

__all__ = ["Updating"]

_ASKED = 2  # updates: the rate of the first is not asked for where it replaces the start


class Updating(WithSources, Averager):
    """An averager that can be updated, and knows how far it is.

    Args:
        model: The model, wrapped or not.
        strategy: The strategy.
        options: The engine's options.
        knows: Tells whether a strategy's name can be resolved here; a state of an unknown one loads all the same.
        adapter: How to reach the tensors of the model.

    Attributes:
        options: The engine's options, completed by the strategy.
        listeners: Called after each averaged update.
        openers: Called before the first averaged update, when the average is what it starts from.
        pending: The update that is under way on another thread.
        guards: How many optimisers call ``release`` before each step.
        built: How often each tensor had been written to at construction; None once a state was loaded.

    Raises:
        ModelError: The model has nothing that can be averaged.
        ConfigError: A glob matches no tensor.
    """

    _asked: tuple[Strategy | None, int] = (None, 0)
    _reads_lr = False

    def __init__(
        self,
        model: Model,
        strategy: Strategy,
        options: Options | None = None,
        *,
        knows: Callable[[str], bool] = bool,
        adapter: Adapter | None = None,
    ) -> None:
        settings_of(strategy)  # refused now, and not when a state is saved
        self._strategy = strategy
        self.options = (options or Options()).completed(strategy)
        self._knows = knows
        self._binding = Binding(model, self.options, adapter)
        self.pending: Background | None = None
        self._settled = State(
            self._binding.allocate(strategy.slots()), Progress(), History(), skipped=0, generators=OwnGenerators()
        )
        self._captured: Captured | None = None
        self._outdated, self.guards = False, 0
        self.built: list[int] | None = None if (plan := self.plan) is None else writes(plan.live)
        self._capture()
        self.warned: set[str] = set()
        self.listeners: list[Callable[[Averager, Clock], None]] = []
        self.openers: list[Callable[[Averager], None]] = []

    @override
    def update(
        self, model: Model | None = None, *more: Any, step: int | None = None, lr: float | None = None, **unknown: Any
    ) -> None:
        if more or unknown:
            refuse_arguments(more, unknown)
        captured = self._captured
        if captured is not None and (captured.announced or recording()):
            self._update_captured(captured, model, step, lr)
            return
        if not self.options.capturable:
            refuse_recording()
        if self._left_out(model):
            return
        with self.lock:
            turn = self.begin(model, step, lr)
            if isinstance(turn, Seen):
                turn.commit()
            else:
                carry_out([alone(turn)])

    def _update_captured(self, captured: Captured, model: Model | None, step: int | None, lr: float | None) -> None:
        if not recording():  # the compiled step runs eagerly: advance() has counted it
            with self.lock:
                self._refuse_average(self._binding.root(model))
                captured.move()
        elif captured.announced or not torch.compiler.is_compiling():
            captured.move()
        else:
            captured.by_host(self, model, step, lr)

    @override
    def advance(self, *, step: int | None = None, lr: float | None = None) -> None:
        with self.lock:
            turn, make = self.advancing(step, lr)
            whole(make)
            if isinstance(turn, Turn):
                self.announce(turn)

    def advancing(self, step: int | None, lr: float | None) -> tuple[Turn | Seen, Callable[[], None]]:
        """Return what ``advance`` is to do; idempotent, and nothing has changed."""
        if not self.options.capturable:
            message = "advance() is for updates in a captured graph; build the averager with capturable=True"
            raise ConfigError(message)
        if self._captured is None:
            self._capture()
        plan = self._binding.planned(self._binding.own(), self._state)
        outdated = self._captured is None or (self._outdated and not self._captured.recorded)
        if self._captured is None or outdated or not self._captured.follows(plan):
            message = (
                "tensors of the model or of the average were replaced or moved since, and a graph keeps those that it "
                "was captured with; build a new averager, load the state of this one, and capture the step again"
            )
            raise MismatchError(message)
        captured, turn = self._captured, self.begin(None, step, lr)

        def make() -> None:
            with Untracked():
                captured.put(None if isinstance(turn, Seen) else turn.rate)
            turn.commit()

        return turn, make

    @override
    def synchronize(self) -> None:
        if self.pending is not None:
            with self.lock:  # of several threads that wait one calls the listeners
                if (pending := self.pending) is not None:
                    pending.wait()

    def release(self) -> None:
        """Let the weights be overwritten by what is enqueued from now on, once an offloaded update has read them."""
        if self.pending is not None:
            self.pending.release()

    def guard(self, by: int) -> None:
        """Count one optimiser more, or less, that calls ``release`` before each step.

        Where there is none, an offloaded update lets whatever is enqueued after it wait until the weights were copied.
        """
        self.guards += by

    @property
    def announced(self) -> bool:
        """Whether ``advance`` has counted an update that was not made yet."""
        return self._captured is not None and self._captured.announced

    @property
    def lock(self) -> AbstractContextManager[object]:
        """What a thread holds while it updates, saves or loads the average."""
        return self._binding.lock

    @property
    def uses_lr(self) -> bool:
        """Whether the rate depends on the learning rate, as far as it was given one."""
        return self._reads_lr

    @property
    def checks(self) -> bool:
        """Whether weights that are not finite are refused."""
        return self.options.nonfinite != "propagate"

    @property
    def progress(self) -> Progress:
        """How far it is."""
        return self._state.progress

    @property
    def _state(self) -> State:
        self.synchronize()
        return self._settled

    @_state.setter
    def _state(self, state: State) -> None:
        self._settled = state

    @property
    def model(self) -> Model | None:
        """The averager's own model, without wrappers; None after unpickling."""
        return self._binding.model

    @property
    def plan(self) -> Plan | None:
        """The last plan."""
        return self._binding.plan

    def begin(self, model: Model | None, step: int | None, lr: float | None) -> Turn | Seen:
        """Return what an update is to do; nothing has changed."""
        root = self._binding.root(model)
        self._refuse_average(root)
        lr = None if lr is None else given_lr(lr)
        state = self._state
        now = tick(state.progress, step, start=self.options.start, every=self.options.every)
        if complaint := now.complaint(state.progress):
            self.warn(now.order, complaint)
        if not now.due:
            return Seen(self, state, state.progress.seen(now))
        clock = self._watched(state.progress.clock(now, lr))
        plan = self._binding.planned(root, state)
        if clock.n == 1:
            for opener in self.openers:
                opener(self)
        rate = self._rate(clock, plan)
        after = state.progress.averaged_at(clock, rate, checked_weight(self._strategy, clock))
        self._reads_lr = self._reads_lr or (isinstance(clock, WatchedClock) and clock.is_read)
        moves = checked_moves(self._strategy, clock.n, rate)
        if clock.n == LOOK:
            doubt_weights(self, plan)
        return Turn(self, state, root, plan, now, clock, rate, moves, after, state.progress, state.skipped)

    def _refuse_average(self, root: Model) -> None:
        if self._binding.holds_average(root):
            message = "update() while the model holds the average would average the average; leave applied() first"
            raise AppliedError(message)

    def announce(self, turn: Turn) -> None:
        """Call the listeners of an update that was made."""
        if self._binding.model is None:
            self._binding.model = turn.root
        self.keep_in_step()
        for listener in self.listeners:
            listener(self, turn.clock)

    @property
    def is_followed(self) -> bool:
        """Whether anyone holds a module that computes with the average, by whatever method and at any time."""
        return False

    def keep_in_step(self) -> None:
        """Refresh such a module."""

    def _watched(self, clock: Clock) -> Clock:
        """Return a clock that notes whether the strategy reads the learning rate, for its first updates with one."""
        strategy, asked = self._asked
        if strategy is not self._strategy:
            asked, self._reads_lr = 0, False
        if clock.lr is None or asked >= _ASKED or self._reads_lr:
            return clock
        self._asked = self._strategy, asked + 1
        return WatchedClock.of(clock)

    def _rate(self, clock: Clock, plan: Plan) -> float:
        if clock.n == 1 and self.options.origin == "first":
            return 1.0
        rate = checked_rate(self._strategy, clock)
        return 1.0 if clock.n == 1 and rate != 1.0 and self.checks and replaces_start(self, plan) else rate

    def warn(self, kind: str, message: str, level: int = 4) -> None:
        """Warn of one kind of thing, once."""
        if kind not in self.warned:
            self.warned.add(kind)
            warnings.warn(message, PolyakWarning, stacklevel=level)

    def _capture(self) -> None:
        """Make what a graph records, for the tensors as they are now."""
        if self.options.capturable and self._binding.model is not None:
            self._outdated = self._outdated or (self._captured is not None and self._captured.recorded)
            self._captured = Captured(self._current(), self.options)

    def _current(self) -> Plan:
        """Return the plan of the averager's own model, for reading the average through it."""
        self._settle()
        if self._binding.depth and self._binding.plan is not None:
            return self._binding.plan
        return self._binding.planned(self._binding.own(), self._state)

    def _settle(self) -> None:
        # There is no average before the first update replaces it: whoever asks gets the weights as they are.
        root = self._binding.model
        if self.options.origin == "first" and not self.n and root is not None and not self._binding.holds_average(root):
            plan = self._binding.planned(root, self._state)
            with Untracked():
                plan.moves.mover.update([1.0], [self._state.generators], lambda: None, check=False)
