"""Notices every change of a model's structure, and of where its tensors and the averages are, without a walk."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import chain
from operator import attrgetter, is_
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from polyak.tensors.entries import PLAIN, STRIDED, Model
from polyak.tensors.located import Located, Storages, plain, refuse_freed

if TYPE_CHECKING:
    from collections.abc import Sequence

__all__ = ["ChangeDetector"]

_PARAMETERS, _BUFFERS, _CHILDREN = map(attrgetter, ("_parameters", "_buffers", "_modules"))
_LAYOUT = (attrgetter("dtype"), attrgetter("device"), attrgetter("shape"))


class ChangeDetector:
    """Remembers what a model holds, in which memory, and where the averages are; a look is a few passes in C.

    Args:
        model: The model.
        live: Its tensors that are averaged or copied, as the adapter gives them.
        stored: What the averager keeps of them.

    Attributes:
        epoch: How often ``unchanged`` found tensors in other memory, as ``parameter.data = ...`` leaves them.

    Raises:
        ModelError: If tensors of the model have no memory.
        StateError: If averages have none.
    """

    def __init__(self, model: Model, live: Sequence[Tensor], stored: Sequence[Tensor]) -> None:
        self._contents = _Contents(model) if isinstance(model, nn.Module) else _Items(model)
        held = [value for value in self._contents.values if isinstance(value, Tensor)]
        self._located = Located(plain([*held, *live]))
        known = {*map(id, self._located.tensors)}
        self._others = [tensor for tensor in live if id(tensor) not in known]
        self._layouts = _layouts(self._others)
        refuse_freed(self._located.tensors)
        self._storages = Storages(stored)
        self.epoch = 0

    def holds(self, model: Model) -> bool:
        """Return whether a mapping has the tensors of the model, which is one too, under the same names in order."""
        return isinstance(self._contents, _Items) and self._contents.same(model)

    def unchanged(self) -> bool:
        """Return whether the same places hold the same tensors in the same layout, and the same ones share memory.

        Raises:
            ModelError: If the memory of the model's tensors was freed.
            StateError: If the memory of the averages was.
        """
        self.epoch += self._storages.moved()
        return (
            self._contents.unchanged()
            and self._located.same_layouts()
            and (not self._others or _layouts(self._others) == self._layouts)
            and self._same_ties()
        )

    def _same_ties(self) -> bool:
        known, now = self._located.addresses, self._located.look()
        if now != known:
            # `head.weight.data = emb.weight.data` ties two tensors, or unties them, and leaves all objects as they are.
            if not len({*now}) == len({*known}) == len({*zip(known, now, strict=True)}):
                return False
            refuse_freed(self._located.tensors)
            self._located.addresses = now
            self.epoch += 1
        return True


class _Contents:
    """What a module and those inside of it hold as parameters, buffers and modules.

    Attributes:
        values: What they hold.
    """

    def __init__(self, model: nn.Module) -> None:
        self._modules = _modules(model)
        holders = self._holders()
        # TorchScript modules hold tensors in objects, new at each look, that are not dicts: they are walked each time.
        self._watchable = all(isinstance(holder, dict) for holder in holders)
        self.values = [value for holder in holders for value in holder.values()]
        self._copies = [*map(dict, holders)] if self._watchable else []
        self._keys = [*map(list, self._copies)]
        # Comparing dictionaries takes the same object for equal, and asks others whether they are.
        self._comparable = all(map(_is_ordinary, self.values))
        self._small = [
            (number, key, value)
            for number, holder in enumerate(self._copies)
            for key, value in holder.items()
            if isinstance(value, Tensor) and value.numel() <= 1
        ]

    def unchanged(self) -> bool:
        """Return whether the same modules hold the same objects under the same names."""
        if not self._watchable:
            return False
        now = self._holders()  # anew: the dictionaries themselves may be others
        if not self._comparable:
            return [*map(list, now)] == self._keys and all(
                map(is_, chain.from_iterable(map(dict.values, now)), self.values)
            )
        try:
            same = now == self._copies
        except Exception:  # noqa: BLE001 - two tensors of several elements have no truth value, nor need others compare
            return False
        return same and all(now[number][key] is value for number, key, value in self._small)

    def _holders(self) -> list[dict[str, Any]]:
        # No tuple for each module: the garbage collector would count them.
        modules = self._modules
        return [*map(_PARAMETERS, modules), *map(_BUFFERS, modules), *map(_CHILDREN, modules)]


class _Items:
    """The items of a mapping that is averaged instead of a module.

    Attributes:
        values: Its tensors.
    """

    def __init__(self, model: Mapping[str, Tensor]) -> None:
        self._model = model
        self._keys, self.values = [*model.keys()], [*model.values()]

    def unchanged(self) -> bool:
        """Return whether the same tensors have the same names, in the same order."""
        return self.same(self._model)

    def same(self, model: Model) -> bool:
        """Return whether a mapping has the same tensors under the same names, in the same order."""
        if not isinstance(model, Mapping):
            return False
        return [*model.keys()] == self._keys and all(map(is_, model.values(), self.values))


def _modules(model: nn.Module) -> list[nn.Module]:
    """Return each module once, wrappers included: what they wrap may be replaced."""
    found: dict[int, nn.Module] = {id(model): model}
    waiting = [model]
    while waiting:
        children = [child for child in waiting.pop()._modules.values() if child is not None and id(child) not in found]  # noqa: SLF001 - see entries.py
        found.update(zip(map(id, children), children, strict=True))
        waiting += children
    return [*found.values()]


def _is_ordinary(value: object) -> bool:
    """Return whether a replacement of a value is either the same object or not equal to it.

    For tensors of one element, whose value is compared too. Comparing two DTensors would ask other ranks.
    """
    if isinstance(value, nn.Module):
        return type(value).__eq__ is object.__eq__
    return value is None or type(value) in PLAIN


def _layouts(tensors: Sequence[Tensor]) -> list[list[Any]]:
    """Return how tensors of subclasses and of other layouts lie in memory, as far as these can say it."""
    strided = [tensor for tensor in tensors if tensor.layout is STRIDED]
    return [*([*map(part, tensors)] for part in _LAYOUT), [*map(Tensor.stride, strided)]]
