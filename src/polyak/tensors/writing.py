"""Writing values into tensors that others hold."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from collections.abc import Sequence

__all__ = ["overwrite", "writable"]


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
