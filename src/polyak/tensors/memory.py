"""Memory for averages: many small tensors in few storages, which are faster to make and to find again."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from polyak.kernels.eager.operations import copy_all
from polyak.kernels.layout import dense
from polyak.tensors.entries import PLAIN, STRIDED

if TYPE_CHECKING:
    from collections.abc import Sequence

__all__ = ["clones"]

Place = tuple[torch.device, torch.dtype]

_SMALL = 1 << 20  # bytes: larger tensors have a storage of their own
_LINE = 64  # bytes of a line of the cache: where a tensor may begin


def clones(tensors: Sequence[Tensor], places: Sequence[Place]) -> list[Tensor]:
    """Return a copy of each tensor on its device and in its dtype, laid out in memory as the tensor is where it can be.

    Small ones are views of one tensor, so that what changes them all is counted once by autograd.
    """
    made: list[Tensor | None] = [None] * len(tensors)
    small: dict[tuple[Place, Place], list[int]] = {}
    for number, (tensor, place) in enumerate(zip(tensors, places, strict=True)):
        if _plain(tensor) and tensor.numel() * place[1].itemsize <= _SMALL:
            small.setdefault((place, (tensor.device, tensor.dtype)), []).append(number)
        else:
            made[number] = _alone(tensor, *place)
    for (place, _), numbers in small.items():
        numbers.sort(key=lambda number: tensors[number].dim() > 1)  # side by side what kernels move as one
        originals = [tensors[number] for number in numbers]
        packed = _packed(originals, *place)
        copy_all(packed, originals)
        for number, tensor in zip(numbers, packed, strict=True):
            made[number] = tensor
    return [tensor for tensor in made if tensor is not None]


def _packed(tensors: Sequence[Tensor], device: torch.device, dtype: torch.dtype) -> list[Tensor]:
    step = max(_LINE // dtype.itemsize, 1)
    offsets, end = [], 0
    for tensor in tensors:
        offsets.append(end)
        end += -(-tensor.numel() // step) * step
    whole = torch.empty(end, dtype=dtype, device=device)
    # Views made under no_grad() may only be written to under it.
    with torch.enable_grad():
        return [whole.as_strided(t.shape, t.stride(), offset) for t, offset in zip(tensors, offsets, strict=True)]


def _plain(tensor: Tensor) -> bool:
    # Of any other tensor (a subclass, an expanded or conjugated view) torch itself knows best what a copy is.
    return type(tensor) in PLAIN and tensor.layout is STRIDED and dense(tensor) and not tensor.is_conj()


def _alone(tensor: Tensor, device: torch.device, dtype: torch.dtype) -> Tensor:
    copy = tensor.detach().to(device=device, dtype=dtype, copy=True)
    # A clone of an inference tensor is one too unless made from its values.
    return torch.empty_like(copy).copy_(copy) if copy.is_inference() else copy
