"""The kernels of plain torch that convert or round, a chunk of memory at a time, and the reference loop."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from typing_extensions import override

from polyak.kernels.base import Holding
from polyak.kernels.eager import holding
from polyak.kernels.eager.holding import memory, starts
from polyak.kernels.eager.operations import Eager, copy_all, lerp_all
from polyak.kernels.eager.scratch import CHUNK, scratch

if TYPE_CHECKING:
    from polyak.kernels.base import Generators

__all__ = ["Chunked", "loop", "mixed", "nearest", "stochastic"]

Pairs = Sequence[tuple[Tensor, Tensor]]
Move = Callable[[Pairs, float, "Generators"], None]
"""Moves averages towards their weights, ``average += rate * (weight - average)`` in place, by one write each."""


class Chunked(Eager, Holding):
    """One lane of tensors, in chunks: small tensors several at a time, large ones in pieces.

    Which ones belong together depends on nothing but their shapes: random numbers are drawn alike in any process.
    """

    def __init__(
        self, name: str, move: Move, averages: Sequence[Tensor], weights: Sequence[Tensor], *, joined: bool = True
    ) -> None:
        super().__init__()
        self.name = name
        self._move, self._averages, self._weights = move, averages, weights
        self._held: dict[int, tuple[list[int], list[Tensor]]] = {}
        # The largest first: where there is too little memory for what it is converted to, nothing has moved yet.
        order = sorted(range(len(averages)), key=lambda i: -averages[i].numel())
        self._chunks: list[list[int]] = []
        room = 0
        for i in order:
            size = averages[i].numel()
            if not self._chunks or size > room or not joined:
                self._chunks.append([])
                room = CHUNK
            self._chunks[-1].append(i)
            room -= size

    @override
    def prepare(self, *, moved: bool, hold: bool) -> None:
        super().prepare(moved=moved, hold=hold)
        self._held.clear()

    @override
    def __call__(self, rates: Sequence[float], generators: Sequence[Generators], done: int) -> None:
        if rates[0] == 1.0 and not self._hold:
            # lerp with weight 1 is no copy: a NaN in the average would stay. Twice is once.
            self._write(0, self._averages[0])
            copy_all(self._averages, self._weights)
            return
        number = 0
        for chunk in self._chunks:
            chosen = [(self._averages[i], self._weights[i]) for i in chunk]
            for pairs in [chosen] if len(chosen) > 1 else _pieces(*chosen[0]):
                if number >= done:
                    self._move_chunk(number, chunk, pairs, rates[0], generators)
                number += 1

    @property
    @override
    def held(self) -> Tensor:
        return self.held_each().sum(1)

    @override
    def held_each(self) -> Tensor:
        each = torch.zeros((1, len(self._averages)), dtype=torch.int64, device=self._averages[0].device)
        for tensors, counts in self._held.values():
            for i, count in zip(tensors, counts, strict=True):
                each[0, i] += count
        return each

    def _move_chunk(
        self, number: int, tensors: list[int], pairs: Pairs, rate: float, generators: Sequence[Generators]
    ) -> None:
        averages, weights = [average for average, _ in pairs], [weight for _, weight in pairs]
        if self._hold and self._move is mixed and averages[0].is_cpu:  # a look at short weights takes longer than both
            weights = holding.converted(averages, weights)
        if not self._hold or holding.needless(averages, weights):
            self._write(number, averages[0])
            if rate == 1.0:
                copy_all(averages, weights)
            else:
                self._move([*zip(averages, weights, strict=True)], rate, generators[0])
            return
        made, counts = holding.values(pairs, rate, lambda copies: self._move(copies, rate, generators[0]))
        self._held[number] = tensors, counts
        self._write(number, averages[0])
        copy_all(averages, made)


def loop(pairs: Pairs, rate: float, generators: Generators) -> None:
    """Move tensors one after the other: the reference, for any devices and dtypes."""
    del generators
    for average, weight in pairs:
        alike = average.dtype == weight.dtype and average.device == weight.device
        average.lerp_(weight if alike else weight.to(average.device, average.dtype), rate)


def mixed(pairs: Pairs, rate: float, generators: Generators) -> None:
    """Move tensors towards weights of another dtype or on another device, converted in memory that is used again."""
    del generators
    averages = [average for average, _ in pairs]
    lerp_all(averages, holding.converted(averages, [weight for _, weight in pairs]), rate)


def stochastic(pairs: Pairs, rate: float, generators: Generators) -> None:
    """Move bfloat16 or float16 averages in float32, and round up with the probability of the discarded fraction.

    Without it steps below the dtype's resolution are lost: a bfloat16 average at decay 0.9999 never moves.
    """
    averages = [average for average, _ in pairs]
    exact = _exact(pairs, averages, rate)
    generator = generators(exact.device)
    rounded = _cut_bits(exact, generator) if averages[0].dtype == torch.bfloat16 else _choose(exact, generator)
    copy_all(averages, _in_order(rounded, averages))


def nearest(pairs: Pairs, rate: float, generators: Generators) -> None:
    """Move bfloat16 or float16 averages in float32, and round each to the nearest value, which may be the old one."""
    del generators
    averages = [average for average, _ in pairs]
    copy_all(averages, _in_order(_exact(pairs, averages, rate), averages))


def _exact(pairs: Pairs, averages: Sequence[Tensor], rate: float) -> Tensor:
    """Return new values in float32, one after the other in scratch memory."""
    exact, new = (memory(averages, torch.float32, use) for use in ("averages", "weights"))
    copy_all(_in_order(exact, averages), averages)
    copy_all(_in_order(new, averages), [weight for _, weight in pairs])
    return exact.lerp_(new, rate)


def _pieces(average: Tensor, weight: Tensor) -> list[list[tuple[Tensor, Tensor]]]:
    if average.numel() <= CHUNK or not (average.is_contiguous() and weight.is_contiguous()):
        return [[(average, weight)]]
    both = zip(torch.split(average.view(-1), CHUNK), torch.split(weight.view(-1), CHUNK), strict=True)
    return [[pair] for pair in both]


def _in_order(memory: Tensor, like: Sequence[Tensor]) -> list[Tensor]:
    """Return pieces of memory of the shapes of some tensors, in the order of their elements, however these lie.

    So each element gets the same random number in any layout.
    """
    return [memory[start : start + t.numel()].view(t.shape) for t, start in zip(like, starts(like), strict=False)]


def _cut_bits(exact: Tensor, generator: torch.Generator) -> Tensor:
    """Return float32 values that bfloat16 can hold: random bits are added to those that it lacks, which are cut off."""
    random = scratch(exact.device, torch.int64, -(-exact.numel() // 4), "noise")
    random.random_(-(1 << 63), None, generator=generator)
    noise = random.view(torch.int16)[: exact.numel()].view(exact.shape)
    if exact.device.type != "cpu" or not exact.sum().isfinite():
        noise.masked_fill_(exact.isnan(), -(1 << 15))  # a NaN of all bits would become zero
    exact.view(torch.int32).add_(noise).add_(1 << 15).bitwise_and_(-(1 << 16))
    return exact


def _choose(exact: Tensor, generator: torch.Generator) -> Tensor:
    """Return one of the two float16 neighbours of each value."""
    noise = torch.rand(exact.shape, dtype=torch.float32, device=exact.device, generator=generator)
    nearest = exact.half()
    # Its other neighbour, and where the value lies between them.
    error = exact - nearest.float()
    other = torch.nextafter(nearest, torch.where(error > 0, math.inf, -math.inf).half())
    fraction = error.abs() / (other.float() - nearest.float()).abs()
    return torch.where(noise < fraction, other, nearest)
