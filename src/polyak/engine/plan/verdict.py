"""Whether weights are finite, as their device finds it: that guards its kernels, and the host reads it later."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from polyak.kernels.cuda.fused import FusedCUDA
from polyak.kernels.eager.foreach import Copy
from polyak.tensors.arrival import Arrival, send

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

    from polyak.engine.plan.groups import Group

__all__ = ["Verdict", "unguard"]


class Verdict:
    """What one update finds of its weights, and all that it moves obeys.

    Args:
        groups: What the update moves; all on one device, by kernels that take a guard.
    """

    def __init__(self, groups: Sequence[Group]) -> None:
        self._kernels = [group.kernel for group in groups if isinstance(group.kernel, FusedCUDA)]
        device = groups[0].averages[0][0].device
        self._found = torch.zeros(1, dtype=torch.int32, device=device)

    @staticmethod
    def guards(groups: Sequence[Group]) -> bool:
        """Return whether all groups take a guard, and one device has all that they read and write."""
        devices = {tensor.device for group in groups for own in (*group.averages, group.weights) for tensor in own}
        return len(devices) == 1 and all(isinstance(group.kernel, FusedCUDA | Copy) for group in groups)

    def look(self) -> None:
        """Look at the weights as they are now."""
        self._found.zero_()
        for kernel in self._kernels:
            kernel.look(self._found)

    def guard(self, groups: Sequence[Group]) -> None:
        """Let groups move only where the weights were finite at the last look."""
        _set(groups, self._found)

    def send(self) -> Arrival:
        """Send to the host what was found."""
        return send([self._found])


def unguard(groups: Sequence[Group]) -> None:
    """Let groups move whatever was found."""
    _set(groups, None)


def _set(groups: Sequence[Group], guard: Tensor | None) -> None:
    for group in groups:
        if isinstance(group.kernel, FusedCUDA | Copy):
            group.kernel.guard = guard
