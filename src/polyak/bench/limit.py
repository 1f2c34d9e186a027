"""The measured limit: the fastest passes over as many bytes as an update must move, in one piece of memory each."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

__all__ = ["LIMITS", "passes"]

LIMITS = ("flat lerp_", "flat add")
"""``a.lerp_(b, w)`` and ``torch.add(a, b, out=c)``: both read two words and write one for each value."""


def passes(nbytes: int, device: torch.device) -> Mapping[str, Callable[[], object]]:
    """Return the passes over ``nbytes`` bytes, which is what the update reads and writes together."""
    count = max(nbytes // (3 * torch.float32.itemsize), 1)
    a, b, c = (torch.full((count,), value, device=device) for value in (1.0, 1.5, 0.0))
    return {"flat lerp_": lambda: a.lerp_(b, 0.1), "flat add": lambda: torch.add(a, b, out=c)}
