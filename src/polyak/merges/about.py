"""The tensors that a merge gets, in words, and random numbers that depend on nothing but their place."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["About"]

_GOLDEN, _FIRST, _SECOND = 0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB  # of SplitMix64


@dataclass(frozen=True)
class About:
    """The tensor that is merged.

    Attributes:
        name: Its name.
        shape: The shape of the whole tensor; complex ones have a last dimension of 2.
        offset: The index of the first value at hand in the flat tensor; 0 for whole tensors.
        count: How many values are at hand.
        weights: What each input counts.
        statistics: What ``gather`` returned, or None.
        seed: The seed of ``uniform``.
        extras: The same values of the files that ``Merge.extras`` names.
    """

    name: str
    shape: tuple[int, ...]
    offset: int
    count: int
    weights: tuple[float, ...]
    statistics: Any = None
    seed: int = 0
    extras: tuple[Tensor, ...] = ()

    def uniform(self, number: int = 0) -> Tensor:
        """Return a random number in [0, 1) for each value at hand, in float64, flat.

        Each depends on the seed, the number of the input, the tensor's name and the place in the tensor only: threads
        and the size of pieces change nothing.

        Args:
            number: The number of the input.

        Examples:
            >>> whole = About("w", (6,), 0, 6, (1.0,)).uniform()
            >>> torch.equal(whole[4:], About("w", (6,), 4, 2, (1.0,)).uniform())
            True
        """
        key = hashlib.sha256(f"{self.seed}\n{number}\n{self.name}".encode()).digest()
        with np.errstate(over="ignore"):  # arithmetic modulo 2**64
            state = np.arange(self.offset + 1, self.offset + self.count + 1, dtype=np.uint64)
            state *= np.uint64(_GOLDEN)
            state += np.uint64(int.from_bytes(key[:8], "little"))
            state ^= state >> np.uint64(30)
            state *= np.uint64(_FIRST)
            state ^= state >> np.uint64(27)
            state *= np.uint64(_SECOND)
            state ^= state >> np.uint64(31)
        return torch.from_numpy((state >> np.uint64(11)).astype(np.float64) * 2.0**-53)
