"""Parts of memory: whether they meet, and whether they are there at all."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from torch import Tensor, UntypedStorage

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

__all__ = ["Intervals", "freed"]

_BYTES = 4  # of an element: these are float32


class Intervals:
    """Parts of memory, to see whether others meet them."""

    def __init__(self, starts: NDArray[np.uint64], sizes: NDArray[np.uint64]) -> None:
        order = np.argsort(starts, kind="stable")
        order = order[sizes[order] > 0]
        self._starts, self._ends = starts[order], starts[order] + sizes[order] * np.uint64(_BYTES)

    def overlap(self) -> bool:
        """Return whether any two of them have memory in common."""
        return bool((self._starts[1:] < self._ends[:-1]).any())

    def meet(self, starts: NDArray[np.uint64], sizes: Sequence[int]) -> bool:
        """Return whether any of some others has memory in common with these, which have none with each other."""
        if not len(self._starts):
            return False
        ends = starts + np.array(sizes, np.uint64) * np.uint64(_BYTES)
        before = np.searchsorted(self._starts, ends)  # how many begin before the other one ends: the last may reach it
        return bool(((before > 0) & (self._ends[before - 1] > starts) & (ends > starts)).any())


def freed(tensors: Sequence[Tensor], sizes: Sequence[int]) -> bool:
    """Return whether any tensor without holes has too little memory for its elements."""
    elements = np.array(sizes)
    ends = np.array([*map(Tensor.storage_offset, tensors)]) + elements
    reach = np.array([*map(UntypedStorage.nbytes, map(Tensor.untyped_storage, tensors))])
    return bool(((reach < ends * _BYTES) & (elements > 0)).any())
