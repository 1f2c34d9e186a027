"""Small tensors that lie side by side in memory, moved as one: a call of each costs more than its numbers."""

from __future__ import annotations

from itertools import pairwise
from operator import add, attrgetter
from typing import TYPE_CHECKING, NamedTuple, cast

import torch
from torch import Tensor

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from polyak.kernels.base import Lanes

__all__ = ["Runs", "runs_of"]

_SMALL = 1 << 12  # elements: larger ones take longer to be joined than a call does
_WORTH = 16  # tensors that make a run: with fewer, to join them takes as long as what it saves


class _Run(NamedTuple):
    averages: list[Tensor]  # of each lane, as one tensor
    weights: list[Tensor]
    size: int


class Runs(NamedTuple):
    """The averages of some lanes and their weights, in fewer tensors.

    Attributes:
        alone: Averages, lanes × tensors, of those that are moved by themselves.
        weights: Their weights.
        runs: Runs of the others.
    """

    alone: list[list[Tensor]]
    weights: list[Tensor]
    runs: list[_Run]

    @property
    def lanes(self) -> list[list[Tensor]]:
        """The averages of each lane, those of a run as one."""
        return [[*own, *(run.averages[lane] for run in self.runs)] for lane, own in enumerate(self.alone)]

    def gathered(self, scratch: Callable[[torch.device, torch.dtype, int], Tensor]) -> list[Tensor]:
        """Return the weights as they are now, those of a run in one piece of scratch memory."""
        if not self.runs:
            return self.weights
        one, sizes = self.runs[0].weights[0], [run.size for run in self.runs]
        pieces = torch.split(scratch(one.device, one.dtype, sum(sizes)), sizes)
        return [*self.weights, *(torch.cat(run.weights, out=to) for run, to in zip(self.runs, pieces, strict=True))]


def runs_of(lanes: Lanes, weights: Sequence[Tensor], most: int) -> Runs:
    """Return averages and weights with those joined that lie side by side in each lane, ``most`` elements at most."""
    fit = [i for i, weight in enumerate(weights) if _joins(weight)]
    for lane in lanes:
        fit = [i for i in fit if lane[i].is_contiguous()]
    fit.sort(key=lambda i: lanes[0][i].data_ptr())
    sizes = [weights[i].numel() for i in fit]
    runs: list[list[int]] = []
    room = 0
    for follows, i, size in zip(_following([[lane[i] for i in fit] for lane in lanes]), fit, sizes, strict=True):
        if size > room or not follows:
            runs.append([])
            room = most
        runs[-1].append(i)
        room -= size
    joined, taken = [], 0
    for run in runs:
        size = sum(weights[i].numel() for i in run)
        if len(run) >= _WORTH and taken + size <= most:
            joined.append(_Run([_across(lane[run[0]], size) for lane in lanes], [weights[i] for i in run], size))
            taken += size
        else:
            run.clear()
    within = {i for run in runs for i in run}
    rest = [i for i in range(len(weights)) if i not in within]
    return Runs([[lane[i] for i in rest] for lane in lanes], [weights[i] for i in rest], joined)


def _joins(weight: Tensor) -> bool:
    # On an accelerator one launch moves all tensors as they are.
    plain = type(weight) in (Tensor, torch.nn.Parameter) and weight.is_cpu and weight.is_floating_point()
    return plain and weight.dim() == 1 and 0 < weight.numel() <= _SMALL and weight.is_contiguous()


def _following(lanes: Lanes) -> list[bool]:
    """Return for each average whether it lies behind the one before it, in the same tensor, in all lanes."""
    found = [True] * len(lanes[0])
    for lane in lanes:
        starts, sizes = [*map(Tensor.data_ptr, lane)], [*map(attrgetter("nbytes"), lane)]
        bases = [*map(attrgetter("_base"), lane)]
        ends = [0, *map(add, starts, sizes)]
        same = [False, *(a is b and a is not None for a, b in pairwise(bases))]
        found = [f and s and start == end for f, s, start, end in zip(found, same, starts, ends, strict=False)]
    return found


def _across(first: Tensor, size: int) -> Tensor:
    """Return a flat view of this length that begins with a tensor and shares its version counter."""
    with torch.enable_grad():  # views made under no_grad() may only be written to under it
        return cast("Tensor", first._base).as_strided((size,), (1,), first.storage_offset())  # noqa: SLF001 - as above
