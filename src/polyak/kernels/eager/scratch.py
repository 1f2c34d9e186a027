"""Memory for what kernels of plain torch convert, join or draw: a chunk at a time, used again at each update."""

from __future__ import annotations

import threading

import torch
from torch import Tensor

__all__ = ["CHUNK", "scratch"]

CHUNK = 1 << 20
"""Elements: what a temporary may take, and enough that a call is little beside its work."""


class _Scratch(threading.local):
    """Memory for one chunk of each kind on each stream, of each thread: offloaded averages are moved on another one."""

    def __init__(self) -> None:
        self.kept: dict[tuple[str, torch.device, torch.dtype, int], Tensor] = {}


_SCRATCH = _Scratch()


def scratch(device: torch.device, dtype: torch.dtype, size: int, use: str = "weights") -> Tensor:
    """Return memory for so many elements, good until it is asked for again for this use; above a chunk it is new."""
    if size > CHUNK:
        return torch.empty(size, dtype=dtype, device=device)
    # What is enqueued on another stream may be read there still.
    stream = torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else 0
    key = use, device, dtype, stream
    memory = _SCRATCH.kept.get(key)
    if memory is None or memory.numel() < size:
        memory = _SCRATCH.kept[key] = torch.empty(CHUNK, dtype=dtype, device=device)
    return memory[:size]
