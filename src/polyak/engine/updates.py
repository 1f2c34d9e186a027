"""Updates: how an averager takes weights in, at once, on another thread, or in a graph."""

from __future__ import annotations

import weakref
from typing import TYPE_CHECKING

import torch

from polyak.engine.cadence import given_lr, given_rate, tick
from polyak.engine.cuda_graphs import Captured, recording, refuse_recording
from polyak.engine.doubts import LOOK, doubt_weights, replaces_start
from polyak.engine.pending import PendingUpdate, Seen
from polyak.engine.sources import Sources
from polyak.engine.transaction import carry_out, whole
from polyak.engine.unsettled import alone
from polyak.errors import AppliedError, ConfigError, MismatchError
from polyak.strategy.base import checked_moves, checked_rate, checked_weight
from polyak.strategy.clock import WatchedClock
from polyak.tensors.modes import Untracked

if TYPE_CHECKING:
    from collections.abc import Callable

    from polyak.engine.averaged_module.view import View
    from polyak.engine.averager import Averager
    from polyak.engine.core import Core
    from polyak.engine.plan.plan import Plan
    from polyak.strategy.base import Strategy
    from polyak.strategy.clock import Clock
    from polyak.tensors.entries import Given, Model

__all__ = ["Updater"]

_ASKED = 2  # updates: the rate of the first is not asked for where it replaces the start


class Updater:
    """Takes weights into the average of one averager.

    Args:
        averager: The averager, which listeners are called with.
        core: Its settings, state and binding.
        view: Its module, which is kept in step.

    Attributes:
        listeners: Called after each averaged update.
        openers: Called before the first averaged update, when the average is what it starts from.
        guards: How many optimisers call ``release`` before each step.
        sources: Who makes the updates.
    """

    def __init__(self, averager: Averager, core: Core, view: View) -> None:
        self._averager = weakref.ref(averager)  # an averager is freed with its last reference
        self.core, self.view = core, view
        self.sources = Sources()
        self.listeners: list[Callable[[Averager, Clock], None]] = []
        self.openers: list[Callable[[Averager], None]] = []
        self.guards = 0
        self._asked: tuple[Strategy | None, int] = (None, 0)
        self._reads_lr = self._outdated = False
        self._captured: Captured | None = None
        self.capture()

    def update(self, model: Given | None, step: int | None, lr: float | None, rate: float | None) -> None:
        """Make an update; see ``Averager.update``."""
        captured = self._captured
        if captured is not None and (captured.announced or recording()):
            self._update_captured(captured, model, step, lr, rate)
            return
        if not self.core.options.capturable:
            refuse_recording()
        if self.sources.leave_out(lambda: self.is_own(model)):
            return
        with self.core.lock:
            update = self.prepare(model, step, lr, rate)
            if isinstance(update, Seen):
                update.commit()
            else:
                carry_out([alone(update)])

    def is_own(self, model: Given | None) -> bool:
        """Return whether an update of a model is one of the averager's own model."""
        return model is None or self.core.binding.root(model) is self.core.binding.model

    def _update_captured(
        self, captured: Captured, model: Given | None, step: int | None, lr: float | None, rate: float | None
    ) -> None:
        if rate is not None and captured.announced:
            message = "update(rate=...) in a captured or compiled step: advance() has put the rate that it moves by"
            raise ConfigError(message)
        if not recording():  # the compiled step runs eagerly: advance() has counted it
            with self.core.lock:
                self._refuse_average(self.core.binding.root(model))
                captured.move()
        elif captured.announced or not torch.compiler.is_compiling():
            captured.move()
        else:
            captured.by_host(self, model, step, lr, rate)

    def advance(self, step: int | None, lr: float | None) -> None:
        """Count an update that a graph is about to make; see ``Averager.advance``."""
        with self.core.lock:
            update, make = self.advancing(step, lr)
            whole(make)
            if isinstance(update, PendingUpdate):
                self.announce(update)
            self.core.holds.warn(self.core.warn)

    def advancing(self, step: int | None, lr: float | None) -> tuple[PendingUpdate | Seen, Callable[[], None]]:
        """Prepare an announcement; nothing is changed."""
        if not self.core.options.capturable:
            message = "advance() is for updates in a captured graph; build the averager with capturable=True"
            raise ConfigError(message)
        if self._captured is None:
            self.capture()
        plan = self.core.binding.planned(self.core.binding.own(), self.core.state)
        outdated = self._captured is None or (self._outdated and not self._captured.recorded)
        if self._captured is None or outdated or not self._captured.follows(plan):
            message = (
                "tensors of the model or of the average were replaced or moved since, and a graph keeps those that it "
                "was captured with; build a new averager, load the state of this one, and capture the step again"
            )
            raise MismatchError(message)
        captured, update = self._captured, self.prepare(None, step, lr)
        progress = self.core.state.progress

        def make() -> None:
            if self.core.holding and progress.n:  # what the replay before held stands on the device until the next
                self.core.holds.note(self.core.state, progress.n, progress.averaged, captured.held())
            with Untracked():
                captured.put(None if isinstance(update, Seen) else update.rate)
            update.commit()

        return update, make

    def release(self) -> None:
        """Let the weights be overwritten by what is enqueued from now on, once an offloaded update has read them."""
        if self.core.pending is not None:
            self.core.pending.release()

    @property
    def announced(self) -> bool:
        """Whether ``advance`` has counted an update that was not made yet."""
        return self._captured is not None and self._captured.announced

    @property
    def uses_lr(self) -> bool:
        """Whether the rate depends on the learning rate, as far as it was given one."""
        return self._reads_lr

    def prepare(
        self, model: Given | None, step: int | None, lr: float | None, rate: float | None = None
    ) -> PendingUpdate | Seen:
        """Prepare an update; nothing is changed."""
        root = self.core.binding.root(model)
        self._refuse_average(root)
        lr = None if lr is None else given_lr(lr)
        given = None if rate is None else given_rate(rate, self.core.strategy)
        state = self.core.state
        now = tick(state.progress, step, start=self.core.options.start, every=self.core.options.every)
        if complaint := now.complaint(state.progress):
            self.core.warn(now.order, complaint)
        if not now.due:
            return Seen(self, state, state.progress.seen(now))
        clock = self._watched(state.progress.clock(now, lr))
        plan = self.core.binding.planned(root, state)
        if clock.n == 1:
            for opener in self.openers:
                opener(self.averager)
        rate = self._rate(clock, plan) if given is None else given
        after = state.progress.averaged_at(clock, rate, checked_weight(self.core.strategy, clock))
        self._reads_lr = self._reads_lr or (isinstance(clock, WatchedClock) and clock.is_read)
        moves = checked_moves(self.core.strategy, clock.n, rate)
        if clock.n == LOOK:
            doubt_weights(self.core, plan)
        return PendingUpdate(self, state, root, plan, now, clock, rate, moves, after, state.progress, state.skipped)

    @property
    def averager(self) -> Averager:
        """The averager that this is a part of."""
        averager = self._averager()
        assert averager is not None  # noqa: S101 - it is what was called
        return averager

    def _refuse_average(self, root: Model) -> None:
        if self.core.binding.holds_average(root):
            message = "update() while the model holds the average would average the average; leave applied() first"
            raise AppliedError(message)

    def announce(self, update: PendingUpdate) -> None:
        """Call the listeners of an update that was made."""
        if self.core.binding.model is None:
            self.core.binding.model = update.root
        self.view.keep_in_step()
        for listener in self.listeners:
            listener(self.averager, update.clock)

    def _watched(self, clock: Clock) -> Clock:
        """Return a clock that notes whether the strategy reads the learning rate, for its first updates with one."""
        strategy, asked = self._asked
        if strategy is not self.core.strategy:
            asked, self._reads_lr = 0, False
        if clock.lr is None or asked >= _ASKED or self._reads_lr:
            return clock
        self._asked = self.core.strategy, asked + 1
        return WatchedClock.of(clock)

    def _rate(self, clock: Clock, plan: Plan) -> float:
        if clock.n == 1 and self.core.options.origin == "first":
            return 1.0
        rate = checked_rate(self.core.strategy, clock)
        return 1.0 if clock.n == 1 and rate != 1.0 and self.core.checks and replaces_start(self.core, plan) else rate

    def capture(self) -> None:
        """Make what a graph records, for the tensors as they are now."""
        if self.core.options.capturable and self.core.binding.model is not None:
            self._outdated = self._outdated or (self._captured is not None and self._captured.recorded)
            self._captured = Captured(self.core.current(), self.core.options)
            if self.core.holding:
                self.core.holds.follow(self._captured.held())
