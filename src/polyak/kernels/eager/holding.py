"""What plain torch does for elements that keep their old value because the new one would not be finite.

On a CPU a look at the lengths of weights and averages mostly shows that there are none, and nothing more is done. Where
there may be some, and on devices of which to ask would mean to wait, new values are made beside the averages.
"""

from __future__ import annotations

from itertools import accumulate
from operator import attrgetter
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from polyak.kernels.eager.operations import copy_all, longest
from polyak.kernels.eager.scratch import scratch
from polyak.kernels.layout import dense

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

__all__ = ["Bound", "converted", "memory", "needless", "starts", "values"]

_KNOWN = frozenset({torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.complex64, torch.complex128})
"""Dtypes of which torch takes lengths."""
_VERSION = attrgetter("_version")


def values(
    pairs: Sequence[tuple[Tensor, Tensor]], rate: float, move: Callable[[Sequence[tuple[Tensor, Tensor]]], None]
) -> tuple[list[Tensor], list[Tensor]]:
    """Return what becomes of averages, and how many elements of each are held.

    Args:
        pairs: Averages of one dtype and device, and their weights.
        rate: The rate; 1 copies.
        move: Moves copies of the averages, in place.

    Returns:
        The new values, in scratch memory, and a count for each average.
    """
    averages, weights = [average for average, _ in pairs], [weight for _, weight in pairs]
    new = memory(averages, averages[0].dtype, "values")
    parts = _places(new, averages)
    if rate == 1:
        copy_all(parts, weights)
    else:
        copy_all(parts, averages)
        move([*zip(parts, weights, strict=True)])
    return parts, _hold(new, averages, weights)


def needless(averages: Sequence[Tensor], weights: Sequence[Tensor]) -> bool:
    """Return whether all new values are known to be finite, whatever the rate, without waiting for a device.

    No element is larger than the length of its tensor, and between numbers below a quarter of the largest one all
    arithmetic is finite.
    """
    most = _most(averages, weights)
    return most > 0 and longest(weights) <= most and longest(averages) <= most


class Bound:
    """Whether averages are within the limit of finite arithmetic, as long as only their kernel writes them.

    A move ends between an average and its weight: where both are within it, the new average is, and needs no look.

    Args:
        averages: The averages.
    """

    def __init__(self, averages: Sequence[Tensor]) -> None:
        self._averages = averages
        self._within: list[int] = []

    def holds(self, weights: Sequence[Tensor], length: float) -> bool:
        """Return whether all new values are known to be finite, whatever the rate.

        Args:
            weights: The weights, in the averages' order.
            length: The length of the longest of them.
        """
        most = _most(self._averages, weights)
        if most <= 0 or not length <= most:
            return False
        return self._within == _versions(self._averages) or longest(self._averages) <= most

    def moved(self) -> None:
        """Note that averages within the limit have moved towards weights within it."""
        self._within = _versions(self._averages)

    def forget(self) -> None:
        """Measure them anew: they may lie in other memory."""
        self._within = []


def _most(averages: Sequence[Tensor], weights: Sequence[Tensor]) -> float:
    """Return up to which length all arithmetic is finite; 0 where no length is taken."""
    average, weight = averages[0], weights[0]
    if not (average.is_cpu and weight.is_cpu) or weight.dtype not in _KNOWN:
        return 0.0
    return torch.finfo(average.dtype).max / 4


def _versions(tensors: Sequence[Tensor]) -> list[int]:
    return [*map(_VERSION, tensors)]


def _hold(new: Tensor, averages: Sequence[Tensor], weights: Sequence[Tensor]) -> list[Tensor]:
    """Put what the averages hold in the place of new values that are not finite; return how many there are of each."""
    old, wanted = (memory(averages, new.dtype, use) for use in ("averages", "weights"))
    copy_all(_places(old, averages), averages)
    copy_all(_places(wanted, averages), weights)
    begun = torch.where(old.isfinite(), new, wanted)
    finite = begun.isfinite()
    new.copy_(torch.where(finite, begun, old))
    return [(~part).sum() for part in torch.split(finite, [tensor.numel() for tensor in averages])]


def memory(like: Sequence[Tensor], dtype: torch.dtype, use: str) -> Tensor:
    """Return memory for as many elements as some tensors have, used again: new pages take longer than the sums."""
    return scratch(like[0].device, dtype, sum(tensor.numel() for tensor in like), use)


def starts(like: Sequence[Tensor]) -> Iterator[int]:
    """Return where each of some tensors begins in their memory."""
    return accumulate((tensor.numel() for tensor in like), initial=0)


def _places(memory: Tensor, like: Sequence[Tensor]) -> list[Tensor]:
    """Return pieces of memory laid out as some tensors are, but without holes."""
    return [
        memory.as_strided(t.shape, t.stride(), start) if dense(t) else memory[start : start + t.numel()].view(t.shape)
        for t, start in zip(like, starts(like), strict=False)
    ]


def converted(averages: Sequence[Tensor], weights: list[Tensor]) -> list[Tensor]:
    """Return weights in the dtype and on the device of some averages: themselves, or scratch memory."""
    like = averages[0].dtype, averages[0].device
    if all((weight.dtype, weight.device) == like for weight in weights):
        return weights
    made = _places(memory(averages, like[0], "weights"), averages)
    copy_all(made, weights)
    return made
