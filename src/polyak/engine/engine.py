"""The engine: one recursion on any model's tensors, whatever the strategy."""

from __future__ import annotations

import copy
import io
from contextlib import contextmanager
from functools import partial
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import torch
from typing_extensions import override

from polyak.engine.averaged_module.view import View
from polyak.engine.averager import Averager
from polyak.engine.binding import Binding
from polyak.engine.cadence import Progress
from polyak.engine.core import Core
from polyak.engine.describe import describe
from polyak.engine.doubts import doubt_average, doubt_resumed
from polyak.engine.export import averaged_state_dict, gathered, overwrite_model, whole_state
from polyak.engine.history import History, Identity
from polyak.engine.metrics import metrics
from polyak.engine.options import Options
from polyak.engine.relocate import pin, relocate
from polyak.engine.schema import SavedState
from polyak.engine.settings import advice, configured, resumed
from polyak.engine.state import State, dump, parse
from polyak.engine.takeover import Received, Takeover, taken_over
from polyak.engine.transaction import refuse_within, whole
from polyak.engine.updates import Updater
from polyak.errors import AppliedError, AttributeAccessError, StateError
from polyak.errors.attributes import AttributeHints
from polyak.errors.calls import explained, refuse_arguments
from polyak.strategy.numbers import given_integer
from polyak.tensors.generators import OwnGenerators
from polyak.tensors.home import Home
from polyak.tensors.located import refuse_lost
from polyak.tensors.storage import Stored

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence
    from contextlib import AbstractContextManager

    from torch import Tensor, nn

    from polyak.engine.plan.plan import Plan
    from polyak.engine.sources import Sources
    from polyak.strategy.base import Strategy
    from polyak.strategy.profile import Profile
    from polyak.tensors.adapter import Adapter
    from polyak.tensors.entries import Entry, Given, Model

__all__ = ["Engine"]


class Engine(AttributeHints, Averager):
    """The averager that ``polyak.average`` makes; see ``polyak.Averager`` for its methods.

    Args:
        model: The model, wrapped or not.
        strategy: The strategy.
        options: The engine's options. Defaults to ``Options()``.
        knows: Whether a strategy's name can be resolved here; a state of an unknown one loads all the same.
        adapter: How to reach the tensors of the model. Defaults to what the model asks for.
        into: The user's own tensors that hold the average.

    Attributes:
        core: Its settings, its state and its hold on the model.
        updater: Takes weights in.
        view: Computes with the average apart from the model.

    Raises:
        ModelError: If the model has nothing that can be averaged.
        ConfigError: If a glob matches no tensor.
    """

    core: Core
    updater: Updater
    view: View

    loads = 0
    """How many states were loaded: each goes on from another process's average, or from an earlier moment."""

    def __init__(
        self,
        model: Given,
        strategy: Strategy,
        options: Options | None = None,
        *,
        knows: Callable[[str], bool] = bool,
        adapter: Adapter | None = None,
        into: Given | None = None,
    ) -> None:
        home = None if into is None else Home(into)
        self._consist_of(Core.of(model, strategy, options, knows, adapter, home))

    def _consist_of(self, core: Core) -> None:
        view = View(core)
        vars(self).update(core=core, view=view, updater=Updater(self, core, view))

    # Attributes

    @override
    def __setattr__(self, name: str, value: object) -> None:
        known = getattr(type(self), name, None)
        fixed = isinstance(known, property) and known.fset is None
        if fixed or not (known is not None or name.startswith("_")):
            read_only = fixed and name != "strategy"
            reason = "it can only be read" if read_only else advice(self.core.settings, name)
            message = f"the averager's {name!r} cannot be set; {reason}"
            raise AttributeAccessError(message)
        super().__setattr__(name, value)

    @override
    def _hint(self, name: str) -> str:
        core = vars(self).get("core")
        if name in type(getattr(core, "strategy", None)).__dict__.get("__pydantic_fields__", ()):
            return f" For that there is averager.strategy.{name}."
        return super()._hint(name)

    @property
    @override
    def strategy(self) -> Strategy:
        return self.core.strategy

    @property
    def options(self) -> Options:
        """The engine's options, completed by the strategy."""
        return self.core.options

    @property
    def model(self) -> Model | None:
        """The averager's own model, without wrappers; None after unpickling."""
        return self.core.binding.model

    @property
    def plan(self) -> Plan | None:
        """The last plan."""
        return self.core.binding.plan

    @property
    def lock(self) -> AbstractContextManager[object]:
        """What a thread holds while it updates, saves or loads the average."""
        return self.core.lock

    @property
    def progress(self) -> Progress:
        """How far it is."""
        return self.core.state.progress

    @property
    @override
    def n(self) -> int:
        return self.core.state.progress.n

    @property
    @override
    def rate(self) -> float | None:
        return self.core.state.progress.rate if self.n else None

    @property
    @override
    def skipped(self) -> int:
        state = self.core.state
        self.core.holds.settle()
        return state.skipped

    @property
    @override
    def held(self) -> Mapping[str, int]:
        self.core.synchronize()
        return MappingProxyType(self.core.holds.last())

    @property
    @override
    def is_applied(self) -> bool:
        return self.core.binding.depth > 0

    @property
    def stored(self) -> Sequence[Stored]:
        """What it keeps of each tensor."""
        return self.core.state.stored

    def entries(self) -> list[Entry]:
        """Return the entries of the last updated model; this rank's parts of a sharded one."""
        model = self.updated_model
        return self.core.binding.adapter(model).entries(model)

    @property
    def updated_model(self) -> Model:
        """The model whose weights the last update took."""
        return self.core.binding.own() if self.plan is None else self.plan.model

    @property
    def identity(self) -> Identity:
        """What tells its history from others; recorders write it."""
        return self.core.state.history.identity

    @identity.setter
    def identity(self, identity: Identity) -> None:
        self.core.state.history.identity = identity

    @property
    def offloaded(self) -> bool:
        """Whether updates are made on another thread."""
        return self.core.current().offload is not None

    @property
    @override
    def averages(self) -> Mapping[str, Tensor]:
        return self.core.averages()

    @override
    def profile(self) -> Profile:
        return self.core.profile()

    @override
    def describe(self) -> str:
        left = [] if self.core.binding.model is None else self.core.binding.left_alone()
        core = self.core
        return describe(core.strategy, self.options, self.n, core.state.stored, left, core.binding.plan, self.held)

    @override
    def metrics(self) -> dict[str, float]:
        with self.core.lock:
            return metrics(self.core)

    def __repr__(self) -> str:
        return f"<averager {self.core.strategy!r}, n={self.n}, {len(self.core.state.stored)} tensors>"

    # Updating

    @override
    def update(
        self,
        model: Given | None = None,
        *more: Any,
        step: int | None = None,
        lr: float | None = None,
        rate: float | None = None,
        **unknown: Any,
    ) -> None:
        if more or unknown:
            instead = "Settings are changed by averager.configure(decay=0.5)"
            refuse_arguments(more, unknown, "the model, step=, lr= and rate=", instead)
        self.updater.update(model, step, lr, rate)

    @override
    def advance(self, *, step: int | None = None, lr: float | None = None) -> None:
        self.updater.advance(step, lr)

    @property
    def sources(self) -> Sources:
        """Who makes the updates."""
        return self.updater.sources

    def release(self) -> None:
        """Let the weights be overwritten by what is enqueued from now on, once an offloaded update has read them."""
        self.updater.release()

    def guard(self, by: int) -> None:
        """Count one optimiser more, or less, that calls ``release`` before each step.

        Without one, an offloaded update lets whatever is enqueued after it wait until the weights were copied.
        """
        self.updater.guards += by

    @override
    def synchronize(self) -> None:
        self.core.synchronize()

    @override
    @explained("Settings are given by name: averager.configure(decay=0.5)")
    def configure(self, **settings: Any) -> None:
        core = self.core
        made = configured(core.settings, core.state.progress.n, settings)
        core.binding.follow(made.options)
        whole(lambda: setattr(core, "settings", made))

    @override
    def to(self, device: str | int | torch.device | None = None, dtype: str | torch.dtype | None = None) -> None:
        with self.lock:
            relocate(self.core, device, dtype)
            self.view.forget()

    @override
    def pin_memory(self) -> None:
        with self.lock:
            pin(self.core)

    @override
    def take_over(self, source: Any, *, n: int | None = None) -> None:
        with self.lock:
            taken = Takeover.of(source)
            count = taken.n or 0 if n is None else given_integer("n", n, 0)
            received = taken_over(self.core, taken, count)
            whole(lambda: self.adopt(received))

    # Evaluating

    @property
    @override
    def module(self) -> nn.Module:
        home = self.core.binding.home
        if home is not None and home.module is not None:
            self.core.settle()
            return home.module
        return self.view.module(self._evaluated())

    @override
    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.module(*args, **kwargs)

    @override
    @contextmanager
    def applied(self, model: Given | None = None) -> Iterator[None]:
        self._evaluated()
        binding = self.core.binding
        root = None if model is None else binding.root(model)
        if root is None or root is binding.model:
            planned = self.core.current
        else:
            planned = partial(binding.planned, root, self.core.state, adopt=False)
        try:
            with binding.applied(planned, root):
                self.view.swapped()
                yield
        finally:
            self.view.swapped()

    def _evaluated(self) -> Plan:
        plan = self.core.current()
        doubt_average(self.core, self.sources, plan)
        return plan

    # Saving

    @override
    def copy_to(self, model: Given | None = None) -> None:
        root = self.core.binding.root(model)
        if self.core.binding.holds_average(root):
            message = "copy_to() while the model holds the average: it gets its own weights back; leave applied() first"
            raise AppliedError(message)
        if self.core.binding.model is not None:
            self._evaluated()
        own = root is self.core.binding.model
        plan = self.core.binding.ready(lambda: self.core.binding.planned(root, self.core.state, adopt=own))
        overwrite_model(plan, self.core.binding.holding(plan.stored))

    @override
    def averaged_state_dict(self, *, full: bool = False) -> dict[str, Any]:
        plan = self._evaluated()
        state = averaged_state_dict(plan, self.core.binding.holding(plan.stored), self.applied)
        return gathered(state) if full else state

    @override
    def state_dict(self, *, full: bool = False) -> dict[str, Any]:
        refuse_within(self.updater)
        with self.lock:
            self.core.settle()
            self.core.holds.settle()
            refuse_lost([tensor for s in self.core.state.stored for tensor in s.tensors])
            holding = self.core.binding.holding(self.core.state.stored)
            state = dump(self.core.state, holding, self.strategy, self.options)
        return whole_state(state) if full else state

    @override
    @explained("A state is loaded whole or not at all: averager.load_state_dict(state)")
    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        with self.lock:
            received = self.receive(state)
            whole(lambda: self.adopt(received))
            doubt_resumed(self.core)

    def receive(self, state: Mapping[str, Any]) -> Received:
        """Validate a state for this averager; nothing is changed."""
        if self.core.binding.is_entered:
            message = "load_state_dict() inside applied(), where the model holds the average; leave applied() first"
            raise AppliedError(message)
        saved = SavedState.of(state)
        settings, changed = resumed(saved, self.core.settings, self.core.knows)
        optional = self.core.binding.optional(self.core.state)
        loaded = parse(saved, self.core.state, settings.strategy.slots(), optional)
        if changed:
            message = (
                f"this averager's settings differ from the saved ones and are used from now on: {', '.join(changed)}"
            )
            self.core.warn("settings", message)
        return Received(settings, loaded)

    def adopt(self, received: Received) -> None:
        """Adopt a validated state; idempotent."""
        core = self.core
        if (home := core.binding.home) is not None:
            received.state.stored = home.filled(received.state.stored)
        core.state, core.binding.plan = received.state, None
        core.settings = received.settings
        core.built = None
        core.holds.forget()
        self.loads += 1
        self.view.forget()
        self.updater.sources.forget()
        self.updater.capture()
        self.view.keep_in_step()

    def restart(self) -> None:
        """Forget what was averaged: the next update begins anew, at the cadence of before."""
        state = self.core.state
        state.progress = Progress(calls=state.progress.calls, step=state.progress.step)
        state.history = History()
        self.core.holds.forget()

    def __getstate__(self) -> dict[str, Any]:
        if any(s.spread for s in self.core.state.stored):
            message = (
                "a sharded averager belongs to its process group and cannot be copied or pickled; build another one "
                "for the model and load_state_dict() the state of this one, or polyak.distributed.save() it"
            )
            raise StateError(message)
        # As bytes: tensors that cross into another process would share their memory, and both would average into it.
        buffer = io.BytesIO()
        torch.save(self.state_dict(), buffer)
        about = [(s.name, s.aliases, s.kind, s.policy, s.persistent) for s in self.core.state.stored]
        saved = {"strategy": self.core.strategy, "options": self.options, "about": about, "state": buffer.getvalue()}
        home = self.core.binding.home
        return saved if home is None else {**saved, "into": home.given}

    def __setstate__(self, saved: dict[str, Any]) -> None:
        raw = torch.load(io.BytesIO(saved["state"]), weights_only=False)  # a pickle within a pickle
        averages = raw["slots"]["average"]
        about = saved["about"]
        stored = [
            Stored(name, aliases, kind, policy, averages[name], persistent=all(persistent))  # once it was not written
            for name, aliases, kind, policy, *persistent in about
        ]
        strategy = saved["strategy"]
        options = Options.model_validate(vars(saved["options"]))  # one of an older release lacks what came later
        empty = State(stored, Progress(), History(), skipped=0, generators=OwnGenerators(seed=options.seed or 0))
        state = parse(SavedState.of(raw), empty, strategy.slots())
        home = Home(saved["into"]) if "into" in saved else None
        if home is not None:
            state.stored = home.housed(state.stored)
        self._consist_of(Core(strategy, options, Binding(None, options, home=home), state))
        self.loads = 1

    def __deepcopy__(self, memo: dict[int, Any]) -> Engine:
        # A copy averages the same model, or the model's copy where that was made first; it never copies the model.
        new = type(self).__new__(type(self))
        memo[id(self)] = new
        new.__setstate__(copy.deepcopy(self.__getstate__(), memo))
        new.updater.listeners = list(self.updater.listeners)
        new.core.knows = self.core.knows
        new.core.binding.model = memo.get(id(self.model), self.model)
        return new
