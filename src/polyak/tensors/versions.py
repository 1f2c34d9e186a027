"""Autograd's counters of in-place writes: by them it refuses a backward pass through values that are gone."""

from __future__ import annotations

from itertools import cycle

import torch
from torch import Tensor

__all__ = ["numbers", "set_version", "version"]

_SPACE = 1 << 12
numbers = cycle(range(1 << 31, (1 << 32) - _SPACE, _SPACE))
"""Counts that no training reaches, with room for the writes inside of one context."""

_set = getattr(torch._C._autograd, "_unsafe_set_version_counter", None)  # noqa: SLF001 - what torch's own context calls


def version(tensor: Tensor) -> int | None:
    """Return the count of a tensor's writes; None for inference tensors, which have none."""
    return None if tensor.is_inference() else tensor._version  # noqa: SLF001 - torch has no public way to read it


def set_version(tensor: Tensor, count: int | None) -> None:
    """Set the count of a tensor's writes, where torch can."""
    if count is None or _set is None:
        return
    try:
        _set((tensor,), (count,))
    except TypeError:  # torch 2.6 takes one tensor
        _set(tensor, count)
