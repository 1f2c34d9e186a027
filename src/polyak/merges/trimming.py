"""Which values of a change are large: within a tensor by sorting, within a model by counting the bits of floats."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from torch import Tensor

__all__ = ["Search", "count_of", "counted", "narrowed", "trim"]

_BITS = 64
_CHUNK = 1 << 18  # values
_DIGIT = 16  # bits that are counted in one pass


def count_of(density: float, values: int, least: int = 0) -> int:
    """Return how many of some values are kept."""
    return min(values, max(least, int(density * values)))


def trim(change: Tensor, count: int, *, at_least: bool = False, largest: bool = False) -> Tensor:
    """Set all values but the largest by size to 0, in place and without a copy of the tensor.

    Args:
        change: The values, contiguous.
        count: How many are the largest; of equal ones the first.
        at_least: Whether all that are as large as the next one are among them: one more, or several equal ones.
        largest: Whether the largest are set to 0 instead of all others.
    """
    flat = change.reshape(-1)
    rank = min(count + int(at_least), flat.numel())
    if count >= flat.numel() or rank == 0:
        return change if (count > 0) != largest else change.zero_()
    limit = _size_of_rank(flat, rank)
    equal = flat.numel() if at_least else rank - _count_above(flat, limit)
    for part in torch.split(flat, _CHUNK):
        sizes = part.abs()
        chosen = sizes > limit
        places = (sizes == limit).nonzero().reshape(-1)[:equal]
        chosen[places] = True
        equal -= len(places)
        part.masked_fill_(chosen if largest else ~chosen, 0.0)
    return change


def _size_of_rank(flat: Tensor, rank: int) -> float:
    """Return the size that so many values are at least as large as."""
    search = Search((rank,), (0,), 0)
    while not search.is_done:
        counts = (counted([part], search) for part in torch.split(flat, _CHUNK))
        search = narrowed(counts, search, 1.0, 0)
    return search.limits()[0]


def _count_above(flat: Tensor, limit: float) -> int:
    return sum(int((part.abs() > limit).sum()) for part in torch.split(flat, _CHUNK))


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
        counts = np.bincount(digits.astype(np.int64), minlength=1 << _DIGIT)
        values = counts.nonzero()[0]
        found.append(Counter(dict(zip(values.tolist(), counts[values].tolist(), strict=True))))
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
