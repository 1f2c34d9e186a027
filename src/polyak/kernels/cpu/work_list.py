"""Where the tensors of a compiled kernel are, as one work list: pieces that fit the cache."""

from __future__ import annotations

from itertools import pairwise
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

    from polyak.kernels.base import Lanes

__all__ = ["Cut", "WorkList"]

_PIECE = 1 << 14  # elements: the weights of a piece stay in the cache while each lane is moved
_CALL = 64  # elements that could be moved in the time that a piece costs beside its elements
_ALONE = 1 << 20  # elements: below, waking another thread takes longer than the work
_SLICES = 8  # for each thread: a core that others use takes fewer


class Cut:
    """Tensors cut into pieces that fit the cache, and runs of pieces that are equal amounts of work.

    Args:
        sizes: The elements of each tensor.

    Attributes:
        tensors: The number of each piece's tensor.
        sizes: The elements of each piece.
        bounds: The first piece of each slice and that after its last.
    """

    def __init__(self, sizes: Sequence[int]) -> None:
        counts = [-(-size // _PIECE) for size in sizes]
        self.tensors = np.repeat(np.arange(len(sizes)), counts)
        within = np.arange(sum(counts)) - np.repeat(np.cumsum([0, *counts[:-1]]), counts)
        self._offset = (within * _PIECE).astype(np.uint64)
        self.sizes = np.minimum(np.asarray(sizes, np.int64)[self.tensors] - within * _PIECE, _PIECE)
        # A piece costs its elements and a call.
        work = np.cumsum(self.sizes + _CALL)
        slices = _SLICES * torch.get_num_threads() if sum(sizes) >= _ALONE else 1
        cuts = np.searchsorted(work, np.linspace(0, work[-1] if len(work) else 0, slices + 1))
        cuts[0], cuts[-1] = 0, len(work)
        self.bounds = [(first, last) for first, last in pairwise(cuts.tolist()) if first < last]

    def addresses(self, starts: NDArray[np.uint64], unit: int) -> NDArray[np.uint64]:
        """Return where each piece begins, lanes × pieces; ``unit`` is the bytes of an element."""
        # In one order of memory, whatever their number: for another one the loops would be compiled again.
        return np.ascontiguousarray(starts[:, self.tensors] + self._offset * np.uint64(unit))


class WorkList:
    """Addresses of pieces of tensors; see ``Cut``.

    Args:
        lanes: The averages of each lane.
        weights: Their weights.
        in_bytes: Whether sizes count bytes instead of elements.

    Attributes:
        counted: Averages whose counters of writes count those of all: what autograd saved is no longer what it was.
        tensors: The number of each piece's tensor.
        sizes: The elements of each piece.
        bounds: The first piece of each slice and that after its last.
        sources: Where each piece of the weights begins.
        targets: Where each piece of the averages begins, lanes × pieces.
    """

    def __init__(self, lanes: Lanes, weights: Sequence[Tensor], *, in_bytes: bool = False) -> None:
        self._weights, self._averages = list(weights), [average for lane in lanes for average in lane]
        self._units = (1, 1) if in_bytes else (weights[0].itemsize, self._averages[0].itemsize)
        # Views of one tensor count their writes once.
        self.counted = [*{id(t) if t._base is None else id(t._base): t for t in self._averages}.values()]  # noqa: SLF001 - torch has no public way to read it
        self.sources, self.targets = np.empty(0, np.uint64), np.empty((len(lanes), 0), np.uint64)
        self._cut = Cut([tensor.nbytes if in_bytes else tensor.numel() for tensor in weights])
        self.tensors, self.sizes, self.bounds = self._cut.tensors, self._cut.sizes, self._cut.bounds

    def look(self) -> None:
        """Find the tensors anew."""
        self.sources = self._addresses(self._weights, self._units[0])[0]
        self.targets = self._addresses(self._averages, self._units[1])

    def _addresses(self, tensors: Sequence[Tensor], unit: int) -> NDArray[np.uint64]:
        """Return where each piece begins, lanes × pieces."""
        starts = np.array([*map(Tensor.data_ptr, tensors)], np.uint64).reshape(-1, len(self._weights))
        return self._cut.addresses(starts, unit)
