"""Attributes that are no tensors of a model (a scale, a temperature, a flag), carried over to a copy of its modules."""

from __future__ import annotations

from itertools import chain
from operator import is_
from typing import TYPE_CHECKING, Any

from torch import Tensor

from polyak.engine.averaged_module.copies import CONTAINERS, INTERNAL, contents

if TYPE_CHECKING:
    from collections.abc import Collection, Sequence

    from torch import nn

    from polyak.engine.averaged_module.copies import Copier

__all__ = ["Attributes"]

_ABSENT = object()


class Attributes:
    """Follows what a model's attributes are set to; what was set on the copy stays until the model's own changes.

    Args:
        theirs: The modules of the model.
        ours: The module of the copy for each of them.
        copier: Converts a value of the model's into one for the copy.
    """

    def __init__(self, theirs: Sequence[nn.Module], ours: Sequence[nn.Module], copier: Copier) -> None:
        self._theirs, self._ours, self._copier = theirs, ours, copier
        self._note()

    def follow(self) -> bool:
        """Set what changed on the model since the last call; return whether anything did, modes included."""
        if self._unchanged():
            return False
        for theirs, ours, seen in zip(self._theirs, self._ours, self._seen, strict=True):
            now = vars(theirs)
            for key in [key for key in now if self._differs(key, now[key], seen)]:
                vars(ours)[key] = self._copier.attribute(now[key])
            for key in seen.keys() - now.keys():
                vars(ours).pop(key, None)
        self._note()
        return True

    def reset(self, parts: Collection[nn.Module]) -> None:
        """Set all attributes of some modules of the copy, and their modes, to the model's."""
        for theirs, ours in zip(self._theirs, self._ours, strict=True):
            if ours in parts:
                ours.training = theirs.training
                for key, value in vars(theirs).items():
                    if key not in INTERNAL and not _computed(value):
                        vars(ours)[key] = self._copier.attribute(value)

    def _unchanged(self) -> bool:
        values = [*chain.from_iterable(map(dict.values, map(vars, self._theirs)))]
        return (
            len(values) == len(self._values)
            and all(map(is_, values, self._values))
            and all(_same(held, [*contents(container)]) for container, held in self._containers)
        )

    def _differs(self, key: str, value: object, seen: dict[str, Any]) -> bool:
        if key in INTERNAL or _computed(value):
            return False
        held = self._held.get(id(value)) if _mutable(value) else None
        return seen.get(key, _ABSENT) is not value or (held is not None and not _same(held, [*contents(value)]))

    def _note(self) -> None:
        dicts = [vars(module) for module in self._theirs]
        # What a forward computed is neither followed nor kept alive.
        self._values = [None if _computed(value) else value for value in chain.from_iterable(map(dict.values, dicts))]
        self._seen = [{k: v for k, v in d.items() if k not in INTERNAL and not _computed(v)} for d in dicts]
        settings = chain.from_iterable(map(dict.values, self._seen))
        self._containers = [(value, [*contents(value)]) for value in settings if _mutable(value)]
        self._held = {id(container): held for container, held in self._containers}


def _mutable(value: object) -> bool:
    if type(value) is tuple:
        return any(map(_mutable, value))
    return type(value) in CONTAINERS


def _computed(value: object) -> bool:
    return isinstance(value, Tensor) and not value.is_leaf


def _same(first: Sequence[object], second: Sequence[object]) -> bool:
    return len(first) == len(second) and all(map(is_, first, second))
