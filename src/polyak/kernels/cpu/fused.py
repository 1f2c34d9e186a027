"""The fused kernel for CPUs: all tensors of a group as one work list; needs Numba.

One pass over the weights moves every lane, converts any pair of float dtypes on the way and rounds short averages
stochastically; no temporary tensor is made.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.autograd.graph import increment_version
from typing_extensions import override

from polyak.kernels.base import SHORT, Checking, Kernel
from polyak.kernels.compiler import compiling
from polyak.kernels.cpu.work_list import WorkList
from polyak.kernels.eager.chunked import Chunked, mixed
from polyak.kernels.eager.operations import copy_all
from polyak.kernels.layout import dense
from polyak.kernels.threads import Slices

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

    from polyak.kernels.base import Generators, Lanes

__all__ = ["CopyCPU", "FusedCPU", "fits", "fits_copy", "try_out"]


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


def fits(average: Tensor, weight: Tensor) -> bool:
    """Return whether such a pair is dense memory of the CPU in the same order, of dtypes that are known here."""
    return average.dtype in _FLOATS and weight.dtype in _FLOATS and _alike(average, weight)


def fits_copy(average: Tensor, weight: Tensor) -> bool:
    """Return whether the bytes of such a pair mean the same in the same order, in memory of the CPU."""
    return average.dtype == weight.dtype and _alike(average, weight)


def _alike(average: Tensor, weight: Tensor) -> bool:
    return (
        average.is_cpu
        and weight.is_cpu
        and type(weight) in (Tensor, torch.nn.Parameter)
        and average.stride() == weight.stride()
        and dense(weight)
        and not (weight.is_neg() or weight.is_conj())
    )


class FusedCPU(Checking):
    """All tensors and lanes of one pair of dtypes in one pass; wide averages equal those of ``loop`` bit for bit."""

    name = "fused"

    def __init__(self, lanes: Lanes, weights: Sequence[Tensor]) -> None:
        from polyak.kernels.cpu import loops

        self._compiled = loops
        self._lanes, self._weights = lanes, list(weights)
        dtype = lanes[0][0].dtype
        self._average, self._weight, self._short = _FLOATS[dtype], _FLOATS[weights[0].dtype], dtype in SHORT
        self._rates = np.zeros(len(lanes), np.float64 if dtype == torch.float64 else np.float32)
        self._seeds = np.zeros(len(lanes), np.uint32)
        self._work = WorkList(lanes, weights)
        self._held = np.zeros((len(lanes), len(self._work.sizes)), np.int64)
        self._moving = Slices(len(self._work.bounds))
        self._checking = Slices(len(self._work.bounds))
        self._replacing: dict[int, Chunked] = {}
        self._finite = True
        self.prepare(moved=True, hold=False)
        # Compiled when the averager is made, and not in the first update.
        with compiling("numba"):
            self._move_pieces(0, 0, np.zeros(1, np.bool_))
            self._check_pieces(0, 0)

    @override
    def prepare(self, *, moved: bool, hold: bool) -> None:
        if moved:
            self._work.look()
        self._moving.reset()
        self._checking.reset()
        self._replaced = self._drawn = False
        self._hold, self._replaced_held = hold, dict[int, Tensor]()
        self._held.fill(0)

    @override
    def finite(self) -> bool:
        self._finite = True
        self._checking.run(self._check)
        return self._finite

    @override
    def __call__(self, rates: Sequence[float], generators: Sequence[Generators], done: int) -> None:
        if not done:
            self._rates[:] = rates
        # As the kernel sees them: a rate next to 1 may be 1 in float32.
        replaced = [number for number, rate in enumerate(self._rates.tolist()) if rate == 1.0]
        if self._short and not self._drawn:
            self._seeds[:] = [0 if rate == 1 else _seed(own) for own, rate in zip(generators, self._rates, strict=True)]
            self._drawn = True
        if len(replaced) < len(self._lanes):
            self._moving.run(self._move)
        # A sum would keep a NaN of the average. Twice is once.
        for number in replaced:
            self._replaced = True
            if self._hold:
                self._replaced_held[number] = self._replace(number)
            else:
                copy_all(self._lanes[number], self._weights)
        increment_version(self._work.counted)

    @override
    def position(self) -> int:
        return self._moving.finished() + self._replaced

    @property
    @override
    def held(self) -> Tensor:
        held = torch.from_numpy(self._held.sum(1))
        for number, each in self._replaced_held.items():
            held[number] = each.sum()
        return held

    @override
    def held_each(self) -> Tensor:
        each = torch.zeros((len(self._lanes), len(self._weights)), dtype=torch.int64, device="cpu")
        each.index_add_(1, torch.from_numpy(self._work.tensors), torch.from_numpy(self._held))
        for number, own in self._replaced_held.items():
            each[number] = own
        return each

    def _replace(self, lane: int) -> Tensor:
        """Copy the weights over the averages of a lane; return how many elements of each were held."""
        if lane not in self._replacing:
            self._replacing[lane] = Chunked("copy", mixed, self._lanes[lane], self._weights)
        self._replacing[lane].prepare(moved=False, hold=True)
        self._replacing[lane]([1.0], [], 0)
        return self._replacing[lane].held_each()[0]

    def _move(self, number: int) -> None:
        self._move_pieces(*self._work.bounds[number], self._moving.done[number : number + 1])

    def _move_pieces(self, first: int, last: int, done: NDArray[np.bool_]) -> None:
        work = self._work.targets, self._work.sources, self._work.sizes, first, last
        kinds = self._average.tag, self._weight.tag
        self._compiled.move(*work, self._rates, self._seeds, *kinds, self._hold, self._held, done)

    def _check(self, number: int) -> None:
        if self._finite and not self._check_pieces(*self._work.bounds[number]):
            self._finite = False

    def _check_pieces(self, first: int, last: int) -> bool:
        work = self._work.sources, self._work.sizes, first, last
        return bool(self._compiled.all_finite(*work, self._weight.mask))


class CopyCPU(Kernel):
    """Copies each weight over its average, byte by byte: small tensors cost a loop instead of calls of torch."""

    name = "copy"

    def __init__(self, lanes: Lanes, weights: Sequence[Tensor]) -> None:
        from polyak.kernels.cpu import loops

        self._compiled, self._byte = loops, np.empty(0, np.uint8)
        self._work = WorkList(lanes, weights, in_bytes=True)
        self._copying = Slices(len(self._work.bounds))
        self.prepare(moved=True, hold=False)
        with compiling("numba"):
            self._copy_pieces(0, 0, np.zeros(1, np.bool_))

    @override
    def prepare(self, *, moved: bool, hold: bool) -> None:
        if moved:
            self._work.look()
        self._copying.reset()

    @override
    def __call__(self, rates: Sequence[float], generators: Sequence[Generators], done: int) -> None:
        self._copying.run(self._copy)
        increment_version(self._work.counted)

    @override
    def position(self) -> int:
        return self._copying.finished()

    def _copy(self, number: int) -> None:
        self._copy_pieces(*self._work.bounds[number], self._copying.done[number : number + 1])

    def _copy_pieces(self, first: int, last: int, done: NDArray[np.bool_]) -> None:
        work = self._work
        self._compiled.copy(work.targets[0], work.sources, work.sizes, first, last, self._byte, done)


def _seed(generators: Generators) -> int:
    cpu = torch.device("cpu")
    return int(torch.randint(1 << 32, (), generator=generators(cpu), device=cpu))


def try_out() -> bool:
    """Compile for float32 and move a number; return whether it is where it belongs, or raise what the compiler raises.

    Without a word it is not where NUMBA_DISABLE_JIT is set.
    """
    from numba import config

    if config.DISABLE_JIT:  # type: ignore[attr-defined]  # it is made when Numba is imported
        return False
    with torch.inference_mode(mode=False):
        average, weight = (torch.full((1,), value, dtype=torch.float32, device="cpu") for value in (0.0, 1.0))
        FusedCPU([[average]], [weight])([0.5], [], 0)
    if average.item() != 0.5:  # noqa: PLR2004 - half of the way
        message = f"half of the way from 0 to 1 is {average.item()}"
        raise ArithmeticError(message)
    return True
