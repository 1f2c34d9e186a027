"""Notices every change of a model's structure without walking it."""

from __future__ import annotations

from itertools import chain
from operator import attrgetter, getitem, is_
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from polyak.errors import ModelError
from polyak.tensors.entries import PLAIN, STRIDED, Model
from polyak.tensors.kernels import KernelName, reads
from polyak.tensors.kernels.readings import Contents, Layouts, contents_of, layouts_of
from polyak.tensors.wrappers import dtensor

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence

__all__ = ["Watch"]

_EMPTY: dict[str, Any] = {}  # for most modules hold nothing in most of their dictionaries
_LAYOUT = (attrgetter("dtype"), attrgetter("device"), attrgetter("shape"))


class Watch:
    """Remembers a model's dictionaries and the layout of its tensors; comparing them is a few passes in C.

    Args:
        model: The model.
        live: Its tensors that are averaged or copied, as the adapter gives them.
        kernel: The kernel that was asked for: whether a compiled pass may be made.

    Attributes:
        epoch: How often ``unchanged`` found tensors in other memory, as ``parameter.data = ...`` leaves them.
    """

    def __init__(self, model: Model, live: Sequence[Tensor], kernel: KernelName = "auto") -> None:
        holders = _holders(model)
        # What TorchScript modules hold tensors in is no dict and cannot be watched: such a model is walked anew.
        self._watchable = not isinstance(model, nn.Module) or all(isinstance(holder, dict) for holder in holders)
        self._holders = holders if self._watchable else []
        filled = [holder for holder in self._holders if holder]
        self._copies = [dict(holder) if holder else _EMPTY for holder in self._holders]
        # Comparing dictionaries finds equal keys with the same objects. Where a value is another object it is compared
        # with the old one, and only tensors of several elements, which have no truth value, surely differ from it.
        doubtful = [
            (holder, key, value)
            for holder in filled
            for key, value in holder.items()
            if not (_differs_from_others(value) and isinstance(holder, dict))
        ]
        self._doubtful = [*zip(*doubtful, strict=True)] or [(), (), ()]
        # Two DTensors are compared by asking the other ranks, which may not be here: such models by their objects only.
        kind = dtensor()
        self._spread = kind is not None and any(isinstance(v, kind) for holder in filled for v in holder.values())
        self._live = live
        self._layouts = _layouts(live)
        self._guard: Callable[..., bool] | None = None
        held = [value for holder in filled for value in holder.values()]
        known = {*map(id, held)}
        everywhere = [*held, *(tensor for tensor in live if id(tensor) not in known)]
        self._addressed = [t for t in everywhere if type(t) in PLAIN and t.layout is STRIDED]
        self._addresses = [*map(Tensor.data_ptr, self._addressed)]
        _refuse_freed(self._addressed)
        everything = {*map(id, self._addressed)}.issuperset(map(id, live))
        self._contents = contents_of(self._holders)
        self._readings = layouts_of(self._addressed) if reads(kernel) and everything and self._addressed else None
        self.epoch = 0
        for readings in (self._contents, self._readings):
            if readings is not None:
                readings.same()
                readings.confirm()  # it is what was remembered above

    def unchanged(self) -> bool:
        """Return whether the same places hold the same tensors in the same layout, and the same ones share memory."""
        return (
            self._watchable
            and _confirmed(self._contents, self._same_objects)
            and _confirmed(self._readings, lambda: self._compare_layouts() and self._same_ties())
        )

    def _same_ties(self) -> bool:
        addresses = [*map(Tensor.data_ptr, self._addressed)]
        if addresses != self._addresses:
            # `head.weight.data = emb.weight.data` ties two tensors, or unties them, and leaves all objects as they are.
            pairs = {*zip(self._addresses, addresses, strict=True)}
            if not len({*addresses}) == len({*self._addresses}) == len(pairs):
                return False
            _refuse_freed(self._addressed)
            self._addresses = addresses
            self.epoch += 1
        return True

    def _same_objects(self) -> bool:
        if self._spread:
            now, then = chain(*map(_items, self._holders)), chain(*map(_items, self._copies))
            return [*map(len, self._holders)] == [*map(len, self._copies)] and all(map(is_, now, then))
        try:
            same = self._holders == self._copies
        except (RuntimeError, TypeError, ValueError):  # tensors of several elements have no truth value
            return False
        owners, keys, values = self._doubtful
        return same and all(map(is_, map(getitem, owners, keys), values))

    def _compare_layouts(self) -> bool:
        if self._guard is not None and self._guard(*self._live):
            return True
        same = _layouts(self._live) == self._layouts
        if same and self._guard is None:
            self._guard = _guard(self._live, *self._layouts[-2:])  # of tensors that are as they were
        return same


def _confirmed(readings: Contents | Layouts | None, looked: Callable[[], bool]) -> bool:
    """Return whether nothing changed, by readings where there are any; what these find is looked at."""
    if readings is not None and readings.same():
        return True
    same = looked()
    if same and readings is not None:
        readings.confirm()
    return same


def _items(holder: Mapping[str, Any]) -> Iterator[Any]:
    return chain(holder, holder.values())


def _holders(model: Model) -> list[Mapping[str, Any]]:
    if not isinstance(model, nn.Module):
        return [model]
    holders: list[Mapping[str, Any]] = []
    seen, waiting = {id(model)}, [model]
    while waiting:
        module = waiting.pop()  # wrappers, too: what they wrap may be replaced
        holders += (module._parameters, module._buffers, module._modules)  # noqa: SLF001 - see entries.py
        children = [child for child in module._modules.values() if child is not None and id(child) not in seen]  # noqa: SLF001 - see entries.py
        seen.update(map(id, children))
        waiting += children
    return holders


def _refuse_freed(tensors: Sequence[Tensor]) -> None:
    # torch and compiled kernels alike would read memory that belongs to others.
    storages = map(Tensor.untyped_storage, tensors)
    ends = [(t.storage_offset() + t.numel()) * t.itemsize for t in tensors]
    lacking = [t for t, s, end in zip(tensors, storages, ends, strict=True) if s.nbytes() < end or not t.data_ptr()]
    freed = [t for t in lacking if t.numel() and not t.is_meta and not _has_memory(t)]
    if freed:
        message = (
            f"{len(freed)} of the model's tensors (the first of shape {tuple(freed[0].shape)}) have no memory now: it "
            "was freed, as sharded engines do between steps; update where they have their values. Nothing was changed."
        )
        raise ModelError(message)


def _has_memory(tensor: Tensor) -> bool:
    if not tensor.data_ptr():
        return False
    last = sum(stride * (size - 1) for stride, size in zip(tensor.stride(), tensor.shape, strict=True))
    return bool((tensor.storage_offset() + last + 1) * tensor.itemsize <= tensor.untyped_storage().nbytes())


def _differs_from_others(value: object) -> bool:
    if isinstance(value, Tensor):
        return type(value) in PLAIN and value.numel() > 1
    return value is None or (isinstance(value, nn.Module) and type(value).__eq__ is object.__eq__)


def _layouts(live: Sequence[Tensor]) -> list[list[Any]]:
    strided = [tensor for tensor in live if tensor.layout is STRIDED]
    return [*([*map(part, live)] for part in _LAYOUT), [*map(Tensor.stride, strided)]]


def _guard(live: Sequence[Tensor], shapes: Sequence[Any], strides: Sequence[Any]) -> Callable[..., bool]:
    """Return torch.compile's own check of many tensors' layouts, in one call where Python would need several each.

    It may refuse what is unchanged (under autocast, or where a tensor was frozen), and a torch without it loses nothing
    but its speed.
    """
    if len(strides) < len(live):  # sparse tensors have none
        return _refuses
    try:
        from torch._C._dynamo import guards

        made: Any = guards.TensorGuards  # the stub tells the type of one tensor's sizes, not of all
        expected = {"dynamic_dims_sizes": [*map(list, shapes)], "dynamic_dims_strides": [*map(list, strides)]}
        check: Callable[..., bool] = made(*live, **expected).check
    except Exception:  # noqa: BLE001 - private, so that anything may have become of it
        return _refuses
    return check


def _refuses(*_: Tensor) -> bool:
    return False
