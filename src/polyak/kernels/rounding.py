"""How torch rounds on this processor: all kernels follow it, so that each gives the same bits."""

from __future__ import annotations

from functools import cache

import numpy as np
import torch

__all__ = ["rounds_once"]


@cache
def rounds_once() -> bool:
    """Return whether torch rounds a product and its sum once, as one instruction of the processor does."""
    old, new = (np.float32(1) / np.arange(first, first + 64, dtype=np.float32) for first in (3, 71))
    rate = np.float32(0.3)
    twice = old + rate * (new - old)
    return not np.array_equal(torch.from_numpy(old).lerp(torch.from_numpy(new), float(rate)).numpy(), twice)
