"""Several averages of one model in one pass over its weights."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any

from typing_extensions import override

from polyak.engine.averager import Averager
from polyak.engine.cuda_graphs import recording
from polyak.engine.doubts import doubt_resumed
from polyak.engine.pending import PendingUpdate, Seen
from polyak.engine.plan.tensor_update import TensorUpdate
from polyak.engine.schema import FORMAT, check_bank
from polyak.engine.sources import Sources
from polyak.engine.transaction import carry_out, whole
from polyak.engine.unsettled import alone, jointly
from polyak.errors import AttributeAccessError, UnknownAverageError
from polyak.errors.attributes import AttributeHints
from polyak.errors.calls import explained, refuse_arguments
from polyak.errors.formatting import shown
from polyak.tensors.entries import as_model

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from contextlib import AbstractContextManager

    from polyak.engine.engine import Engine
    from polyak.engine.passes import Pass
    from polyak.engine.plan.plan import Plan
    from polyak.tensors.entries import Given, Model

__all__ = ["Bank"]


class Bank(AttributeHints, Mapping[str, "Averager"]):
    """Several averages of one model, by name; made by ``polyak.bank``. Each is a whole averager.

    An update reads the weights once and moves all averages that are due; each is exactly what it would be alone
    (short averages but for the random numbers of their rounding).

    Often confused with: a list of averagers, each of which reads the weights anew.

    Examples:
        >>> import polyak, torch
        >>> model = torch.nn.Linear(3, 1)
        >>> averages = polyak.bank(model, {"short": {"name": "ema", "decay": 0.9}, "mean": "swa"}, every=2)
        >>> for step in range(1, 7):
        ...     averages.update(step=step)
        >>> {name: averager.n for name, averager in averages.items()}
        {'short': 3, 'mean': 3}
        >>> saved = averages.state_dict()
        >>> averages.load_state_dict(saved)
    """

    _kind = "bank"
    _public = "Bank"
    _context = "bank.applied('name')"

    def __init__(self, averagers: Mapping[str, Engine]) -> None:
        self._averagers = dict(averagers)
        self._joint: dict[tuple[int, ...], tuple[list[Plan], TensorUpdate]] = {}
        self._sources = Sources()

    @override
    def __setattr__(self, name: str, value: object) -> None:
        if not name.startswith("_"):
            first = next(iter(self))
            message = f"the bank's {name!r} cannot be set; its averages have settings: bank[{first!r}].configure(...)"
            raise AttributeAccessError(message)
        super().__setattr__(name, value)

    @override
    def _hint(self, name: str) -> str:
        if name in vars(self).get("_averagers", ()):
            return f" Its averages are found by name: bank[{name!r}]."
        if hasattr(Averager, name) and not name.startswith("_"):
            return f" Its averages have one: bank['name'].{name}"
        return super()._hint(name)

    @override
    def __getitem__(self, name: str) -> Averager:
        if name not in self._averagers:
            message = f"the bank has no average {shown(name)}; it has {', '.join(map(repr, self))}"
            raise UnknownAverageError(message)
        return self._averagers[name]

    @override
    def __iter__(self) -> Iterator[str]:
        return iter(self._averagers)

    @override
    def __len__(self) -> int:
        return len(self._averagers)

    def __repr__(self) -> str:
        return f"<bank of {', '.join(f'{name}: {averager!r}' for name, averager in self.items())}>"

    def update(
        self, model: Given | None = None, *more: Any, step: int | None = None, lr: float | None = None, **unknown: Any
    ) -> None:
        """Take the weights as they are now into every average; call it once per real optimiser step.

        Args:
            model: The model. Defaults to the bank's own.
            step: The optimiser step. Defaults to a count of the calls.
            lr: The learning rate, for strategies that use it.
            more: Refused.
            unknown: Refused.

        Raises:
            PolyakError: If ``Averager.update`` would raise. No average has changed then.
        """
        if more or unknown:
            instead = "Each average has settings, bank['name'].configure(decay=0.5), and its own rate"
            refuse_arguments(more, unknown, "the model, step= and lr=", instead)
        model = None if model is None else as_model(model)
        if recording() or any(engine.updater.announced for engine in self._averagers.values()):
            for engine in self._averagers.values():
                engine.update(model, step=step, lr=lr)
            return
        if self.sources.leave_out(lambda: self._first.updater.is_own(model)):
            return
        with self._locked():
            begun = [engine.updater.prepare(model, step, lr) for engine in self._averagers.values()]
            due = [update for update in begun if isinstance(update, PendingUpdate)]
            passes = [self._passing(updates) for updates in _passes_of(due)]
            carry_out(passes, [seen for seen in begun if isinstance(seen, Seen)])

    def advance(self, *, step: int | None = None, lr: float | None = None) -> None:
        """Count the updates that a CUDA graph or a compiled step is about to make; see ``Averager.advance``."""
        with self._locked():
            ready = [(engine, *engine.updater.advancing(step, lr)) for engine in self._averagers.values()]

            def make() -> None:
                for _, _, act in ready:
                    act()

            whole(make)
            for engine, update, _ in ready:
                if isinstance(update, PendingUpdate):
                    engine.updater.announce(update)

    def synchronize(self) -> None:
        """Wait until the last update is done, where averages live on another device than the model."""
        for engine in self._averagers.values():
            engine.synchronize()

    def release(self) -> None:
        """Let the weights be overwritten by what is enqueued from now on, once offloaded averages have read them."""
        for engine in self._averagers.values():
            engine.updater.release()

    @property
    def sources(self) -> Sources:
        """Who makes the updates."""
        return self._sources

    @property
    def _first(self) -> Engine:
        return next(iter(self._averagers.values()))

    @property
    def model(self) -> Model | None:
        """The model, without wrappers; None after unpickling."""
        return self._first.model

    def guard(self, by: int) -> None:
        """Count one optimiser more, or less, that calls ``release`` before each step."""
        for engine in self._averagers.values():
            engine.updater.guards += by

    @explained("Name the average: bank.applied('mean')")
    def applied(self, name: str, model: Given | None = None) -> AbstractContextManager[None]:
        """Return a context in which a model computes with one of the averages; see ``Averager.applied``."""
        return self[name].applied(model)

    def describe(self) -> str:
        """Return in words what is done with every tensor, average by average."""
        return "\n\n".join(f"{name}: {averager.describe()}" for name, averager in self.items())

    def state_dict(self) -> dict[str, Any]:
        """Return all that an exact resume needs, of all averages: copies of tensors and plain types."""
        with self._locked():
            return {"format": FORMAT, "bank": {name: averager.state_dict() for name, averager in self.items()}}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on exactly where the state was taken; all averages are loaded or none.

        Raises:
            StateError: If ``state`` is no state of a bank of the same names, or one of its states does not fit.
        """
        states = check_bank(state, self)
        with self._locked():
            received = [(engine, engine.receive(states[name])) for name, engine in self._averagers.items()]

            def adopt() -> None:
                self._joint.clear()
                self.sources.forget()
                for engine, one in received:
                    engine.adopt(one)

            whole(adopt)
            for engine in self._averagers.values():
                doubt_resumed(engine.core)

    @contextmanager
    def _locked(self) -> Iterator[None]:
        with ExitStack() as stack:
            for engine in self._averagers.values():
                stack.enter_context(engine.lock)
            yield

    def _passing(self, updates: Sequence[PendingUpdate]) -> Pass:
        if _needs_own_pass(updates[0]):
            return alone(updates[0])
        return jointly(updates, self._joint_update([update.plan for update in updates]))

    def _joint_update(self, plans: list[Plan]) -> TensorUpdate:
        key = tuple(map(id, plans))
        if key not in self._joint:
            current = {id(engine.plan) for engine in self._averagers.values()}
            self._joint = {k: v for k, v in self._joint.items() if current.issuperset(k)}
            self._joint[key] = plans, TensorUpdate([plan.lane for plan in plans])
        return self._joint[key][1]

    def __getstate__(self) -> dict[str, Any]:
        return {"_averagers": self._averagers}

    def __setstate__(self, saved: dict[str, Any]) -> None:
        Bank.__init__(self, saved["_averagers"])


def _needs_own_pass(update: PendingUpdate) -> bool:
    return update.plan.offload is not None or tuple(update.moves) != (("average", "weights", update.rate),)


def _passes_of(due: Sequence[PendingUpdate]) -> list[list[PendingUpdate]]:
    """Return groups of updates that share a pass.

    Only averages of the same weights are checked together: what one of them does not average cannot stop it.
    """
    passes: dict[object, list[PendingUpdate]] = {}
    for update in due:
        alone = id(update) if _needs_own_pass(update) else 0
        checked = update.plan.averaged if update.updater.core.checks else None
        passes.setdefault((update.updater.core.options.nonfinite, checked, alone), []).append(update)
    return [*passes.values()]
