"""What an update does about values that are not finite: hold them, look before it moves, or let them in."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from torch import Tensor

__all__ = ["Held", "Nonfinite", "looks"]

Nonfinite = Literal["hold", "skip", "raise", "propagate"]


def looks(nonfinite: Nonfinite) -> bool:
    """Return whether an update looks at the weights before it moves anything."""
    return nonfinite in {"skip", "raise"}


class Held(NamedTuple):
    """What one update held; it stands on the devices until the next one begins.

    Attributes:
        moves: For each move of the update the counts of held elements, int64 of shape (), one for each group.
        elements: How many elements each move moves.
        names: Returns how many elements of each tensor were held; waits for the devices.
    """

    moves: Sequence[Sequence[Tensor]]
    elements: int
    names: Callable[[], Mapping[str, int]]
