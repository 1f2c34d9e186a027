"""Where tensors are in memory and how they lie in it: compared in a few passes in C, and whether it is there at all."""

from __future__ import annotations

from operator import attrgetter
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, UntypedStorage

from polyak.errors import ModelError, StateError
from polyak.tensors.entries import PLAIN, STRIDED

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

__all__ = ["Located", "Storages", "lacking", "plain", "refuse_freed", "refuse_lost", "span"]

_LAYOUT = (
    attrgetter("dtype"),
    attrgetter("device"),
    attrgetter("shape"),
    Tensor.stride,
    Tensor.is_neg,
    Tensor.is_conj,
)


def plain(tensors: Sequence[Tensor]) -> list[Tensor]:
    """Return each of these tensors once that is of no subclass and has an address and strides."""
    return [*{id(t): t for t in tensors if type(t) in PLAIN and t.layout is STRIDED}.values()]


class Located:
    """Remembers the layout and the address of some tensors.

    Args:
        tensors: What ``plain`` returned.

    Attributes:
        tensors: The tensors.
        addresses: Where each of them begins, as of the construction or as the caller set it since.
    """

    def __init__(self, tensors: Sequence[Tensor]) -> None:
        self.tensors = tensors
        self.addresses = self.look()
        self._layouts = self._described()
        self._guards: dict[bool, Callable[..., bool]] = {}

    def look(self) -> list[int]:
        """Return where each tensor begins now."""
        return [*map(Tensor.data_ptr, self.tensors)]

    def same_layouts(self) -> bool:
        """Return whether each tensor has the dtype, device, shape, strides and bits (negative, conjugate) it had."""
        mode = torch.is_grad_enabled()  # in the other one, a guard refuses what is unchanged
        guard = self._guards.get(mode)
        if guard is not None and guard(*self.tensors):
            return True
        if self._described() != self._layouts:
            return False
        if guard is not _refuses:  # it is new, or a tensor was frozen, or autocast began or ended
            self._guards[mode] = _guard(self.tensors)
        return True

    def _described(self) -> list[list[Any]]:
        return [[*map(part, self.tensors)] for part in _LAYOUT]


class Storages:
    """The memory of an averager's own tensors, which those who hold its averages can free or move.

    Args:
        tensors: What the averager stores.
    """

    def __init__(self, tensors: Sequence[Tensor]) -> None:
        refuse_lost(tensors)
        self._tensors = plain(tensors)
        # Averages are handed out as aliases: what changes is the storage, and never where in it a tensor is.
        self._storages = [*{s.data_ptr(): s for s in map(Tensor.untyped_storage, self._tensors)}.values()]
        self._known = self._look()

    def moved(self) -> bool:
        """Return whether any storage has other memory than at the last call, as when it is shared between processes.

        Raises:
            StateError: If memory was freed.
        """
        now = self._look()
        if now == self._known:
            return False
        refuse_lost(self._tensors)
        self._known = now
        return True

    def _look(self) -> tuple[list[int], list[int]]:
        return [*map(UntypedStorage.data_ptr, self._storages)], [*map(UntypedStorage.nbytes, self._storages)]


def refuse_lost(stored: Sequence[Tensor]) -> None:
    """Refuse averages that have no memory.

    Raises:
        StateError: If any of ``stored`` has none.
    """
    if freed := lacking(plain(stored)):
        message = (
            f"the memory of {len(freed)} averages (the first of shape {tuple(freed[0].shape)}) was freed, and with it "
            "their values. Build a new averager, load a saved state, and free copies of averages only."
        )
        raise StateError(message)


def refuse_freed(tensors: Sequence[Tensor]) -> None:
    """Refuse a model whose tensors have no memory: torch and compiled kernels would read memory of others.

    Raises:
        ModelError: If any of ``tensors`` has none.
    """
    if freed := lacking(tensors):
        message = (
            f"{len(freed)} of the model's tensors (the first of shape {tuple(freed[0].shape)}) have no memory now: it "
            "was freed, as sharded engines do between steps; update where they have their values. Nothing was changed."
        )
        raise ModelError(message)


def lacking(tensors: Sequence[Tensor]) -> list[Tensor]:
    """Return the tensors whose storage ends before their last element."""
    return [t for t in tensors if t.numel() and not t.is_meta and not (t.data_ptr() and _reaches_end(t))]


def span(tensor: Tensor) -> int:
    """Return how many bytes lie between the beginning of a tensor that has elements and the end of its last one."""
    last = sum(stride * (size - 1) for stride, size in zip(tensor.stride(), tensor.shape, strict=True))
    return int(last + 1) * tensor.itemsize


def _reaches_end(tensor: Tensor) -> bool:
    end = tensor.storage_offset() * tensor.itemsize + span(tensor)
    return bool(end <= tensor.untyped_storage().nbytes())


def _guard(tensors: Sequence[Tensor]) -> Callable[..., bool]:
    """Return torch.compile's own check of many tensors' layouts: one call where Python needs several each.

    It is private, so that a torch without it loses its speed and nothing else.
    """
    try:
        from torch._C._dynamo import guards

        made: Any = guards.TensorGuards  # the stub declares the sizes of one tensor, not of all
        sizes, strides = ([*map(list, map(part, tensors))] for part in (Tensor.size, Tensor.stride))
        check: Callable[..., bool] = made(*tensors, dynamic_dims_sizes=sizes, dynamic_dims_strides=strides).check
        return check if check(*tensors) else _refuses
    except Exception:  # noqa: BLE001 - private, so that anything may have become of it
        return _refuses


def _refuses(*_: Tensor) -> bool:
    return False
