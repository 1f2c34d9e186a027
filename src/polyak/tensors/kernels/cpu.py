"""The fused kernel for CPUs: all tensors of a group as one work list (``pip install "polyak[fast]"``).

One pass over the weights moves every lane, converts any pair of float dtypes on the way and rounds short averages
stochastically; no temporary tensor is made.
"""

from __future__ import annotations

from itertools import pairwise
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.autograd.graph import increment_version
from typing_extensions import override

from polyak.tensors.kernels import eager
from polyak.tensors.kernels.kernel import SHORT, Checking
from polyak.tensors.kernels.threads import Slices
from polyak.tensors.layout import dense

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

    from polyak.tensors.kernels.kernel import Generators, Lanes

__all__ = ["FusedCPU", "fits", "try_out"]


class _Float(NamedTuple):
    """How a dtype travels through Numba, which knows no short floats.

    Attributes:
        tag: An empty array of the type it travels as: a short float as its bits, an int16 meaning float16.
        mask: The bits of the exponent, all set in what is not finite.
    """

    tag: NDArray[Any]
    mask: NDArray[Any]


def _float(tag: type, bits: type, mask: int) -> _Float:
    return _Float(np.empty(0, tag), np.array([mask], bits))


_FLOATS = {
    torch.float32: _float(np.float32, np.uint32, 0x7F80_0000),
    torch.float64: _float(np.float64, np.uint64, 0x7FF0_0000_0000_0000),
    torch.bfloat16: _float(np.uint16, np.uint16, 0x7F80),
    torch.float16: _float(np.int16, np.uint16, 0x7C00),
}
_PIECE = 1 << 14  # elements: the weights of a piece stay in the cache while each lane is moved
_CALL = 64  # elements that could be moved in the time that a piece costs beside its elements
_ALONE = 1 << 20  # elements: below, waking another thread takes longer than the work
_SLICES = 8  # for each thread: a core that others use takes fewer


def fits(average: Tensor, weight: Tensor) -> bool:
    """Return whether such a pair is dense memory of the CPU in the same order, of dtypes that are known here."""
    return (
        average.dtype in _FLOATS
        and weight.dtype in _FLOATS
        and average.is_cpu
        and weight.is_cpu
        and type(weight) in (Tensor, torch.nn.Parameter)
        and average.stride() == weight.stride()
        and dense(weight)
        and not weight.is_neg()
    )


class FusedCPU(Checking):
    """All tensors and lanes of one pair of dtypes in one pass; wide averages equal those of ``loop`` bit for bit."""

    name = "fused"

    def __init__(self, lanes: Lanes, weights: Sequence[Tensor]) -> None:
        from polyak.tensors.kernels import compiled

        self._compiled = compiled
        self._lanes, self._weights = lanes, list(weights)
        self._averages = [average for lane in lanes for average in lane]
        dtype = lanes[0][0].dtype
        self._average, self._weight, self._short = _FLOATS[dtype], _FLOATS[weights[0].dtype], dtype in SHORT
        self._rates = np.zeros(len(lanes), np.float64 if dtype == torch.float64 else np.float32)
        self._seeds = np.zeros(len(lanes), np.uint32)
        # One tensor of each storage tells where all in it are, and views of one tensor count their writes once.
        self._anchors = [*{t.untyped_storage().data_ptr(): t for t in self._averages}.values()]
        self._counted = [*{id(t) if t._base is None else id(t._base): t for t in self._averages}.values()]  # noqa: SLF001 - torch has no public way to read it
        self._anchored: list[int] = []
        self._pieces = _Pieces([tensor.numel() for tensor in weights])
        self._sources, self._targets = np.empty(0, np.uint64), np.empty((len(lanes), 0), np.uint64)
        self._moving = Slices(self._move, len(self._pieces.bounds))
        self._checking = Slices(self._check, len(self._pieces.bounds))
        self._finite = True
        self.prepare(moved=True)
        # Compiled when the averager is made, and not in the first update.
        self._move_pieces(0, 0, np.zeros(1, np.bool_))
        self._check_pieces(0, 0)

    @override
    def prepare(self, *, moved: bool) -> None:
        # Sharing a tensor with another process moves its memory, too.
        anchored = [*map(Tensor.data_ptr, self._anchors)]
        if moved or anchored != self._anchored:
            sources, targets = ([*map(Tensor.data_ptr, tensors)] for tensors in (self._weights, self._averages))
            self._sources = self._pieces.addresses(sources, self._weights[0].itemsize)[0]
            self._targets = self._pieces.addresses(targets, self._averages[0].itemsize)
            self._anchored = anchored
        self._moving.reset()
        self._checking.reset()
        self._replaced = self._drawn = False

    @override
    def finite(self) -> bool:
        self._finite = True
        self._checking.run()
        return self._finite

    @override
    def __call__(self, rates: Sequence[float], generators: Sequence[Generators], done: int) -> None:
        if not done:
            self._rates[:] = rates
        # As the kernel sees them: a rate next to 1 may be 1 in float32.
        replaced = [lane for lane, rate in zip(self._lanes, self._rates, strict=True) if rate == 1]
        if self._short and not self._drawn:
            self._seeds[:] = [0 if rate == 1 else _seed(own) for own, rate in zip(generators, self._rates, strict=True)]
            self._drawn = True
        if len(replaced) < len(self._lanes):
            self._moving.run()
        # A sum would keep a NaN of the average. Twice is once.
        for lane in replaced:
            self._replaced = True
            eager.copy_all(lane, self._weights)
        # What autograd saved of an average is no longer what it was.
        increment_version(self._counted)

    @override
    def position(self) -> int:
        return self._moving.finished() + self._replaced

    def _move(self, number: int) -> None:
        # Backwards: what the check read last is still in the cache.
        self._move_pieces(*self._pieces.bounds[-1 - number], self._moving.done[number : number + 1])

    def _move_pieces(self, first: int, last: int, done: NDArray[np.bool_]) -> None:
        work = self._targets, self._sources, self._pieces.sizes, first, last
        self._compiled.move(*work, self._rates, self._seeds, self._average.tag, self._weight.tag, done)

    def _check(self, number: int) -> None:
        if self._finite and not self._check_pieces(*self._pieces.bounds[number]):
            self._finite = False

    def _check_pieces(self, first: int, last: int) -> bool:
        work = self._sources, self._pieces.sizes, first, last
        return bool(self._compiled.finite(*work, self._weight.mask))


def _seed(generators: Generators) -> int:
    return int(torch.randint(1 << 32, (), generator=generators(torch.device("cpu"))))


def try_out() -> None:
    """Import the compiler and compile for float32, whatever that raises."""
    FusedCPU([[torch.zeros(1)]], [torch.zeros(1)])


class _Pieces:
    """Tensors cut into pieces that fit the cache, and runs of pieces that are equal amounts of work.

    Attributes:
        sizes: The elements of each piece.
        bounds: The first piece of each slice and that after its last.
    """

    def __init__(self, sizes: Sequence[int]) -> None:
        counts = [-(-size // _PIECE) for size in sizes]
        self._tensors = len(sizes)
        self._tensor = np.repeat(np.arange(len(sizes)), counts)
        within = np.arange(sum(counts)) - np.repeat(np.cumsum([0, *counts[:-1]]), counts)
        self._offset = (within * _PIECE).astype(np.uint64)
        self.sizes = np.minimum(np.asarray(sizes, np.int64)[self._tensor] - within * _PIECE, _PIECE)
        # A piece costs its elements and a call.
        work = np.cumsum(self.sizes + _CALL)
        slices = _SLICES * torch.get_num_threads() if sum(sizes) >= _ALONE else 1
        cuts = np.searchsorted(work, np.linspace(0, work[-1] if len(work) else 0, slices + 1))
        cuts[0], cuts[-1] = 0, len(work)
        self.bounds = [(first, last) for first, last in pairwise(cuts.tolist()) if first < last]

    def addresses(self, bases: Sequence[int], itemsize: int) -> NDArray[np.uint64]:
        """Return where each piece begins, from where each tensor does; ``bases`` may hold several lanes."""
        starts = np.array(bases, np.uint64).reshape(-1, self._tensors)
        addresses: NDArray[np.uint64] = starts[:, self._tensor] + self._offset * np.uint64(itemsize)
        return addresses
