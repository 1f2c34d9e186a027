"""The engine's half that takes weights in: updates now, beside the training, or in a graph."""

from __future__ import annotations

import os
import warnings
from concurrent.futures import wait
from typing import TYPE_CHECKING

from typing_extensions import override

from polyak.averager import Averager
from polyak.binding import Binding
from polyak.cadence import Progress, given_lr, tick
from polyak.captured import Captured, recording, refuse_recording
from polyak.errors import AppliedError, ConfigError, MismatchError, NonFiniteError, PolyakWarning, StateError
from polyak.history import History
from polyak.options import Options
from polyak.sources import WithSources
from polyak.state import State
from polyak.strategy import checked_moves, checked_rate, checked_weight
from polyak.tensors.generators import OwnGenerators
from polyak.tensors.modes import Untracked
from polyak.turn import Turn

if TYPE_CHECKING:
    from collections.abc import Callable
    from concurrent.futures import Future

    from polyak.clock import Clock
    from polyak.strategy import Strategy
    from polyak.tensors.adapter import Adapter
    from polyak.tensors.entries import Model
    from polyak.tensors.plan import Plan

__all__ = ["Updating"]


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

    Raises:
        ModelError: The model has nothing that can be averaged.
        ConfigError: A glob matches no tensor.
    """

    def __init__(
        self,
        model: Model,
        strategy: Strategy,
        options: Options | None = None,
        *,
        knows: Callable[[str], bool] = bool,
        adapter: Adapter | None = None,
    ) -> None:
        self._strategy = strategy
        self.options = (options or Options()).completed(strategy)
        self._knows = knows
        self._binding = Binding(model, self.options, adapter)
        self._pending: tuple[Turn, Future[bool], int] | None = None
        self._settled = State(
            self._binding.allocate(strategy.slots()), Progress(), History(), skipped=0, generators=OwnGenerators()
        )
        self._captured: Captured | None = None
        self._outdated, self._guards = False, 0
        self._capture()
        self._warned: set[str] = set()
        self.listeners: list[Callable[[Averager, Clock], None]] = []

    @override
    def update(self, model: Model | None = None, *, step: int | None = None, lr: float | None = None) -> None:
        if self._captured is not None and recording():
            self._captured.move()
            return
        if not self.options.capturable:
            refuse_recording()
        turn = None if self._left_out() else self.begin(model, step, lr)
        if turn is not None and (done := self.move(turn)) is not None:
            self.end(turn, done=done)

    def move(self, turn: Turn) -> bool | None:
        """Move the tensors of an update; return whether it was made, None where that is done beside the training."""
        generators, check = turn.generators, self.checks
        with Untracked():
            if turn.plan.offload is None:
                return turn.plan.moves.update(turn.moves, generators, turn.commit, check=check)
            moving = turn.plan.offload.start(turn.moves, generators, turn.commit, check=check)
            self._pending = turn, moving, os.getpid()
            if not self._guards:
                turn.plan.offload.release()
            if self.is_followed:
                self.synchronize()
            return None

    @override
    def advance(self, *, step: int | None = None, lr: float | None = None) -> None:
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
        turn = self.begin(None, step, lr)
        with Untracked():
            self._captured.put(None if turn is None else turn.rate)
        if turn is not None:
            turn.commit()
            self.end(turn, done=True)

    @override
    def synchronize(self) -> None:
        if self._pending is not None:
            turn, moving, process = self._pending
            if process != os.getpid():
                self._pending = None
                message = (
                    "the process was forked while an update was under way on another thread, which is not there now; "
                    "call averager.synchronize() before forking. This process has half an average."
                )
                raise StateError(message)
            wait([moving])
            self._pending = None
            self.end(turn, done=moving.result())

    def release(self) -> None:
        """Let the weights be overwritten by what is enqueued from now on, once an offloaded update has read them."""
        if self._pending is not None and (offload := self._pending[0].plan.offload) is not None:
            offload.release()

    def guard(self, by: int) -> None:
        """Count one optimiser more, or less, that calls ``release`` before each step.

        Where there is none, an offloaded update lets whatever is enqueued after it wait until the weights were copied.
        """
        self._guards += by

    @property
    def checks(self) -> bool:
        """Whether weights that are not finite are refused."""
        return self.options.nonfinite != "propagate"

    @property
    def progress(self) -> Progress:
        """How far it is; a bank that cannot begin all of its updates puts it back."""
        return self._state.progress

    @progress.setter
    def progress(self, progress: Progress) -> None:
        self._state.progress = progress

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

    def begin(self, model: Model | None, step: int | None, lr: float | None) -> Turn | None:
        """Return what an update is to do, or None where none is due; nothing has moved."""
        root = self._binding.root(model)
        if self._binding.holds_average(root):
            message = "update() while the model holds the average would average the average; leave applied() first"
            raise AppliedError(message)
        lr = None if lr is None else given_lr(lr)
        state = self._state
        now = tick(state.progress, step, start=self.options.start, every=self.options.every)
        if complaint := now.complaint(state.progress):
            self._warn(now.order, complaint)
        if not now.due:
            state.progress = state.progress.seen(now)
            if not state.progress.n:
                self.keep_in_step()
            return None
        clock = state.progress.clock(now, lr)
        rate = self._rate(clock)
        after = state.progress.averaged_at(clock, rate, checked_weight(self._strategy, clock))
        moves = checked_moves(self._strategy, clock.n, rate)
        return Turn(state, root, self._binding.planned(root, state), now, clock, rate, moves, after)

    def end(self, turn: Turn, *, done: bool) -> None:
        """Tell of an update that was made, or left out because of weights that are not finite."""
        if not done and self.options.nonfinite == "raise":
            message = f"{turn.complaint()}; the average is unchanged. nonfinite='skip' goes on without such updates."
            raise NonFiniteError(message)
        if not done:
            turn.skip()
            if "nonfinite" not in self._warned:  # the names are looked for once only
                what = f"{turn.complaint()}; such updates are left out and counted in averager.skipped"
                self._warn("nonfinite", what, level=5)
            return
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

    def _rate(self, clock: Clock) -> float:
        first = clock.n == 1 and self.options.origin == "first"
        return 1.0 if first else checked_rate(self._strategy, clock)

    def _warn(self, kind: str, message: str, level: int = 4) -> None:
        if kind not in self._warned:
            self._warned.add(kind)
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
