"""The module that computes with the average: the model's structure around tensors of its own."""

from __future__ import annotations

from contextlib import contextmanager
from operator import attrgetter
from sys import getrefcount
from typing import TYPE_CHECKING, Any, NamedTuple, cast
from weakref import ref

import torch
from torch import Tensor, nn

from polyak.engine.averaged_module.attributes import Attributes
from polyak.engine.averaged_module.build import built, copyable, rewriting, version
from polyak.engine.averaged_module.copies import Copier
from polyak.engine.averaged_module.hooks import RootHooks
from polyak.kernels.eager.operations import copy_all
from polyak.tensors.entries import PLAIN, modules_of, walk

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence

    from polyak.engine.averaged_module.build import Held
    from polyak.engine.plan.plan import Plan

__all__ = ["AveragedModule"]

_WRITES = attrgetter("_version")


class _Read(NamedTuple):
    """The source of a copy, and what shows whether source or copy has changed since."""

    live: Tensor
    address: int
    version: int
    own: int


class AveragedModule:
    """The eval-mode module of an averager, which ``follow`` keeps in step.

    A parameter shares the memory of its average if that has the model's dtype and device. A parameter that is not
    averaged shares the model's memory. All else is a copy: converted averages; buffers, which a forward in train
    mode writes; tensor subclasses that are not averaged; and all tensors below a module with its own ``train()``,
    ``eval()`` or ``merge()``, which may write weights in place.

    Args:
        plan: The plan of the averager's own model.
        look: Returns what is called before each forward of the module; None once there is no averager.

    Attributes:
        root: The module.
        moment: The moment of the average that the module holds; None if it has to be read again.
    """

    def __init__(self, plan: Plan, look: Callable[[], Callable[[], None] | None]) -> None:
        self.moment: object = None
        model = copyable(plan)
        self._plan, self._made_for = ref(plan), _signature(plan)
        with torch.inference_mode(mode=False), torch.no_grad():
            self.root, held = built(plan, model)
        self._parts = [part for _, part in modules_of(self.root)]
        theirs = [part for _, part in modules_of(model)]
        counterparts: dict[int, Any] = {id(one.source.tensor): one.tensor for one in held}
        counterparts |= {id(a): b for a, b in zip(theirs, self._parts, strict=True)}
        self._attributes = Attributes(theirs, self._parts, Copier(model, counterparts))
        self._rewriting = [*rewriting(self.root)]
        self._shared = [one for one in held if one.average and one.shares]
        self._own = [one for one in held if one.average and not one.shares]
        self._frozen = [one for one in held if not one.average and one.shares]
        self._kept = [one for one in held if not one.average and not one.shares]
        self._buffers = [one.tensor for one in self._own if one.buffer]
        self._outdated = False
        self._read: dict[int, _Read] = {}
        self._note([one for one in self._kept if type(one.tensor) not in PLAIN])
        self._written: list[int] = []
        # TorchScript takes no hooks: such a module is brought up to date only where the averager is asked for it.
        if not isinstance(self.root, torch.jit.ScriptModule):
            hooks = self.root._forward_pre_hooks  # noqa: SLF001 - a registered hook would be copied, pickled and scripted
            self.root._forward_pre_hooks = RootHooks(hooks, look)  # noqa: SLF001 - as above
        self._tensors = [one.tensor for one in held]
        self._form = self._formed()
        self._counted = [*self._parts, *self._tensors]
        self._counts = [1 << 62] * len(self._counted)

    def fits(self, plan: Plan) -> bool:
        """Return whether the model and the module still have the modules, tensors, dtypes and devices of the start."""
        if self._plan() is not plan:
            if self._made_for != _signature(plan):
                return False
            self._plan = ref(plan)
        return not self._outdated and self._form == self._formed()

    def is_held(self) -> bool:
        """Return whether anything else refers to a module or tensor of it; the first call counts what is normal."""
        counts = [*map(getrefcount, self._counted)]
        # References that only waited for the garbage collector are gone for good.
        self._counts = [*map(min, counts, self._counts)]
        return counts != self._counts

    def follow(self, averages: Callable[[], Mapping[str, Tensor]], moment: object) -> None:
        """Compute with the average of a moment from now on; costs little if the module holds it already.

        Args:
            averages: Returns the tensor that holds the average now, by name.
            moment: The moment; None if the average may have changed without being counted.
        """
        with torch.inference_mode(mode=False), torch.no_grad():
            changed = self._attributes.follow()
            if moment is None or moment != self.moment or (changed and self._rewriting):
                self.moment = None
                self._write(averages())
                self.moment = moment
            elif not self.root.training and self._written != self._versions():
                self._take([one for one in self._own if one.buffer], averages())  # a forward in train mode wrote them
            self._take([one for one in self._kept if one.buffer or not self._rewriting], {})
            for one in self._frozen:
                if (live := one.live()) is not None:
                    _point(one.tensor, live)
        self._written = self._versions()

    def _write(self, averages: Mapping[str, Tensor]) -> None:
        with self._rewritten():
            for one in self._shared:
                if one.average in averages:
                    _point(one.tensor, averages[one.average])
            self._take(self._own, averages)

    @contextmanager
    def _rewritten(self) -> Iterator[None]:
        """Let modules that merge their weights merge anew, from the weights and flags that the model has."""
        if not self._rewriting:
            yield
            return
        modes = {part: part.training for part in self._parts}
        try:
            self._attributes.reset({part for top in self._rewriting for part in top.modules()})
            for one in self._kept:
                if not one.buffer and type(one.tensor) in PLAIN:
                    self._read.pop(id(one.tensor), None)
            yield
            self._take(self._kept, {})
            for top in self._rewriting:
                top.train(modes[top])
        finally:
            for part, training in modes.items():
                part.training = training

    def _take(self, held: Sequence[Held], averages: Mapping[str, Tensor]) -> None:
        """Copy averages, or what changed of the model's own tensors, into tensors of the module."""
        pairs = []
        for one in held:
            source = averages.get(one.average) if one.average else self._changed(one)
            if source is not None:
                one.put_back()
                pairs.append((one, source.detach()))
        plain = [(one.tensor, source) for one, source in pairs if _plain(one.tensor, source)]
        if plain:
            copy_all([tensor for tensor, _ in plain], [source for _, source in plain])
        for one, source in pairs:
            if one.tensor.shape != source.shape:
                one.tensor.data = source.to(one.tensor.device, one.tensor.dtype, copy=True)
            elif not _plain(one.tensor, source):
                try:
                    one.tensor.copy_(source)
                except (NotImplementedError, RuntimeError):  # a subclass without it: the next access builds another
                    self._outdated = True
        self._note([one for one, _ in pairs if not one.average])

    def _note(self, copies: Sequence[Held]) -> None:
        """Remember what of the model these are copies of."""
        for one in copies:
            if (live := one.live()) is not None:
                self._read[id(one.tensor)] = _Read(live, _address(live), version(live), one.writes())

    def _changed(self, one: Held) -> Tensor | None:
        """Return the model's tensor that a tensor is a copy of; None if it is up to date, or the module's own now."""
        live, read = one.live(), self._read.get(id(one.tensor))
        if live is None or read is None:
            return live
        if one.buffer:
            # Statistics that a teacher in train mode measured itself stay its own.
            return live if read.own == one.writes() else None
        same = live is read.live and _address(live) == read.address and -1 < version(live) == read.version
        return None if same else live

    def _versions(self) -> list[int]:
        return [*map(_WRITES, self._buffers)]

    def _formed(self) -> list[object]:
        """Return the modules and parameters of the module and their forms, which tools in place change."""
        registries = [registry for p in self._parts for registry in (p._parameters, p._modules)]  # noqa: SLF001 - named_parameters() is slow
        return [
            *(id(value) for registry in registries for value in registry.values()),
            *map(type, self._parts),
            *((tensor.dtype, tensor.device) for tensor in self._tensors),
        ]


def _signature(plan: Plan) -> tuple[object, ...]:
    model = cast("nn.Module", plan.model)
    averaged = {id(entry.tensor) for entry in plan.entries}
    others = tuple(
        (entry.aliases, entry.tensor.shape, entry.tensor.dtype, entry.tensor.device)
        for entry in walk(model)
        if id(entry.tensor) not in averaged
    )
    # A buffer may change shape, and the module's follows.
    layouts = ((s.aliases, t.dtype, t.device) for s, t in zip(plan.stored, plan.live, strict=True))
    return tuple(model.modules()), others, *layouts


def _point(tensor: Tensor, memory: Tensor) -> None:
    if (tensor.dtype, tensor.device) != (memory.dtype, memory.device):
        tensor.data = memory.to(tensor.device, tensor.dtype, copy=True)
    elif tensor.data_ptr() != memory.data_ptr() or tensor.shape != memory.shape:
        tensor.data = memory.data


def _plain(tensor: Tensor, source: Tensor) -> bool:
    return type(tensor) in PLAIN and type(source) in PLAIN and tensor.shape == source.shape


def _address(tensor: Tensor) -> int:
    return tensor.data_ptr() if type(tensor) in PLAIN else id(tensor)
