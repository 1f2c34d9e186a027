"""Which values of a change are large: within a tensor by sorting, within a model by counting the bits of floats."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from torch import Tensor

__all__ = ["Search", "count_of", "counted", "largest", "narrowed"]

_BITS = 64
_DIGIT = 16  # bits that are counted in one pass


def count_of(density: float, values: int, least: int = 0) -> int:
    """Return how many of some values are kept."""
    return min(values, max(least, int(density * values)))


def largest(change: Tensor, kept: int, *, at_least: bool = False) -> Tensor:
    """Return which values are the largest by size, as a mask.

    Args:
        change: The values.
        kept: How many; of equal ones the first.
        at_least: Whether to keep all that are as large as the next one: one more, or several where they are equal.
    """
    flat = change.abs().reshape(-1)
    mask = torch.zeros(flat.numel(), dtype=torch.bool, device=flat.device)
    if at_least:
        if kept >= flat.numel():
            return mask.logical_not_().reshape(change.shape)
        limit = flat.kthvalue(flat.numel() - kept).values
        return (flat >= limit).reshape(change.shape)
    mask[flat.argsort(descending=True, stable=True)[:kept]] = True
    return mask.reshape(change.shape)


class Search(NamedTuple):
    """The search for the k-th largest size of all values of each input, one digit of its bits after the other.

    Attributes:
        ranks: How many values are at least as large as the one that is looked for, among those with the same beginning.
        prefixes: The bits that are known, of each input.
        known: How many they are.
    """

    ranks: tuple[int, ...]
    prefixes: tuple[int, ...]
    known: int

    @property
    def is_done(self) -> bool:
        """Whether all bits are known."""
        return self.known == _BITS

    def limits(self) -> list[float]:
        """Return the sizes that were looked for."""
        return [float(size) for size in np.array(self.prefixes, dtype=np.uint64).view(np.float64)]


def counted(changes: Sequence[Tensor], search: Search | None) -> list[Counter[int]]:
    """Return how often each next digit occurs, of each input."""
    found = []
    for number, change in enumerate(changes):
        bits = change.abs().reshape(-1).contiguous().numpy().view(np.uint64)  # sizes are ordered like their bits
        known = search.known if search else 0
        if search and known:
            bits = bits[bits >> np.uint64(_BITS - known) == np.uint64(search.prefixes[number])]
        digits = (bits >> np.uint64(_BITS - known - _DIGIT)) & np.uint64((1 << _DIGIT) - 1)
        values, counts = np.unique(digits, return_counts=True)
        found.append(Counter(dict(zip(values.tolist(), counts.tolist(), strict=True))))
    return found


def narrowed(counts: Iterable[Sequence[Counter[int]]], search: Search | None, density: float, extra: int) -> Search:
    """Return the search with one more digit known.

    Args:
        counts: What ``counted`` returned, of all tensors or pieces.
        search: The search before, or None.
        density: Which part of all values is kept.
        extra: How many more: 1 for the first that is not.
    """
    totals: list[Counter[int]] = []
    for own in counts:
        totals = totals or [Counter() for _ in own]
        for total, some in zip(totals, own, strict=True):
            total.update(some)
    numbers = [sum(total.values()) for total in totals]
    ranks = search.ranks if search else tuple(min(n, max(1, count_of(density, n) + extra)) for n in numbers)
    prefixes, left = [], []
    for number, (total, rank) in enumerate(zip(totals, ranks, strict=True)):
        rest = rank
        digit = 0
        for digit in sorted(total, reverse=True):
            if rest <= total[digit]:
                break
            rest -= total[digit]
        prefixes.append(((search.prefixes[number] if search else 0) << _DIGIT) | digit)
        left.append(rest)
    return Search(tuple(left), tuple(prefixes), (search.known if search else 0) + _DIGIT)
