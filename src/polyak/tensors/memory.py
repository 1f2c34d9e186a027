"""Memory for averages: few blocks in large pages, which are faster to make and to find again than one per tensor."""

from __future__ import annotations

from itertools import accumulate
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from polyak.tensors.entries import PLAIN, STRIDED
from polyak.tensors.kernels.eager import copy_all
from polyak.tensors.layout import dense

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

__all__ = ["clones"]

Place = tuple[torch.device, torch.dtype]

_SMALL = 1 << 20  # bytes: larger tensors have a storage of their own
_LINE = 64  # bytes of a line of the cache: where a tensor may begin
_LARGE = 1 << 22  # bytes: from here on NumPy asks the system for large pages


def clones(tensors: Sequence[Tensor], places: Sequence[Place]) -> list[Tensor]:
    """Return a copy of each tensor on its device and in its dtype, laid out in memory as the tensor is where it can be.

    Small ones are views of one tensor, so that what changes them all is counted once by autograd. Large ones have
    storages of their own, which lie side by side in the memory of the CPU.
    """
    made: list[Tensor | None] = [None] * len(tensors)
    alike: dict[tuple[Place, Place, bool], list[int]] = {}
    for number, (tensor, place) in enumerate(zip(tensors, places, strict=True)):
        small = tensor.numel() * place[1].itemsize <= _SMALL
        if _plain(tensor) and (small or place[0].type == "cpu"):
            alike.setdefault((place, (tensor.device, tensor.dtype), small), []).append(number)
        else:
            made[number] = _alone(tensor, *place)
    for (place, _, small), numbers in alike.items():
        numbers.sort(key=lambda number: tensors[number].dim() > 1)  # side by side what kernels move as one
        originals = [tensors[number] for number in numbers]
        packed = _packed(originals, *place, small=small)
        copy_all(packed, originals)
        for number, tensor in zip(numbers, packed, strict=True):
            made[number] = tensor
    return [tensor for tensor in made if tensor is not None]


def _packed(tensors: Sequence[Tensor], device: torch.device, dtype: torch.dtype, *, small: bool) -> list[Tensor]:
    step = max(_LINE // dtype.itemsize, 1)
    sizes = [-(-tensor.numel() // step) * step for tensor in tensors]
    offsets = [0, *accumulate(sizes)]
    count = offsets.pop()
    if not small:
        memory, size = np.empty(count * dtype.itemsize, np.uint8), dtype.itemsize
        ends = [(offset + t.numel()) * size for t, offset in zip(tensors, offsets, strict=True)]
        places = [memory[offset * size : end] for offset, end in zip(offsets, ends, strict=True)]
        return [_over(place, dtype, t.shape, t.stride()) for t, place in zip(tensors, places, strict=True)]
    if device.type == "cpu" and count * dtype.itemsize >= _LARGE:
        whole = _over(np.empty(count * dtype.itemsize, np.uint8), dtype, (count,), (1,))
    else:
        whole = torch.empty(count, dtype=dtype, device=device)
    # Views made under no_grad() may only be written to under it.
    with torch.enable_grad():
        return [whole.as_strided(t.shape, t.stride(), offset) for t, offset in zip(tensors, offsets, strict=True)]


def _over(memory: NDArray[np.uint8], dtype: torch.dtype, shape: Sequence[int], stride: Sequence[int]) -> Tensor:
    """Return a tensor over some memory, which is its storage: no view of another."""
    return torch.empty(0, dtype=dtype).set_(torch.from_numpy(memory).untyped_storage(), 0, shape, stride)


def _plain(tensor: Tensor) -> bool:
    # Of any other tensor (a subclass, an expanded or conjugated view) torch itself knows best what a copy is.
    return type(tensor) in PLAIN and tensor.layout is STRIDED and dense(tensor) and not tensor.is_conj()


def _alone(tensor: Tensor, device: torch.device, dtype: torch.dtype) -> Tensor:
    copy = tensor.detach().to(device=device, dtype=dtype, copy=True)
    # A clone of an inference tensor is one too unless made from its values.
    return torch.empty_like(copy).copy_(copy) if copy.is_inference() else copy
