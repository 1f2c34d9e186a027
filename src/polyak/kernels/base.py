"""What a kernel is: it moves the averages of one group of tensors, and is bound to them once."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Literal, Protocol, runtime_checkable

import torch

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["SHORT", "Checking", "Generators", "Holding", "Kernel", "KernelName", "Lanes"]

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

    Where it holds, an element keeps its old value if the new one would not be finite; an average that is not finite
    itself begins anew from its weight: ``v = average + rate * (weight - average) if isfinite(average) else weight``,
    ``average = v if isfinite(v) else average``.
    """

    name: str

    def prepare(self, *, moved: bool, hold: bool) -> None:
        """Look where the tensors are and begin anew; called at the beginning of each update.

        Args:
            moved: Whether any tensor may have other memory than at the last call.
            hold: Whether elements whose new value would not be finite keep their old one.
        """

    def __call__(self, rates: Sequence[float], generators: Sequence[Generators], done: int) -> None:
        """Move the averages.

        Args:
            rates: The rate of each lane.
            generators: What each lane draws its random numbers from.
            done: How far an interrupted call came, as ``position`` counts; that much is left out.
        """

    def position(self) -> int:
        """Return how far the calls since ``prepare`` came; 0 where nothing was written."""


@runtime_checkable
class Holding(Kernel, Protocol):
    """A kernel that moves by a rate, and counts what it holds."""

    @property
    def held(self) -> Tensor:
        """How many elements each lane held since ``prepare``: int64 of shape (lanes,), where the averages are."""

    def held_each(self) -> Tensor:
        """Return the same for each tensor: int64 of shape (lanes, tensors)."""


@runtime_checkable
class Checking(Holding, Protocol):
    """A kernel with a check of its own for weights that are not finite."""

    def finite(self) -> bool:
        """Return whether all weights are finite now."""
