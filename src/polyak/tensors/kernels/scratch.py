"""Memory for what kernels of plain torch convert, join or draw: a chunk at a time, used again at each update."""

from __future__ import annotations

import threading

import torch
from torch import Tensor

__all__ = ["CHUNK", "scratch"]

CHUNK = 1 << 20
"""Elements: what a temporary may take, and enough that a call is little beside its work."""


class _Scratch(threading.local):
    """Memory for one chunk of each kind on each device, of each thread: offloaded averages are moved on another one."""

    def __init__(self) -> None:
        self.kept: dict[tuple[str, torch.device, torch.dtype], Tensor] = {}


_SCRATCH = _Scratch()


def scratch(device: torch.device, dtype: torch.dtype, size: int, use: str = "weights") -> Tensor:
    """Return memory for so many elements, a chunk at most, which holds until it is asked for again for this use."""
    memory = _SCRATCH.kept.get((use, device, dtype))
    if memory is None or memory.numel() < size:
        memory = _SCRATCH.kept[use, device, dtype] = torch.empty(CHUNK, dtype=dtype, device=device)
    return memory[:size]
