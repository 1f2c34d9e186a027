"""The engine: one recursion on any model's tensors, whatever the strategy."""

from __future__ import annotations

import copy
import io
from contextlib import contextmanager
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from typing_extensions import override

from polyak.engine.binding import Binding
from polyak.engine.cadence import Progress
from polyak.engine.computing import Computing
from polyak.engine.describe import describe
from polyak.engine.export import averaged_state_dict, gathered, overwrite_model
from polyak.engine.history import History, Identity
from polyak.engine.schema import SavedState
from polyak.engine.settings import Settings, resumed
from polyak.engine.state import State, dump, parse
from polyak.engine.transaction import refuse_within, whole
from polyak.errors import AppliedError, StateError
from polyak.errors.calls import explained, users_level
from polyak.tensors.generators import OwnGenerators
from polyak.tensors.located import refuse_lost
from polyak.tensors.storage import Stored

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from torch import Tensor

    from polyak.strategy.profile import Profile
    from polyak.tensors.entries import Entry, Model

__all__ = ["Engine"]


class Received(NamedTuple):
    """A state that fits."""

    settings: Settings
    state: State


class Engine(Computing):
    """The averager that ``polyak.average`` makes; see ``polyak.Averager`` for its methods."""

    loads = 0
    """How many states were loaded: each goes on from another process's average, or from an earlier moment."""

    # What it is

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
    def stored(self) -> Sequence[Stored]:
        """What it keeps of each tensor."""
        return self._state.stored

    def entries(self) -> list[Entry]:
        """Return what the model of the last update consists of, this rank's part of it where it is sharded."""
        model = self.updated_model
        return self._binding.adapter(model).entries(model)

    @property
    def updated_model(self) -> Model:
        """The model whose weights the last update took."""
        return self._binding.own() if self.plan is None else self.plan.model

    @property
    def identity(self) -> Identity:
        """What tells its history from others; recorders write it."""
        return self._state.history.identity

    @identity.setter
    def identity(self, identity: Identity) -> None:
        self._state.history.identity = identity

    @property
    def offloaded(self) -> bool:
        """Whether updates are made beside the training."""
        return self._current().offload is not None

    @property
    @override
    def averages(self) -> Mapping[str, Tensor]:
        self._settle()
        stored = self._state.stored
        holding = self._binding.holding(stored)
        return MappingProxyType({s.name: s.whole(t) for s, t in zip(stored, holding, strict=True)})

    @override
    def profile(self) -> Profile:
        return self._state.history.profile(self._strategy, self._state.progress.averaged, self.options.start)

    @override
    def describe(self) -> str:
        left = [] if self._binding.model is None else self._binding.left_alone()
        return describe(self._strategy, self.options, self.n, self._state.stored, left, self._binding.plan)

    def __repr__(self) -> str:
        return f"<averager {self._strategy!r}, n={self.n}, {len(self._state.stored)} tensors>"

    # Evaluating

    @override
    @contextmanager
    def applied(self) -> Iterator[None]:
        self._evaluated(level=5)
        try:
            with self._binding.applied(self._current):
                self.swapped()
                yield
        finally:
            self.swapped()

    # Saving

    @override
    def copy_to(self, model: Model | None = None) -> None:
        root = self._binding.root(model)
        if self._binding.holds_average(root):
            message = "copy_to() while the model holds the average: it gets its own weights back; leave applied() first"
            raise AppliedError(message)
        if self._binding.model is not None:
            self._evaluated()
        own = root is self._binding.model
        plan = self._binding.ready(lambda: self._binding.planned(root, self._state, adopt=own))
        overwrite_model(plan, self._binding.holding(plan.stored))

    @override
    def averaged_state_dict(self, *, full: bool = False) -> dict[str, Any]:
        plan = self._evaluated()
        state = averaged_state_dict(plan, self._binding.holding(plan.stored), self.applied)
        return gathered(state) if full else state

    @override
    def state_dict(self) -> dict[str, Any]:
        refuse_within(self)
        with self.lock:
            self._settle()
            refuse_lost([tensor for s in self._state.stored for tensor in s.tensors])
            return dump(self._state, self._binding.holding(self._state.stored), self._strategy, self.options)

    @override
    @explained("A state is loaded whole or not at all: averager.load_state_dict(state)")
    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        with self.lock:
            received = self.receive(state)
            whole(lambda: self.adopt(received))

    def receive(self, state: Mapping[str, Any]) -> Received:
        """Return what a state means here; nothing has changed."""
        if self._binding.is_entered:
            message = "load_state_dict() inside applied(), where the model holds the average; leave applied() first"
            raise AppliedError(message)
        saved = SavedState.of(state)
        settings, changed = resumed(saved, self._settings, self._knows)
        optional = self._binding.optional(self._state)
        loaded = parse(saved, self._state, settings.strategy.slots(), optional)
        if changed:
            message = (
                f"this averager's settings differ from the saved ones and are used from now on: {', '.join(changed)}"
            )
            self.warn("settings", message, users_level() + 1)
        return Received(settings, loaded)

    def adopt(self, received: Received) -> None:
        """Go on from a state; idempotent."""
        self._state, self._binding.plan = received.state, None
        self._settings = received.settings
        if self._averaged is not None:
            self._averaged.moment = None
        self.loads, self.built = self.loads + 1, None
        if self._sources is not None:
            self._sources.forget()
        self._capture()
        self.keep_in_step()

    def restart(self) -> None:
        """Forget what was averaged: the next update begins anew, at the cadence of before."""
        state = self._state
        state.progress = Progress(calls=state.progress.calls, step=state.progress.step)
        state.history = History()

    def __getstate__(self) -> dict[str, Any]:
        if any(s.spread for s in self._state.stored):
            message = (
                "a sharded averager belongs to its process group and cannot be copied or pickled; build another one "
                "for the model and load_state_dict() the state of this one, or polyak.distributed.save() it"
            )
            raise StateError(message)
        # As bytes: tensors that cross into another process would share their memory, and both would average into it.
        buffer = io.BytesIO()
        torch.save(self.state_dict(), buffer)
        about = [(s.name, s.aliases, s.kind, s.policy, s.persistent) for s in self._state.stored]
        return {"strategy": self._strategy, "options": self.options, "about": about, "state": buffer.getvalue()}

    def __setstate__(self, saved: dict[str, Any]) -> None:
        self._strategy, self.options = saved["strategy"], saved["options"]
        self._knows, self._averaged, self.warned = bool, None, set()
        self.listeners, self.openers = [], []
        self.loads, self.built = 1, None
        self.pending, self._captured, self._outdated, self.guards = None, None, False, 0
        self._binding = Binding(None, self.options)
        raw = torch.load(io.BytesIO(saved["state"]), weights_only=False)  # a pickle within a pickle
        averages = raw["slots"]["average"]
        about = saved["about"]
        stored = [
            Stored(name, aliases, kind, policy, averages[name], persistent=all(persistent))  # once it was not written
            for name, aliases, kind, policy, *persistent in about
        ]
        empty = State(stored, Progress(), History(), skipped=0, generators=OwnGenerators())
        self._state = parse(SavedState.of(raw), empty, self._strategy.slots())

    def __deepcopy__(self, memo: dict[int, Any]) -> Engine:
        # A copy averages the same model, or the model's copy where that was made first; it never copies the model.
        new = type(self).__new__(type(self))
        memo[id(self)] = new
        new.__setstate__(copy.deepcopy(self.__getstate__(), memo))
        new.listeners = list(self.listeners)
        new._knows = self._knows  # noqa: SLF001 - its own class
        new._binding.model = memo.get(id(self._binding.model), self._binding.model)  # noqa: SLF001 - its own class
        return new
