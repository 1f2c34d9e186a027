"""How often tensors were written to in place, as torch's version counters say."""

from __future__ import annotations

from operator import attrgetter
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from torch import Tensor

__all__ = ["many", "writes"]

_STEPS = 10


def writes(tensors: Iterable[Tensor]) -> list[int] | None:
    """Return how often each tensor was written to in place, or None where that is unknown."""
    try:
        return [*map(attrgetter("_version"), tensors)]
    except RuntimeError:  # inference tensors have no counter
        return None


def many(before: Sequence[int] | None, now: Sequence[int] | None) -> bool:
    """Return whether any tensor was written to so often between two looks that it was trained."""
    if before is None or now is None or len(before) != len(now):
        return False
    return any(n - first >= _STEPS for first, n in zip(before, now, strict=True))
