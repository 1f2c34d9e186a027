"""What a kernel is: it moves the averages of one group of tensors, and is bound to them once."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Literal, Protocol, runtime_checkable

import torch

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["SHORT", "Checking", "Generators", "Kernel", "KernelName", "Lanes"]

KernelName = Literal["auto", "loop", "foreach", "fused"]
SHORT = frozenset({torch.float16, torch.bfloat16})
"""Storage dtypes that need stochastic rounding: steps below their resolution would be lost."""
Generators = Callable[[torch.device], torch.Generator]
"""Gives an averager's own random generator for a device."""
Lanes = Sequence[Sequence["Tensor"]]
"""Averages of the same weights, one list for each averager of a bank; a lone averager is one lane."""


class Kernel(Protocol):
    """Moves ``average += rate * (weight - average)`` in place for each tensor of a group, in each of its lanes.

    Bound to its tensors when a plan is made, so that an update only calls it. It is given the live tensors themselves,
    no aliases of them: they follow ``parameter.data = ...``.
    """

    name: str

    def prepare(self, *, moved: bool) -> None:
        """Look where the tensors are and begin anew; called at the beginning of each update.

        Args:
            moved: Whether any tensor may have other memory than at the last call.
        """

    def __call__(self, rates: Sequence[float], generators: Sequence[Generators], done: int) -> None:
        """Move the averages.

        Args:
            rates: The rate of each lane.
            generators: What each lane draws its random numbers from.
            done: How far an interrupted call came, as ``position`` counts; that much is left out.
        """

    def position(self) -> int:
        """Return how many writes were made since ``prepare``."""


@runtime_checkable
class Checking(Kernel, Protocol):
    """A kernel with a check of its own for weights that are not finite."""

    def finite(self) -> bool:
        """Return whether all weights are finite now."""
