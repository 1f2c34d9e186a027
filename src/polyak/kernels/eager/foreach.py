"""The kernels of plain torch that move or copy all tensors in one call, on any device."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
from typing_extensions import override

from polyak.kernels.base import Holding
from polyak.kernels.eager.chunked import Chunked, mixed
from polyak.kernels.eager.coalesce import runs_of
from polyak.kernels.eager.holding import Bound
from polyak.kernels.eager.operations import Eager, copy_all, lerp_all, longest
from polyak.kernels.eager.scratch import CHUNK, scratch

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

    from polyak.kernels.base import Generators, Lanes

__all__ = ["Copy", "Foreach"]

_LANE = 1 << 32  # chunks: more than any lane has


class Copy(Eager):
    """Copies each weight over its average, whatever their devices and dtypes, in one call.

    Attributes:
        guard: A number on the tensors' device: while it is not zero, a call copies nothing. None: every call copies.
    """

    name = "copy"

    def __init__(self, lanes: Lanes, weights: Sequence[Tensor]) -> None:
        super().__init__()
        (self._averages,), self._weights = lanes, weights
        self.guard: Tensor | None = None

    @override
    def __call__(self, rates: Sequence[float], generators: Sequence[Generators], done: int) -> None:
        weights = self._weights
        if self.guard is not None:
            keep = self.guard[0] != 0
            pairs = zip(self._averages, self._weights, strict=True)
            weights = [torch.where(keep, average, weight.detach().to(average.dtype)) for average, weight in pairs]
        self._write(0, self._averages[0])
        copy_all(self._averages, weights)


class Foreach(Eager, Holding):
    """All tensors of one dtype and device, and all lanes, in one call; equals ``loop`` bit for bit."""

    name = "foreach"

    def __init__(self, lanes: Lanes, weights: Sequence[Tensor]) -> None:
        super().__init__()
        self._lanes, self._weights = lanes, list(weights)
        self._runs = runs_of(lanes, weights, CHUNK)
        self._fewer = self._runs.lanes
        self._joined = _joined(self._fewer)
        self._bounds = [Bound(lane) for lane in self._fewer]
        # Where any element may have to be held, new values are made in scratch memory, chunk by chunk.
        self._chunked = [Chunked(self.name, mixed, lane, weights) for lane in lanes]
        self._careful: bool | None = False
        self._lane = 0

    @override
    def prepare(self, *, moved: bool, hold: bool) -> None:
        super().prepare(moved=moved, hold=hold)
        self._careful, self._lane = None if hold else False, 0
        if moved or not hold:
            for bound in self._bounds:
                bound.forget()
        for lane in self._chunked:
            lane.prepare(moved=moved, hold=hold)

    @override
    def position(self) -> int:
        if not self._careful:
            return super().position()
        return self._lane * _LANE + (self._chunked[self._lane].position() if self._lane < len(self._lanes) else 0)

    @property
    @override
    def held(self) -> Tensor:
        return torch.stack([lane.held[0] for lane in self._chunked])

    @override
    def held_each(self) -> Tensor:
        return torch.cat([lane.held_each() for lane in self._chunked])

    @override
    def __call__(self, rates: Sequence[float], generators: Sequence[Generators], done: int) -> None:
        weights = self._runs.gathered(scratch)
        length = longest(weights) if self._hold and self._weights[0].is_cpu else math.nan
        if self._careful is None:
            self._careful = not all(bound.holds(weights, length) for bound in self._bounds)
        if self._careful:
            first, chunks = divmod(done, _LANE)
            for self._lane in range(first, len(self._lanes)):  # noqa: B020 - it is where an interruption finds it
                self._chunked[self._lane]([rates[self._lane]], generators, chunks if self._lane == first else 0)
            self._lane = len(self._lanes)
            return
        replaced = [lane for lane, rate in zip(self._lanes, rates, strict=True) if rate == 1.0]
        for number, lane in enumerate(replaced):
            self._write(number, lane[0])
            copy_all(lane, self._weights)
        if done > len(replaced) or len(replaced) == len(self._lanes):
            return
        averages = self._joined
        if replaced:
            averages = _joined([lane for lane, rate in zip(self._fewer, rates, strict=True) if rate != 1.0])
        slower = [rate for rate in rates if rate != 1.0]
        self._write(len(replaced), averages[0])
        each = [weight for weight in weights for _ in slower] if len(slower) > 1 else weights
        lerp_all(averages, each, slower[0] if len(slower) == 1 else slower * len(weights))
        if self._hold:
            for bound in self._bounds:
                bound.moved()


def _joined(lanes: Lanes) -> list[Tensor]:
    # Tensor by tensor: a weight is still in the cache when it is read for the next lane.
    return [average for of_one in zip(*lanes, strict=True) for average in of_one]
