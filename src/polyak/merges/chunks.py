"""Arithmetic on tensors part by part, in the memory of the first: whole tensors in float64 are large."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from torch import Tensor

__all__ = ["in_chunks"]

_CHUNK = 1 << 18  # values


def in_chunks(function: Callable[..., Tensor], tensors: Sequence[Tensor], base: Tensor | None = None) -> Tensor:
    """Replace the first tensor by a function of all, which works value by value.

    Args:
        function: Takes a list of parts of the tensors, and the same part of the base.
        tensors: The tensors; the first is replaced, if its memory is contiguous.
        base: The base, or None.
    """
    made = tensors[0].contiguous()
    flat, others = made.reshape(-1), [tensor.reshape(-1) for tensor in tensors[1:]]
    below = None if base is None else base.reshape(-1)
    for begin in range(0, flat.numel(), _CHUNK):
        part = slice(begin, begin + _CHUNK)
        parts = [flat[part].clone(), *(other[part] for other in others)]
        flat[part] = function(parts, None if below is None else below[part])
    return made
