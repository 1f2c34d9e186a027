"""The engine: one recursion on any model's tensors, whatever the strategy."""

from __future__ import annotations

import copy
import io
import warnings
from concurrent.futures import wait
from contextlib import contextmanager
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import nn
from typing_extensions import override

from polyak.averager import Averager
from polyak.binding import Binding
from polyak.cadence import Progress, tick
from polyak.captured import Captured, recording
from polyak.describe import describe
from polyak.errors import AppliedError, ConfigError, MismatchError, NonFiniteError, PolyakWarning
from polyak.export import averaged_state_dict, overwrite_model
from polyak.options import Options
from polyak.profile import History, Profile
from polyak.replica import Replica
from polyak.state import State, changed_options, dump, parse, received_strategy
from polyak.strategy import checked_rate, checked_weight
from polyak.tensors.finite import FiniteCheck
from polyak.tensors.generators import OwnGenerators
from polyak.tensors.modes import Untracked
from polyak.tensors.storage import Stored
from polyak.tensors.swap import in_force
from polyak.turn import Turn

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping
    from concurrent.futures import Future

    from torch import Tensor

    from polyak.clock import Clock
    from polyak.strategy import Strategy
    from polyak.tensors.adapter import Adapter
    from polyak.tensors.entries import Model
    from polyak.tensors.plan import Plan

__all__ = ["Engine"]


class Received(NamedTuple):
    """A state that fits."""

    strategy: Strategy
    state: State


class Engine(Averager):
    """The averager that ``polyak.average`` makes; see ``polyak.Averager`` for its methods.

    Args:
        model: The model, wrapped or not.
        strategy: The strategy.
        options: The engine's options.
        knows: Tells whether a strategy's name can be resolved here; a state of an unknown one loads all the same.
        adapter: How to reach the tensors of the model.

    Attributes:
        options: The engine's options, completed by the strategy.
        guards: How many optimisers call ``release`` before each step. Where none does, an offloaded update lets
            whatever is enqueued after it wait until the weights were copied.
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
        self._pending: tuple[Turn, Future[bool]] | None = None
        self._settled = State(self._binding.allocate(), Progress(), History(), skipped=0, generators=OwnGenerators())
        self._captured = Captured(self._current(), self.options) if self.options.capturable else None
        self.guards = 0
        self._replica: Replica | None = None
        self._warned: set[str] = set()
        self.listeners: list[Callable[[Averager, Clock], None]] = []

    # What it is

    @property
    @override
    def strategy(self) -> Strategy:
        return self._strategy

    @property
    @override
    def n(self) -> int:
        return self._state.progress.n

    @property
    @override
    def rate(self) -> float | None:
        return self._state.progress.rate if self.n else None

    @property
    @override
    def skipped(self) -> int:
        return self._state.skipped

    @property
    @override
    def is_applied(self) -> bool:
        return self._binding.depth > 0

    @property
    @override
    def averages(self) -> Mapping[str, Tensor]:
        self._settle()
        stored = self._state.stored
        return MappingProxyType({s.name: t for s, t in zip(stored, self._binding.holding(stored), strict=True)})

    @override
    def profile(self) -> Profile:
        return self._state.history.profile(self._state.progress.averaged)

    @override
    def describe(self) -> str:
        left = [] if self._binding.model is None else self._binding.left_alone()
        return describe(self._strategy, self.options, self.n, self._state.stored, left, self._binding.plan)

    def __repr__(self) -> str:
        return f"<averager {self._strategy!r}, n={self.n}, {len(self._state.stored)} tensors>"

    # Updating

    @override
    def update(self, model: Model | None = None, *, step: int | None = None, lr: float | None = None) -> None:
        if self._captured is not None and recording():
            self._captured.move()
            return
        if (turn := self.begin(model, step, lr)) is not None:
            self.make(turn)

    def make(self, turn: Turn) -> None:
        """Move the tensors of an update, now or beside the training."""
        generators, check = turn.state.generators, self.options.nonfinite != "propagate"
        with Untracked():
            if turn.plan.offload is None:
                done = turn.plan.mover.update([turn.rate], [generators], turn.commit, check=check)
            else:
                moving = turn.plan.offload.start(turn.rate, generators, turn.commit, check=check)
                self._pending = turn, moving
                if not self.guards:
                    turn.plan.offload.release()
                return
        self.end(turn, done=done)

    @override
    def advance(self, *, step: int | None = None, lr: float | None = None) -> None:
        if self._captured is None:
            message = "advance() is for updates in a captured graph; build the averager with capturable=True"
            raise ConfigError(message)
        turn = self.begin(None, step, lr)
        if turn is not None and turn.plan is not self._captured.plan:
            message = (
                "the model's tensors were replaced since the averager was made, and a graph keeps those that it was "
                "captured with; build a new averager, load the state of this one, and capture the step again"
            )
            raise MismatchError(message)
        with Untracked():
            self._captured.put(0.0 if turn is None else turn.rate)
        if turn is not None:
            turn.commit()
            self.end(turn, done=True)

    @override
    def synchronize(self) -> None:
        if self._pending is not None:
            turn, moving = self._pending
            wait([moving])
            self._pending = None
            self.end(turn, done=moving.result())

    def release(self) -> None:
        """Let the weights be overwritten by what is enqueued from now on, once an offloaded update has read them."""
        if self._pending is not None and (offload := self._pending[0].plan.offload) is not None:
            offload.release()

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
        state = self._state
        now = tick(state.progress, step, start=self.options.start, every=self.options.every)
        if complaint := now.complaint(state.progress):
            self._warn(now.order, complaint)
        if not now.due:
            state.progress = state.progress.seen(now)
            return None
        clock = state.progress.clock(now, lr)
        rate = self._rate(clock)
        after = state.progress.averaged_at(clock, rate, checked_weight(self._strategy, clock))
        return Turn(state, root, self._binding.planned(root, state), now, clock, rate, after)

    def end(self, turn: Turn, *, done: bool) -> None:
        """Tell of an update that was made, or left out because of weights that are not finite."""
        if not done:
            self._refuse_nonfinite(turn.plan, turn.now.step)
            turn.skip()
            return
        if self._binding.model is None:
            self._binding.model = turn.root
        for listener in self.listeners:
            listener(self, turn.clock)

    def _rate(self, clock: Clock) -> float:
        first = clock.n == 1 and self.options.origin == "first"
        return 1.0 if first else checked_rate(self._strategy, clock)

    def _refuse_nonfinite(self, plan: Plan, step: int) -> None:
        if self.options.nonfinite == "skip" and "nonfinite" in self._warned:
            return
        pairs = zip(plan.stored, plan.live, strict=True)
        names = ", ".join(s.name for s, t in pairs if s.policy == "average" and not FiniteCheck([t])())
        what = f"the weights hold NaN or infinities at step {step} (in {names[:200]})"
        if self.options.nonfinite == "raise":
            message = f"{what}; the average is unchanged. Use nonfinite='skip' to go on without such updates."
            raise NonFiniteError(message)
        self._warn("nonfinite", f"{what}; such updates are left out and counted in averager.skipped")

    def _warn(self, kind: str, message: str) -> None:
        if kind not in self._warned:
            self._warned.add(kind)
            warnings.warn(message, PolyakWarning, stacklevel=4)

    # Evaluating

    @override
    @contextmanager
    def applied(self) -> Iterator[None]:
        plan = self._current()
        try:
            with self._binding.applied(plan):
                self._repoint()
                yield
        finally:
            self._repoint()

    @property
    @override
    def module(self) -> nn.Module:
        plan = self._current()
        if self._replica is None or not self._replica.fits(plan):
            self._replica = Replica(plan, self._repoint)
        self._repoint()
        return self._replica.module

    def _repoint(self) -> None:
        if self._replica is not None:
            # Before the first update the values may change without being counted.
            moment = (id(self._state.stored), self.n, *in_force) if self.n else None
            if moment is None or moment != self._replica.moment:
                self._replica.follow(self.averages, moment)

    @override
    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.module(*args, **kwargs)

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
                plan.mover.update([1.0], [self._state.generators], lambda: None, check=False)

    # Saving

    @override
    def copy_to(self, model: Model | None = None) -> None:
        root = self._binding.root(model)
        if self._binding.holds_average(root):
            message = "copy_to() while the model holds the average: it gets its own weights back; leave applied() first"
            raise AppliedError(message)
        if self._binding.model is not None:
            self._current()
        plan = self._binding.planned(root, self._state, adopt=root is self._binding.model)
        overwrite_model(plan, self._binding.holding(plan.stored))

    @override
    def averaged_state_dict(self) -> dict[str, Any]:
        plan = self._current()
        return averaged_state_dict(plan, self._binding.holding(plan.stored), self.applied)

    @override
    def state_dict(self) -> dict[str, Any]:
        self._settle()
        return dump(self._state, self._binding.holding(self._state.stored), self._strategy, self.options)

    @override
    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.adopt(self.receive(state))

    def receive(self, state: Mapping[str, Any]) -> Received:
        """Return what a state means here; nothing has changed."""
        if self._binding.depth:
            message = "load_state_dict() inside applied(), where the model holds the average; leave applied() first"
            raise AppliedError(message)
        loaded = parse(state, self._state)
        strategy, changed = received_strategy(state, self._strategy, self._knows)
        changed += changed_options(state, self.options)
        if changed:
            self._warn(
                "settings", f"the state was saved with other settings; from here on its own count: {', '.join(changed)}"
            )
        return Received(strategy, loaded)

    def adopt(self, received: Received) -> None:
        """Go on from a state."""
        self._strategy, self._state, self._binding.plan = *received, None
        self._repoint()

    # Copying

    def __getstate__(self) -> dict[str, Any]:
        # As bytes: tensors that cross into another process would share their memory, and both would average into it.
        buffer = io.BytesIO()
        torch.save(self.state_dict(), buffer)
        about = [(s.name, s.aliases, s.kind, s.policy) for s in self._state.stored]
        return {"strategy": self._strategy, "options": self.options, "about": about, "state": buffer.getvalue()}

    def __setstate__(self, saved: dict[str, Any]) -> None:
        self._strategy, self.options = saved["strategy"], saved["options"]
        self._knows, self._replica, self._warned, self.listeners = bool, None, set(), []
        self._pending, self._captured, self.guards = None, None, 0
        self._binding = Binding(None, self.options)
        raw = torch.load(io.BytesIO(saved["state"]), weights_only=False)  # a pickle within a pickle
        averages = raw["slots"]["average"]
        about = saved["about"]
        stored = [Stored(name, aliases, kind, policy, averages[name]) for name, aliases, kind, policy in about]
        self._state = parse(raw, State(stored, Progress(), History(), skipped=0, generators=OwnGenerators()))

    def __deepcopy__(self, memo: dict[int, Any]) -> Engine:
        # A copy averages the same model, or the model's copy where that was made first; it never copies the model.
        new = type(self).__new__(type(self))
        memo[id(self)] = new
        new.__setstate__(copy.deepcopy(self.__getstate__(), memo))
        new.listeners = list(self.listeners)
        new._knows = self._knows  # noqa: SLF001 - its own class
        new._binding.model = memo.get(id(self._binding.model), self._binding.model)  # noqa: SLF001 - its own class
        return new
