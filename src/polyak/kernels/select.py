"""What moves tensors: ``average += rate * (weights - average)``, in place, one group of tensors at a time.

``loop`` is the reference; every other kernel equals it. ``fused`` is one pass over all tensors, compiled by Numba for
CPUs and by Triton for CUDA; where it cannot be had, ``foreach`` and the others of plain torch do the same.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, cast

import torch

from polyak.errors import MissingExtraError
from polyak.kernels.base import SHORT, Checking, Generators, Holding, Kernel, KernelName, Lanes
from polyak.kernels.compiler import CompilerError, works
from polyak.kernels.cpu import fused as cpu
from polyak.kernels.cuda import fused as cuda
from polyak.kernels.eager import chunked, foreach
from polyak.kernels.trial import Trial

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

__all__ = [
    "CHUNKED",
    "KERNELS",
    "Checking",
    "CompilerError",
    "Generators",
    "Holding",
    "Kernel",
    "KernelName",
    "bind",
    "check_available",
    "compiles",
    "kernel_for",
]

Binder = Callable[[Lanes, "Sequence[Tensor]"], Kernel]
CHUNKED = frozenset({"loop", "mixed", "stochastic", "nearest"})
"""Kernels that write some tensors after others, of one averager only."""


def _chunked(name: str, move: chunked.Move, *, joined: bool = True) -> Binder:
    return lambda lanes, weights: chunked.Chunked(name, move, lanes[0], weights, joined=joined)


def _fused(lanes: Lanes, weights: Sequence[Tensor]) -> Kernel:
    return (cuda.FusedCUDA if weights[0].is_cuda else cpu.FusedCPU)(lanes, weights)


def _fastest(lanes: Lanes, weights: Sequence[Tensor]) -> Kernel:
    return Trial(
        cast("Checking", bind("fused", lanes, weights)), [lambda: cast("Holding", bind("foreach", lanes, weights))]
    )


KERNELS: dict[str, Binder] = {
    "copy": foreach.Copy,
    "compiled copy": cpu.CopyCPU,
    "loop": _chunked("loop", chunked.loop, joined=False),
    "mixed": _chunked("mixed", chunked.mixed),
    "stochastic": _chunked("stochastic", chunked.stochastic),
    "nearest": _chunked("nearest", chunked.nearest),
    "foreach": foreach.Foreach,
    "fused": _fused,
    "fastest": _fastest,
}
"""What binds each kernel to the averages of its lanes and to their weights."""


def bind(name: str, lanes: Lanes, weights: Sequence[Tensor]) -> Kernel:
    """Return a kernel bound to the averages of some lanes and to their weights."""
    return KERNELS[name](lanes, weights)


def kernel_for(average: Tensor, weight: Tensor, wanted: KernelName, *, copied: bool, nearest: bool = False) -> str:
    """Return the name of the fastest kernel that a pair fits, among those that were asked for."""
    if copied:
        compiled = wanted in {"auto", "fused"} and cpu.fits_copy(average, weight) and _numba()
        return "compiled copy" if compiled else "copy"
    if nearest and average.dtype in SHORT:
        return "nearest"
    same = average.dtype == weight.dtype and average.device == weight.device
    if wanted in {"auto", "fused"} and _fused_fits(average, weight):
        # Short averages draw other numbers in each kernel; of a device, a call ends before its work does.
        tried = wanted == "auto" and same and average.is_cpu and average.dtype not in SHORT
        return "fastest" if tried else "fused"
    if average.dtype in SHORT:
        return "stochastic"
    if wanted == "loop":
        return "loop"
    return "foreach" if same else "mixed"


def _fused_fits(average: Tensor, weight: Tensor) -> bool:
    return (cpu.fits(average, weight) and _numba()) or (cuda.fits(average, weight) and _triton())


def check_available(wanted: KernelName) -> None:
    """Refuse a kernel that cannot be had.

    Raises:
        MissingExtraError: If the fused kernel was asked for by name, and no compiler for it is installed or works.
    """
    if wanted == "fused" and not (_numba() or (torch.cuda.is_available() and _triton())):
        message = (
            "kernel='fused' needs Numba for CPUs (or Triton for CUDA, which comes with torch), and neither works here: "
            'pip install numba, unset NUMBA_DISABLE_JIT, or use kernel="auto", which takes the fastest that works'
        )
        raise MissingExtraError(message)


def compiles(wanted: KernelName) -> bool:
    """Return whether Numba may compile what moves tensors of a CPU, and works here."""
    return wanted in {"auto", "fused"} and _numba()


def _numba() -> bool:
    return works("numba", cpu.try_out)


def _triton() -> bool:
    return works("triton", cuda.try_out)
