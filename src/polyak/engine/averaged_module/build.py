"""Builds the module of an averager: which of its tensors share the average's memory, and which are copies."""

from __future__ import annotations

import copy
from types import FunctionType
from typing import TYPE_CHECKING, Any, NamedTuple, cast

import torch
from torch import Tensor, nn

from polyak.engine.averaged_module.copies import copied
from polyak.errors import ModelError
from polyak.tensors.entries import PLAIN, Entry, Location, modules_of, walk

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from polyak.engine.plan.plan import Plan
    from polyak.tensors.storage import Stored

__all__ = ["Held", "built", "copyable", "rewriting", "version"]

_HARMLESS = frozenset({"torch.nn.modules.module", "transformers.modeling_utils"})
"""The files whose ``train`` and ``eval`` write no tensor."""


class Held(NamedTuple):
    """A tensor of the module.

    Attributes:
        tensor: The tensor.
        average: The name of the average it holds; empty if it holds what the model's tensor does.
        shares: Whether its memory is that of the average, or of the model's parameter.
        buffer: Whether it is a buffer.
        place: Where the module has it.
        source: Where the model has its counterpart.
    """

    tensor: Tensor
    average: str
    shares: bool
    buffer: bool
    place: Location
    source: Location

    def live(self) -> Tensor | None:
        """Return the model's tensor; None if it has another shape now."""
        registry, key = _registry(self.source, buffer=self.buffer), self.source.key
        found = registry[key] if key in registry else None  # noqa: SIM401 - TorchScript's have no get()
        return None if found is None or found.shape != self.tensor.shape else found

    def writes(self) -> int:
        """Return how often the buffers of its module were written; a kernel counts one of them, and writes them all."""
        buffers = cast("nn.Module", self.place.owner)._buffers.values()  # noqa: SLF001 - buffers() is slow
        return sum(version(buffer) for buffer in buffers if buffer is not None)

    def put_back(self) -> None:
        """Put a buffer back in its place, if a forward put another one there."""
        registry = _registry(self.place, buffer=self.buffer)
        if self.buffer and registry[self.place.key] is not self.tensor:
            registry[self.place.key] = self.tensor


def copyable(plan: Plan) -> nn.Module:
    """Return the model of a plan, if a copy of it can compute.

    Raises:
        ModelError: If it is a mapping, is sharded, or has a function as its ``forward``.
    """
    model = plan.model
    if not isinstance(model, nn.Module):
        message = "a mapping of tensors has no forward; use averaged_state_dict(), or average the module itself"
        raise ModelError(message)
    if any(entry.spread for entry in plan.entries):
        message = (
            f"{type(model).__name__} is sharded over ranks, and its layers gather what FSDP2 keeps, not a copy's "
            "tensors; compute with applied(), which swaps the shards in"
        )
        raise ModelError(message)
    for prefix, part in modules_of(model):
        # torch.compile(model.forward) and lambdas: bound to the model.
        if isinstance(vars(part).get("forward"), FunctionType):
            where = prefix.rstrip(".") or type(model).__name__
            message = (
                f"{where} has a function as its own `forward`, which no copy can have; compute with applied() instead"
            )
            raise ModelError(message)
    return model


def built(plan: Plan, model: nn.Module) -> tuple[nn.Module, list[Held]]:
    """Return a copy of the model in eval mode with tensors of its own.

    Those that share memory, and those of a class of their own, have their values; the others have room for them.

    Raises:
        ModelError: If the copy uses tensors of the model.
    """
    entries = walk(model)
    stored = {id(e.tensor): s for e, s in zip(plan.entries, plan.stored, strict=True)}
    risky = {id(part) for top in rewriting(model) for part in top.modules()}
    shared = {
        id(entry.tensor)
        for entry in entries
        if _alike(entry, stored) and not any(id(location.owner) in risky for location in entry.locations)
    }
    own: dict[int, Any] = {}
    for entry in entries:
        memory = stored[id(entry.tensor)].average if id(entry.tensor) in stored else entry.tensor
        made = _made(entry.tensor, memory if id(entry.tensor) in shared else None)
        own.update({id(location.tensor): made for location in entry.locations})
    module = copied(model, own)
    found = {location.name: location for entry in walk(module) for location in entry.locations}
    held = []
    for entry in entries:
        names = [location.name for location in entry.locations]
        theirs = {id(location.tensor) for location in entry.locations}
        if missing := [name for name in names if name not in found or id(found[name].tensor) in theirs]:
            message = (
                f"the copy of {type(model).__name__} has no {missing[0]} of its own; compute with applied() instead"
            )
            raise ModelError(message)
        average = stored[id(entry.tensor)].name if id(entry.tensor) in stored else ""
        places = {id(found[location.name].tensor): (found[location.name], location) for location in entry.locations}
        for place, source in places.values():
            place.tensor.requires_grad_(False)  # noqa: FBT003 - torch types it so
            held.append(Held(place.tensor, average, id(entry.tensor) in shared, entry.kind == "buffer", place, source))
    module.eval()
    return module, held


def rewriting(model: nn.Module) -> Iterator[nn.Module]:
    """Yield the outermost modules that may write their weights in place: by ``train()``, ``eval()`` or ``merge()``."""
    waiting = [model]
    while waiting:
        module = waiting.pop()
        kind = type(module)
        defined = {getattr(getattr(kind, name), "__module__", None) for name in ("train", "eval")}
        if defined <= _HARMLESS and not hasattr(kind, "merge"):
            waiting += reversed([*module.children()])
        else:
            yield module


def _registry(location: Location, *, buffer: bool) -> dict[str, Tensor | None]:
    owner = cast("nn.Module", location.owner)
    return cast("dict[str, Tensor | None]", owner._buffers if buffer else owner._parameters)  # noqa: SLF001 - getattr() computes parametrised ones


def _alike(entry: Entry, stored: Mapping[int, Stored]) -> bool:
    if entry.kind == "buffer":
        return False
    kept = stored.get(id(entry.tensor))
    if kept is None:
        return type(entry.tensor) in PLAIN  # a frozen base costs nothing
    return (kept.average.dtype, kept.average.device) == (entry.tensor.dtype, entry.tensor.device)


def _made(tensor: Tensor, memory: Tensor | None) -> Tensor:
    """Return the substitute for a tensor: one that shares this memory, or room for values."""
    if memory is not None:
        made = memory.detach()
    elif type(tensor) in PLAIN:
        made = torch.empty_like(tensor.detach())
    else:
        try:
            return copy.deepcopy(tensor)
        except RuntimeError:  # it has a history
            return tensor.detach().clone()
    return nn.Parameter(made, requires_grad=False) if isinstance(tensor, nn.Parameter) else made


def version(tensor: Tensor) -> int:
    """Return how often a tensor was written; -1 where torch does not count."""
    return -1 if tensor.is_inference() else tensor._version  # noqa: SLF001 - torch has no other count of writes
