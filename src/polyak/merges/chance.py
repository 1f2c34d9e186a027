"""Values that are kept by chance, block after block, and the ranks that chances may depend on."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Literal

import torch

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

    from torch import Tensor

    from polyak.merges.about import About

__all__ = ["Ranks", "Rescale", "blocks", "keep"]

_CHUNK = 1 << 18  # values
Rescale = Literal["density", "l1", "none"]


def keep(
    change: Tensor,
    number: int,
    about: About,
    chance: Callable[[Tensor, int, int], Tensor],
    rescale: Rescale,
    parts: Iterable[tuple[int, int]],
) -> None:
    """Keep values by chance, block after block, and make up for those that are dropped.

    Args:
        change: The change, which is changed in place.
        number: The number of the input.
        about: What else is known.
        chance: Returns the chance of each value from one index to another of the flat change.
        rescale: How to make up for it.
        parts: The first index of each block, and the one behind it.
    """
    flat = change.reshape(-1)
    before = after = 0.0
    for begin, end in parts:
        part = flat[begin:end]
        chances = chance(flat, begin, end)
        place = replace(about, offset=about.offset + begin, count=part.numel())
        before += part.abs().sum().item()
        part.masked_fill_(place.uniform(number) >= chances, 0.0)
        after += part.abs().sum().item()
        if rescale == "density":
            part.div_(chances.clamp(min=torch.finfo(part.dtype).tiny))
    if rescale == "l1" and after:
        flat.mul_(before / after)


def blocks(values: int, length: int) -> Iterator[tuple[int, int]]:
    """Yield blocks of several whole rows, or of parts of one row where that is long."""
    step = max(1, _CHUNK // length) * length
    for begin in range(0, values, step):
        row = min(begin + step, values)
        for start in range(begin, row, _CHUNK):
            yield start, min(start + _CHUNK, row)


class Ranks:
    """The ranks of values by size within their rows, from 0 up; equal values have the mean of theirs.

    Sorting a copy in place and searching in it takes less memory than sorting indices twice.
    """

    def __init__(self, length: int) -> None:
        self._length = length
        self._sorted = torch.empty(0, device="cpu")
        self._has_equals = False

    def __call__(self, flat: Tensor, begin: int, end: int) -> Tensor:
        """Return the ranks of a block; the blocks of a row come in order, before the row is changed."""
        if begin % self._length == 0:
            sizes = flat[begin : max(end, begin + self._length)].abs().reshape(-1, self._length)
            sizes.numpy().sort(axis=1)
            self._sorted = sizes
            self._has_equals = bool((sizes[:, 1:] == sizes[:, :-1]).any())
        part = flat[begin:end].abs().reshape(len(self._sorted), -1)
        if len(part) > 1:
            return self._found(part).reshape(-1)
        order = torch.from_numpy(part[0].numpy().argsort())  # in a long row neighbours are found near each other
        ranks = torch.empty_like(part)
        ranks[:, order] = self._found(part[:, order])
        return ranks.reshape(-1)

    def _found(self, part: Tensor) -> Tensor:
        smaller = torch.searchsorted(self._sorted, part).to(part.dtype)
        if not self._has_equals:
            return smaller
        return (smaller + torch.searchsorted(self._sorted, part, right=True) - 1) / 2
