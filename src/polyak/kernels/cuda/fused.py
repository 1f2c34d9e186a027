"""The fused kernel for CUDA, in Triton, which torch for CUDA brings: the twin of that for CPUs.

One launch reads the weights once and moves every lane, converts any pair of float dtypes on the way and rounds short
averages stochastically; no temporary tensor is made and nothing waits for the device. Its arithmetic is tested in
Triton's interpreter and it is compiled for sm_80 and sm_90; on a GPU it was never run, so its speed is unmeasured.
"""

from __future__ import annotations

from contextlib import nullcontext
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.autograd.graph import increment_version
from typing_extensions import override

from polyak.errors import RateError
from polyak.kernels.base import SHORT, Checking
from polyak.kernels.compiler import compiling
from polyak.kernels.layout import dense

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from numpy.typing import NDArray

    from polyak.kernels.base import Generators, Lanes

__all__ = ["FusedCUDA", "fits", "try_out"]


class _Float(NamedTuple):
    """What Triton calls a dtype and integers as long, and the exponent's bits, all set in what is not finite."""

    name: str
    bits: str
    exponent: int


_FLOATS = {
    torch.float32: _Float("float32", "int32", 0x7F80_0000),
    torch.float64: _Float("float64", "int64", 0x7FF0_0000_0000_0000),
    torch.bfloat16: _Float("bfloat16", "int16", 0x7F80),
    torch.float16: _Float("float16", "int16", 0x7C00),
}
_BLOCK = 2048  # elements
_WARPS = 8  # 8 elements for each thread: on an H200, vit_b_16 takes 1.07 times a flat lerp_; with 4 warps 1.11
_UNALIGNED = 15  # bits of an address, zero where 16 bytes can be read at once


def fits(average: Tensor, weight: Tensor) -> bool:
    """Return whether such a pair is dense memory of one GPU in the same order, of dtypes that are known here."""
    return (
        average.dtype in _FLOATS
        and weight.dtype in _FLOATS
        and average.device.type == "cuda"
        and average.device == weight.device
        and type(weight) in (Tensor, torch.nn.Parameter)
        and average.stride() == weight.stride()
        and dense(weight)
        and not weight.is_neg()
    )


class FusedCUDA(Checking):
    """All tensors and lanes of one pair of dtypes in one launch; wide averages equal those of ``loop`` bit for bit.

    A call can be captured in a CUDA graph where the rates come as a tensor on the device; a replay reads what that
    holds then. (Short averages draw from the lanes' generators: register these with the graph.)

    Attributes:
        guard: An int32 on the device: while it is not zero, a call moves nothing. Let it be what ``look`` wrote to
            refuse weights that are not finite without waiting for the device. None: every call moves.
    """

    name = "fused"

    def __init__(self, lanes: Lanes, weights: Sequence[Tensor]) -> None:
        import triton.language as tl  # type: ignore[import-untyped]  # brings no types

        from polyak.kernels.cuda import loops

        self._loops = loops
        self._weights, self._averages = list(weights), [average for lane in lanes for average in lane]
        average, weight, self._device = lanes[0][0].dtype, weights[0].dtype, weights[0].device
        # One tensor of each storage tells where all that lie in it are.
        self._anchors = [*{t.untyped_storage().data_ptr(): t for t in self._averages}.values()]
        self._anchored: list[int] = []
        self._sizes = np.array([tensor.numel() for tensor in weights], np.int64)
        self._tensors, self._blocks = (torch.from_numpy(each).to(self._device) for each in _blocks(self._sizes))
        # Filled in place, ever after: a captured graph knows where they are.
        self._table = torch.zeros((3 + len(lanes), len(weights)), dtype=torch.int64, device=self._device)
        self._rates = torch.zeros(len(lanes), dtype=torch.promote_types(average, torch.float32), device=self._device)
        self._seeds = torch.zeros(len(lanes), dtype=torch.int64, device=self._device) if average in SHORT else None
        self._held = torch.zeros(len(lanes), dtype=torch.int64, device=self._device)
        self._counts = torch.zeros((len(lanes), len(self._blocks)), dtype=torch.int32, device=self._device)
        self._hold = False
        self._found, self._open = (torch.zeros(1, dtype=torch.int32, device=self._device) for _ in range(2))
        self.guard: Tensor | None = None
        self._moving = {"average": getattr(tl, _FLOATS[average].name), "weight": getattr(tl, _FLOATS[weight].name)}
        self._finding = {"like": getattr(tl, _FLOATS[weight].bits), "exponent": _FLOATS[weight].exponent}
        self._sent: list[float] | None = None
        self._recorded = False
        self._finished = 0
        # Compiled and loaded before any graph is captured. As long as the table is empty, nothing moves.
        self._count = min(1, len(self._blocks))
        with compiling("triton"):
            for self._hold in (False, True):
                self._move()
            self.look(self._found)
        self._count = len(self._blocks)
        self.prepare(moved=True, hold=False)

    @override
    def prepare(self, *, moved: bool, hold: bool) -> None:
        """Look where the tensors are; send it to the device only where any may have moved."""
        self._hold = hold
        # Sharing a tensor with another process moves its memory, too.
        anchored = [*map(Tensor.data_ptr, self._anchors)]
        if moved or anchored != self._anchored:
            addresses = np.array(
                [*map(Tensor.data_ptr, self._weights), *map(Tensor.data_ptr, self._averages)], np.int64
            )
            rows = addresses.reshape(-1, len(self._weights))
            aligned = (np.bitwise_or.reduce(rows) & _UNALIGNED) == 0
            self._send(torch.from_numpy(np.vstack([self._sizes, aligned, rows])), self._table)
            self._anchored = anchored
        self._finished = 0

    def look(self, found: Tensor) -> None:
        """Write 1 to ``found``, an int32 on the device, where any weight is not finite; else write nothing."""
        self._launch(self._loops.find, found, **self._finding)

    @override
    def finite(self) -> bool:
        """Return whether all weights are finite now; waits for the device."""
        self.look(self._found.zero_())
        return not self._found.item()

    @override
    def __call__(self, rates: Sequence[float] | Tensor, generators: Sequence[Generators], done: int) -> None:
        """Move the averages.

        Args:
            rates: The rate of each lane; as a tensor on the device it can be captured in a CUDA graph.
            generators: What each lane draws its random numbers from.
            done: Whether an interrupted call has moved them: one launch moves all or nothing.

        Raises:
            RateError: If rates were given as numbers, which a CUDA graph that is being captured would not keep.
        """
        if done:
            return
        if isinstance(rates, Tensor):
            self._recorded = True
            self._rates.copy_(rates)
        else:
            self._check_uncaptured()
            self._send_rates(list(rates))
        if self._seeds is not None:
            for seed, own in zip(self._seeds, generators, strict=True):
                seed.random_(generator=own(self._device))
        self._move()
        # What autograd saved of an average is no longer what it was.
        increment_version(self._averages)

    @property
    @override
    def held(self) -> Tensor:
        return self._held

    @override
    def held_each(self) -> Tensor:
        each = torch.zeros((len(self._counts), len(self._weights)), dtype=torch.int64, device=self._device)
        return each.index_add_(1, self._tensors, self._counts.to(torch.int64)) if self._count else each

    @override
    def position(self) -> int:
        """Return whether it was launched since ``prepare``; asks the device nothing."""
        return self._finished

    def _move(self) -> None:
        seeds = self._rates if self._seeds is None else self._seeds  # wide averages are not rounded: never read
        # By each call, so that a captured graph does it too.
        if self._hold:
            self._held.zero_()
        holding = self._held, self._counts
        guard = self._open if self.guard is None else self.guard
        work = self._rates, seeds, len(self._rates), guard, *holding
        self._launch(self._loops.move, *work, hold=self._hold, **self._moving)
        self._finished += 1

    def _launch(
        self, loop: Mapping[tuple[int], Callable[..., object]], *arguments: object, **constants: object
    ) -> None:
        if not self._count:
            return
        # Triton launches on the current device.
        with torch.cuda.device(self._device) if self._device.type == "cuda" else nullcontext():
            # What is rounded once is written as one fma: the compiler shall make no others.
            work = self._tensors, self._blocks, self._table, len(self._weights)
            loop[(self._count,)](*work, *arguments, **constants, block=_BLOCK, num_warps=_WARPS, enable_fp_fusion=False)

    def _send_rates(self, rates: list[float]) -> None:
        # Most averages move by one rate for most of a run: to send it again costs the host more than the launch.
        # A captured graph writes rates of its own at each replay.
        if rates != self._sent or self._recorded:
            self._sent = None
            self._send(torch.tensor(rates, dtype=self._rates.dtype, device="cpu"), self._rates)
            self._sent = rates

    def _send(self, values: Tensor, place: Tensor) -> None:
        # From pinned memory nobody waits; torch keeps that memory until it was read.
        pinned = values.pin_memory() if self._device.type == "cuda" else values
        place.copy_(pinned, non_blocking=True)

    def _check_uncaptured(self) -> None:
        if self._device.type == "cuda" and torch.cuda.is_current_stream_capturing():
            message = (
                "a CUDA graph is being captured and the rate is a number, which the graph would repeat for ever; "
                "expected a tensor on the device, which is read at each replay"
            )
            raise RateError(message)


def try_out() -> bool:
    """Import the compiler and compile for float32, whatever that raises; needs a GPU."""
    one = torch.zeros(1, dtype=torch.float32, device="cuda")
    FusedCUDA([[one]], [torch.zeros_like(one)])
    return True


def _blocks(sizes: NDArray[np.int64]) -> tuple[NDArray[np.int32], NDArray[np.int32]]:
    """Return for each block the number of its tensor and its own number within that."""
    counts = -(-sizes // _BLOCK)
    tensors = np.repeat(np.arange(len(sizes)), counts)
    within = np.arange(len(tensors)) - np.repeat(np.cumsum(counts) - counts, counts)
    return tensors.astype(np.int32), within.astype(np.int32)
