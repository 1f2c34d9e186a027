"""One rounding from float64 to any dtype, to the nearest value, ties to even."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["round_into"]

_LONG = {torch.float32, torch.float64}
_PART = 1 << 18  # values


def round_into(out: Tensor, exact: Tensor) -> None:
    """Round float64 values once.

    torch converts float64 to a 16-bit or 8-bit dtype by way of float32, and so rounds twice: a value just above the
    middle of two short ones becomes the middle, and then the even one. Here the way by float32 rounds to odd, which
    keeps on which side of the middle a value is.

    Args:
        out: Where the values go.
        exact: The values in float64; both flat.

    Examples:
        >>> value = torch.tensor([1 + 2**-8 + 2**-40], dtype=torch.float64)
        >>> out = torch.empty(1, dtype=torch.bfloat16)
        >>> round_into(out, value)
        >>> out.item(), value.to(torch.bfloat16).item()
        (1.0078125, 1.0)
    """
    if out.dtype in _LONG:  # which one conversion rounds once
        out.copy_(exact)
        return
    if exact.numel() > _PART:
        for short, part in zip(torch.split(out, _PART), torch.split(exact, _PART), strict=True):
            round_into(short, part)
        return
    single = exact.to(torch.float32)
    back = single.to(torch.float64)
    bits = single.view(torch.int32)
    inexact = (back != exact) & ((bits & 1) == 0) & torch.isfinite(single)
    # Away from zero the bits count up, towards it they count down.
    away = exact.abs() > back.abs()
    bits += inexact.to(torch.int32) * torch.where(away, 1, -1).to(torch.int32)
    out.copy_(single)
