"""An averager's hold on a model: which stored tensor belongs to which live one, and whose values the model has now."""

from __future__ import annotations

import threading
from contextlib import contextmanager, nullcontext, suppress
from typing import TYPE_CHECKING, Any, cast
from weakref import WeakSet

from torch import nn

from polyak.engine.nonfinite import looks
from polyak.engine.plan.plan import Plan, refuse_average
from polyak.errors import AppliedError, ConfigError, PolyakError, UnboundError
from polyak.kernels.select import check_available
from polyak.ranks.consensus import ranks_of
from polyak.ranks.unresponsive import answered
from polyak.tensors.applied_writes import complain, put_back
from polyak.tensors.collector import collector_paused
from polyak.tensors.entries import as_model
from polyak.tensors.growth import Growth, settled, with_past
from polyak.tensors.owner import Owner
from polyak.tensors.policies import Policy, policies
from polyak.tensors.sharding.adapter import adapter_for
from polyak.tensors.storage import allocate, as_device, as_dtype, check_storable
from polyak.tensors.swap import Swap, in_force, swapped
from polyak.tensors.wrappers import broadcasters, buffers_kept, refuse_sharded, root_of

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Container, Iterator, Sequence
    from contextlib import AbstractContextManager

    from torch import Tensor

    from polyak.engine.options import Options
    from polyak.engine.state import State
    from polyak.tensors.adapter import Adapter
    from polyak.tensors.entries import Entry, Given, Model
    from polyak.tensors.home import Home
    from polyak.tensors.storage import Stored

__all__ = ["Binding"]


class Binding:
    """Pairs an averager's tensors with a model's, again wherever the model changed, and swaps their values.

    Attributes:
        model: The averager's own model without wrappers; None after unpickling.
        plan: The last plan; that of the applied model while the average is applied.
        handed_out: The modules that compute with the average.
        home: The user's tensors that hold the average, if it lives there.
        lock: Held while the averages, or the model's values for them, are written or copied.
    """

    def __init__(
        self, model: Given | None, options: Options, adapter: Adapter | None = None, home: Home | None = None
    ) -> None:
        if isinstance(model, nn.Module):
            refuse_sharded(model)  # with its wrappers
        self._wrappers: WeakSet[nn.Module] = WeakSet()
        self.plan: Plan | None = None
        self.model = None if model is None else self.root(model)
        self.handed_out: WeakSet[nn.Module] = WeakSet()
        self._growth = Growth()
        self._applied: Plan | None = None
        self.lock = threading.RLock()
        self._options = options
        self._given = adapter
        self.home = home

    def allocate(self, slots: Sequence[str]) -> list[Stored]:
        """Return new storage for the model's tensors, with these slots, holding their values now, and plan for it."""
        with collector_paused():
            adapter = self.adapter(self.model)
            entries = adapter.entries(cast("Model", self.model))  # which says what is no model, None included
            chosen = self._policies(entries, absent=self._growth.look(self.own()))
            check_storable(entries, chosen)
            if self.holds_average(self.own()):
                message = (
                    "the model holds another average now, which is no weights to start from; leave applied() first"
                )
                raise AppliedError(message)
            options = self._options
            check_available(options.kernel)
            kept = [(entry, policy) for entry, policy in zip(entries, chosen, strict=True) if policy != "skip"]
            stored = allocate(kept, slots, device=as_device(options.device), dtype=as_dtype(options.dtype))
            stored = self._housed(stored, entries)
            self.plan = Plan(self.own(), stored, [entry for entry, _ in kept], options, adapter)
            self.follow(options)
            return stored

    def follow(self, options: Options) -> None:
        """Go on with other options.

        Raises:
            ConfigError: If the ranks of a sharded model would ask each other beside the training.
        """
        plan, checks = self.plan, looks(options.nonfinite)
        if checks and plan is not None and plan.offload is not None and plan.lane.agree is not None:
            message = (
                f"with nonfinite={options.nonfinite!r} the ranks of a sharded model ask each other, which cannot "
                f"be done where device={options.device!r} averages; set nonfinite='hold', the default"
            )
            raise ConfigError(message)
        self._options = options

    def adapter(self, root: Model | None) -> Adapter:
        """Return how to reach the tensors of a model."""
        return self._given or adapter_for(root)

    def left_alone(self) -> list[Entry]:
        """Return the entries of the averager's own model that are skipped."""
        entries = self.adapter(self.own()).entries(self.own())
        chosen = self._policies(entries, settled=[entry.name for entry in entries])
        return [entry for entry, policy in zip(entries, chosen, strict=True) if policy == "skip"]

    def own(self) -> Model:
        """Return the averager's own model."""
        if self.model is None:
            message = "the averager has no model (it was unpickled); give it one: averager.update(model)"
            raise UnboundError(message)
        return self.model

    def optional(self, state: State) -> set[str]:
        """Follow the averager's own model, if it can be; return the buffers that a state may have and it lacks now."""
        if self.model is not None:
            with suppress(PolyakError):
                self.planned(self.model, state)
        return self._growth.optional(copied=self._options.buffers in ("copy", "skip"))

    def root(self, model: Given | None) -> Model:
        """Return a given model without wrappers, or the averager's own."""
        if model is None:
            return self.own()
        if not isinstance(model, nn.Module):
            given = as_model(model)
            # Tensors that are given in order are new names for the same ones at each call.
            return self.plan.model if self.plan is not None and self.plan.watch.holds(given) else given
        root = root_of(model)
        if root is not model:
            self._wrappers.update(broadcasters(model))
        return root

    def holds_average(self, root: Model) -> bool:
        """Return whether a model holds an average now, this averager's or another's."""
        if not in_force:
            return False
        return self.depth > 0 or swapped(lambda: [entry.tensor for entry in self.adapter(root).entries(root)])

    def planned(self, root: Model, state: State, *, adopt: bool = True) -> Plan:
        """Return the plan for a model: the cached one, or a new one where the model is not as it was.

        Tensors that were tied, untied or moved to another device since are followed in the state's storage, and so are
        buffers that came, went or changed shape. A model that is not to be adopted is only written to.
        """
        self.rehouse(state)
        plan = self.plan
        if plan is None or not plan.is_current(root):
            plan = self._plan(root, state, adopt=adopt)
        plan.refresh()
        return plan

    def rehouse(self, state: State) -> None:
        """Follow the average to where its user has moved it."""
        if self.home is not None and self.home.moved():
            self.home.look()
            state.stored, self.plan = self.home.housed(state.stored), None

    def _housed(self, stored: list[Stored], entries: Sequence[Entry]) -> list[Stored]:
        """Return the stored tensors with their averages in the user's tensors, if they live there.

        Raises:
            ConfigError: If the model is sharded.
            MismatchError: If the user's tensors are not those of the model, or share their memory.
        """
        if self.home is None:
            return stored
        if any(entry.spread for entry in entries):
            message = "into= does not go with a sharded model, whose averages are spread like its parameters"
            raise ConfigError(message)
        housed = self.home.housed(stored, entries)
        refuse_average(entries, housed, handed_out=False)
        return housed

    def _plan(self, root: Model, state: State, *, adopt: bool) -> Plan:
        plan, adapter = self.plan, self.adapter(root)
        entries = adapter.entries(root)
        if plan is not None and plan.is_current(root):  # it only showed its tensors otherwise
            return plan
        if adopt:
            refuse_average(entries, state.stored, handed_out=root in self.handed_out)
        options = self._options
        chosen = self._policies(entries, settled=settled(entries, state.stored))
        kept = with_past(entries, chosen, state.stored)
        bound = plan.bound() if plan is not None and plan.model is root else {}
        place = as_device(options.device), as_dtype(options.dtype)
        stored, restarted = self._growth.paired(root, kept, state.stored, bound, options.match or "name", place)
        stored = self._housed(stored, entries)
        plan = Plan(root, stored, [entry for entry, _ in kept], options, adapter)
        if adopt:
            self._growth.warn(restarted)
            self._growth.look(root)
            # The state first: a plan never moves tensors that are not the state's, even where Ctrl-C strikes here.
            if {*map(id, stored)} != {*map(id, state.stored)}:
                state.stored = stored
            self.plan = plan
        return plan

    @property
    def depth(self) -> int:
        """How many ``applied()`` contexts are open."""
        swap = self._swap
        return 0 if swap is None else len(swap.users)

    @property
    def is_entered(self) -> bool:
        """Whether a context is open, or is being opened by another thread: it knows which tensors to exchange."""
        return self._swap is not None

    @property
    def _swap(self) -> Swap | None:
        """What put the average into the model."""
        return next((swap for swap in [*in_force] if swap.holder is self), None)

    def holding(self, stored: Sequence[Stored]) -> list[Tensor]:
        """Return the tensors that hold the average now; while it is applied, the model's where exchanged."""
        with self.lock:
            places = {} if (swap := self._swap) is None else swap.places()
        return [places.get(id(s.average), s.average).detach() for s in stored]

    @contextmanager
    def applied(self, planned: Callable[[], Plan], root: Model | None = None) -> Iterator[None]:
        """Swap the values in for the first context of an owner and out after the last one, whatever happens.

        Args:
            planned: Returns the plan of the model.
            root: The model, where it was named; contexts inside of this one are of the same model.
        """
        swap, plan, user, failed = self._swap, self._applied, object(), True
        if swap is not None and plan is not None and swap.owner.covers(Owner.current()):
            if root is not None and root is not plan.model:
                message = "applied(model) while another model computes with the average; leave that context first"
                raise AppliedError(message)
            around: AbstractContextManager[None] = nullcontext()
        else:
            plan = self._applied = self.ready(planned)
            swap = Swap(self, [s.average for s in plan.stored], plan.live)
            around = _naming_lost_ranks(plan)
        try:
            with around, buffers_kept(self._wrappers):
                try:
                    try:
                        self._enter(swap, plan, user)
                        yield
                    finally:
                        self._leave(swap, plan, user)
                finally:
                    # Ctrl-C may have struck before the first of these began, or inside it; twice is once.
                    self._leave(swap, plan, user)
            failed = False
        finally:
            if swap not in in_force:
                complain(swap, plan, failed=failed)

    def ready(self, planned: Callable[[], Plan]) -> Plan:
        """Return the plan of a model that is ready for values written into its tensors."""
        plan = planned()
        plan.adapter.before_swap(plan.model)
        plan = planned()  # to be ready may be to have other memory
        plan.refuse_read_only()
        return plan

    def _enter(self, swap: Swap, plan: Plan, user: object) -> None:
        if swap not in in_force:
            swap.claim()
            with self.lock:
                swap.put()
            plan.adapter.after_swap(plan.model)
        swap.users.append(user)

    def _leave(self, swap: Swap, plan: Plan, user: object) -> None:
        if user not in swap.users and swap not in in_force:
            return
        others = [other for other in swap.users if other is not user]
        if others:
            swap.users[:] = others
            return
        try:
            plan.adapter.before_swap(plan.model)
        finally:  # a rank that is gone keeps the model from being made ready, and not its shards from being written
            with self.lock:
                swap.take()
                put_back(swap, plan)
        plan.adapter.after_swap(plan.model)
        swap.users.clear()

    def _policies(
        self, entries: Sequence[Entry], *, absent: Collection[str] = (), settled: Container[str] | None = None
    ) -> list[Policy]:
        options = self._options
        given: dict[str, Any] = {"buffers": options.buffers, "include": options.include, "exclude": options.exclude}
        return policies(entries, **given, absent=absent, settled=settled or (), strict=settled is None)


def _naming_lost_ranks(plan: Plan) -> AbstractContextManager[None]:
    """Return a context that names a lost rank while the ranks of a sharded model compute with the average."""
    meshes = [stored.spread.mesh for stored in plan.stored if stored.spread]
    rest = "The model has its own weights again; start all ranks again from the last checkpoint."
    return answered("compute with the average", rest, ranks=ranks_of(meshes)) if meshes else nullcontext()
