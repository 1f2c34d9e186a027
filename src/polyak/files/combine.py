"""The weighted mean of pieces."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, NoReturn

import torch

from polyak.errors import NonFiniteError
from polyak.errors.formatting import shown
from polyak.files.rounding import round_into

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

    from polyak.files.stream import Piece

__all__ = ["Average", "first_bad", "largest", "refuse_large"]

_PART = 1 << 18  # values


class Average:
    """The weighted mean: sums in float64, block by block in the processor's cache, rounded once."""

    whole = False
    _BLOCK = 3 << 13  # values: torch computes fewer than 32,768 on the calling thread

    def __init__(self, weights: Sequence[float], *, raises: bool) -> None:
        self._weights, self._raises = [*weights], raises
        self._equal = all(weight == 1.0 / len(weights) for weight in weights)
        self._sum, self._term = (torch.empty(self._BLOCK, dtype=torch.float64, device="cpu") for _ in range(2))

    def __call__(self, piece: Piece, sources: Sequence[Tensor], out: Tensor) -> int:
        """Fill ``out``; return the index of the first input with a NaN or an infinity, or -1."""
        shifted = out.dtype == torch.float64  # which has no digits to spare
        for begin in range(0, out.numel(), self._BLOCK):
            end = min(out.numel(), begin + self._BLOCK)
            total, term = self._sum[: end - begin], self._term[: end - begin]
            blocks = [source[begin:end] for source in sources]
            if shifted:
                self._from_the_first(blocks, total, term)
            elif self._equal:
                self._mean(blocks, total, term)
            else:
                self._plain(blocks, total, term)
            if self._raises and not largest(total) <= torch.finfo(out.dtype).max:
                if (bad := first_bad(blocks)) >= 0:
                    return bad
                refuse_large(piece, out.dtype, largest(total))
            round_into(out[begin:end], total)
        return -1

    @staticmethod
    def _mean(blocks: Sequence[Tensor], total: Tensor, term: Tensor) -> None:
        """Sum, and divide once: a mean in the middle of two short values is then exactly there."""
        total.copy_(blocks[0])
        for block in blocks[1:]:
            total.add_(term.copy_(block))
        total.div_(len(blocks))

    def _plain(self, blocks: Sequence[Tensor], total: Tensor, term: Tensor) -> None:
        total.copy_(blocks[0]).mul_(self._weights[0])
        for block, weight in zip(blocks[1:], self._weights[1:], strict=True):
            total.add_(term.copy_(block).mul_(weight))

    def _from_the_first(self, blocks: Sequence[Tensor], total: Tensor, term: Tensor) -> None:
        """Sum the distances from the first input: files that are equal stay what they are, bit for bit."""
        total.copy_(blocks[0])
        for block, weight in zip(blocks[1:], self._weights[1:], strict=True):
            total.add_(term.copy_(block).sub_(blocks[0]).mul_(weight))


def largest(values: Tensor) -> float:
    """Return the largest size of a value; NaN if there is one."""
    low, high = torch.aminmax(values)
    return max(-low.item(), high.item()) if high == high else math.nan  # noqa: PLR0124 - NaN


def refuse_large(piece: Piece, dtype: torch.dtype, size: float) -> NoReturn:
    """Refuse values that become infinities.

    Raises:
        NonFiniteError: Always.
    """
    message = (
        f"{shown(piece.entry.names[0])} has values up to {size:.3g}, and {dtype} holds {torch.finfo(dtype).max:.3g} at "
        "most; give another dtype (--dtype float32)"
    )
    raise NonFiniteError(message)


def first_bad(blocks: Sequence[Tensor]) -> int:
    """Return the index of the first tensor with a NaN or an infinity, or -1."""
    for index, block in enumerate(blocks):
        for part in torch.split(block, _PART):
            wide = part.to(torch.float64)
            if wide.numel() and not largest(wide) < math.inf:
                return index
    return -1
