"""What kernels of plain torch have in common: its operations on many tensors at once, and its counts of writes."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor
from typing_extensions import override

from polyak.kernels.base import Kernel
from polyak.kernels.layout import dense

if TYPE_CHECKING:
    from collections.abc import Sequence

__all__ = ["Eager", "copy_all", "lerp_all", "longest"]

try:  # torch 2.15 made these public; older versions have only the private names
    from torch.foreach import copy_ as _foreach_copy_, lerp_ as _foreach_lerp_, norm as _foreach_norm
except ImportError:
    from torch import (  # type: ignore[no-redef]  # the same functions under older names
        _foreach_copy_,
        _foreach_lerp_,
        _foreach_norm,
    )


_DOTTED = frozenset({torch.float32, torch.float64})
_LARGE = 1 << 15  # elements: torch's dot has a call for each tensor, and its norm one thread for all


class Eager(Kernel):
    """A kernel of torch's own functions: torch finds the tensors, and counts what is written.

    Averages may share a counter of writes, so that it is compared with what it was just before a write.
    """

    def __init__(self) -> None:
        self._last: tuple[int, Tensor, int] | None = None
        self._hold = False

    @override
    def prepare(self, *, moved: bool, hold: bool) -> None:
        self._last = None
        self._hold = hold

    @override
    def position(self) -> int:
        if self._last is None:
            return 0
        number, written, version = self._last
        return number + (_version(written) != version)

    def _write(self, number: int, average: Tensor) -> None:
        """Note that write ``number`` is about to be made, which ``average`` will show."""
        self._last = number, average, _version(average)


def _version(tensor: Tensor) -> int:
    return tensor._version  # noqa: SLF001 - torch has no public way to read it


def copy_all(targets: Sequence[Tensor], sources: Sequence[Tensor]) -> None:
    """Copy each source over its target, whatever their devices and dtypes, in one call."""
    _foreach_copy_(list(targets), list(sources))


def lerp_all(averages: list[Tensor], weights: list[Tensor], rate: float | list[float]) -> None:
    """Move each average towards its weight by one rate, or each by its own, in one call."""
    _foreach_lerp_(averages, weights, rate)


def longest(tensors: Sequence[Tensor]) -> float:
    """Return the largest Euclidean length of tensors of one dtype on a CPU; NaN if one holds a NaN.

    It is infinity where the square of a length is beyond float32.
    """
    dotted = [_flat(tensor) for tensor in tensors if _dots(tensor)]
    lengths = [torch.stack([torch.dot(each, each) for each in dotted]).max().sqrt()] if dotted else []
    if others := [tensor for tensor in tensors if not _dots(tensor)]:
        lengths.append(torch.stack(_foreach_norm(others)).max())
    return float(torch.stack([length.to(torch.float64) for length in lengths]).max().numpy())


def _dots(tensor: Tensor) -> bool:
    plain = type(tensor) in (Tensor, torch.nn.Parameter) and not tensor.is_neg()
    return plain and tensor.dtype in _DOTTED and tensor.numel() >= _LARGE and dense(tensor)


def _flat(tensor: Tensor) -> Tensor:
    return tensor.detach().as_strided((tensor.numel(),), (1,))
