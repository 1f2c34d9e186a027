"""What kernels of plain torch have in common: its operations on many tensors at once, and its counts of writes."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor
from typing_extensions import override

from polyak.kernels.base import Kernel

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


def longest(tensors: Sequence[Tensor]) -> Tensor:
    """Return the largest Euclidean length of tensors of one dtype, in float32 or more; NaN if one holds a NaN."""
    lengths = torch.stack(_foreach_norm(list(tensors))).max()
    return lengths.to(torch.promote_types(lengths.dtype, torch.float32))
