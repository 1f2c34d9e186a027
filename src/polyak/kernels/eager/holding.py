"""New values of a chunk of averages, those held that would not be finite, in plain torch.

One write follows. On a CPU the sum of the new values decides whether any needs a second look; on other devices, where to
ask would mean to wait, each value is looked at.
"""

from __future__ import annotations

from itertools import accumulate
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from polyak.kernels.base import SHORT
from polyak.kernels.eager.operations import copy_all, lerp_all
from polyak.kernels.eager.scratch import scratch
from polyak.kernels.layout import dense

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

__all__ = ["begun_anew", "certain", "converted", "held", "memory", "starts", "values"]


def values(pairs: Sequence[tuple[Tensor, Tensor]], rate: float) -> tuple[list[Tensor], list[Tensor]]:
    """Return what becomes of averages, of any dtype, and how many elements of each are held.

    Args:
        pairs: Averages of one dtype and device, and their weights.
        rate: The rate; 1 copies.

    Returns:
        The new values, in scratch memory, and a count for each average; no counts where nothing is held.
    """
    averages, weights = [average for average, _ in pairs], [weight for _, weight in pairs]
    dtype = averages[0].dtype
    new = memory(averages, dtype, "values")
    parts = _places(new, averages)
    if rate == 1:
        copy_all(parts, weights)
    else:
        copy_all(parts, averages)
        lerp_all(parts, converted(averages, weights), rate)
    if certain(new):
        return parts, []
    old, wanted = (memory(averages, dtype, use) for use in ("averages", "weights"))
    copy_all(_places(old, averages), averages)
    copy_all(_places(wanted, averages), weights)
    new.copy_(begun_anew(new, old, wanted))
    return parts, held(new, old, averages)


def certain(new: Tensor) -> bool:
    """Return whether new values are known to be finite without waiting for a device."""
    return new.is_cpu and bool(new.sum(dtype=torch.float32 if new.dtype in SHORT else None).isfinite())


def begun_anew(new: Tensor, old: Tensor, weights: Tensor) -> Tensor:
    """Return new values, but weights where the old ones were not finite."""
    return torch.where(old.isfinite(), new, weights)


def held(new: Tensor, old: Tensor, like: Sequence[Tensor]) -> list[Tensor]:
    """Put the old value in the place of each new one that is not finite; return how many there are of each tensor."""
    finite = new.isfinite()
    new.copy_(torch.where(finite, new, old))
    return [(~part).sum() for part in torch.split(finite, [tensor.numel() for tensor in like])]


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
