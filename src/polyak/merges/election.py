"""The sign that most changes agree on, and the mean of those that have it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

import torch

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

__all__ = ["Divide", "Elect", "agreed", "elected"]

Elect = Literal["mass", "weighted_mass", "count"]
Divide = Literal["weights", "count"]


def elected(changes: Sequence[Tensor], weights: Sequence[float], elect: Elect) -> Tensor:
    """Return the number whose sign is elected: the sum of changes, of weighted changes, or of signs."""
    factors = weights if elect == "weighted_mass" else [1.0] * len(weights)
    total = torch.zeros_like(changes[0])
    for change, factor in zip(changes, factors, strict=True):
        total.add_(change.sign() if elect == "count" else change, alpha=factor)
    return total


def agreed(changes: Sequence[Tensor], weights: Sequence[float], votes: Tensor, divide: Divide, zero: float) -> Tensor:
    """Return the mean of the changes that have the elected sign.

    Args:
        changes: The changes, those that were trimmed being 0.
        weights: What each counts.
        votes: What ``elected`` returned.
        divide: Whether to divide by the sum of the weights that agree, or by their count.
        zero: The sign that 0 is taken for.
    """
    positive = votes > 0 if zero < 0 else votes >= 0
    total, divisor = torch.zeros_like(votes), torch.zeros_like(votes)
    for change, weight in zip(changes, weights, strict=True):
        has = torch.where(positive, change > 0, change < 0).to(votes.dtype)
        total.add_(change * has, alpha=weight)
        divisor.add_(has, alpha=weight if divide == "weights" else 1.0)
    return torch.where(divisor == 0, torch.zeros_like(total), total / divisor)
