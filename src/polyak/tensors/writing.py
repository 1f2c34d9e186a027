"""Writing values into tensors that others hold."""

from __future__ import annotations

from bisect import bisect_left
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from polyak.tensors.located import plain, span

if TYPE_CHECKING:
    from collections.abc import Sequence

__all__ = ["overwrite", "read_only", "writable"]

_REGIONS = Path("/proc/self/maps")


def overwrite(target: Tensor, value: Tensor | None) -> None:
    """Copy values into a tensor without autograd noticing: graphs that saved it stay valid once it is restored."""
    if value is None:
        return
    # An expanded tensor holds each value once: write through the one element of each expanded dimension.
    for dim, (size, stride) in enumerate(zip(target.shape, target.stride(), strict=True)):
        if stride == 0 and size > 1:
            target, value = target.narrow(dim, 0, 1), value.narrow(dim, 0, 1)
    target.data.copy_(value.detach())


def writable(live: Sequence[Tensor]) -> torch.inference_mode:
    """Return the mode in which these tensors may be written."""
    # Inference tensors may be written under inference mode only, normal ones keep their version counters outside of it.
    return torch.inference_mode(mode=any(tensor.is_inference() for tensor in live))


def read_only(tensors: Sequence[Tensor]) -> list[Tensor]:
    """Return the tensors whose memory cannot be written, as after ``np.load(mmap_mode="r")``: writing ends the process.

    Linux says which memory that is. Elsewhere none is found.
    """
    try:
        regions = [line.split(maxsplit=2)[:2] for line in _REGIONS.read_text().splitlines()]
    except OSError:
        return []
    guarded = sorted([int(end, 16) for end in place.split("-")] for place, rights in regions if "w" not in rights)
    starts = [start for start, _ in guarded]
    found = []
    for tensor in plain(tensors):
        first = tensor.data_ptr()
        before = bisect_left(starts, first + span(tensor))  # how many begin before the tensor ends
        if tensor.is_cpu and tensor.numel() and before and guarded[before - 1][1] > first:
            found.append(tensor)
    return found
