"""The kernels of plain torch, for any device: the reference loop, and those that equal it bit for bit."""

from __future__ import annotations

import math
import threading
from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from typing_extensions import override

from polyak.tensors.kernels.kernel import Kernel
from polyak.tensors.kernels.runs import runs_of

if TYPE_CHECKING:
    from collections.abc import Sequence

    from polyak.tensors.kernels.kernel import Generators, Lanes

__all__ = ["Copy", "Foreach", "PerTensor", "copy_all", "loop", "stochastic"]

_CHUNK = 1 << 20  # elements: what a temporary may take, and enough that a call is little beside its work


class _Scratch(threading.local):
    """Memory for one piece on each device, of each thread: offloaded averages are moved on another one."""

    def __init__(self) -> None:
        self.kept: dict[tuple[torch.device, torch.dtype], Tensor] = {}


_SCRATCH = _Scratch()

try:  # torch 2.15 made these public; older versions have only the private names
    from torch.foreach import copy_ as _foreach_copy_
    from torch.foreach import lerp_ as _foreach_lerp_
except ImportError:
    from torch import _foreach_copy_, _foreach_lerp_  # type: ignore[no-redef]  # the same functions under older names


Move = Callable[[Tensor, Tensor, float, "Generators"], None]
"""Moves one tensor: ``average += rate * (weight - average)`` in place, by one write."""


class _Eager(Kernel):
    """What kernels of torch's own functions have in common: torch finds the tensors, and counts what is written.

    Averages may share a counter of writes, so that it is compared with what it was just before a write.
    """

    def __init__(self) -> None:
        self._last: tuple[int, Tensor, int] | None = None

    @override
    def prepare(self, *, moved: bool) -> None:
        self._last = None

    @override
    def position(self) -> int:
        if self._last is None:
            return 0
        number, written, version = self._last
        return number + (_version(written) != version)

    def _write(self, number: int, average: Tensor) -> None:
        """Note that write ``number`` is about to be made, which ``average`` will show."""
        self._last = number, average, _version(average)


class PerTensor(_Eager):
    """One lane of tensors, written piece by piece."""

    def __init__(self, name: str, move: Move, averages: Sequence[Tensor], weights: Sequence[Tensor]) -> None:
        super().__init__()
        self.name = name
        self._move, self._averages, self._weights = move, averages, weights

    @override
    def __call__(self, rates: Sequence[float], generators: Sequence[Generators], done: int) -> None:
        if rates[0] == 1.0:
            # lerp with weight 1 is no copy: a NaN in the average would stay. Twice is once.
            self._write(0, self._averages[0])
            copy_all(self._averages, self._weights)
            return
        pairs = zip(self._averages, self._weights, strict=True)
        pieces = [piece for average, weight in pairs for piece in _pieces(average, weight)]
        for number, (average, weight) in enumerate(pieces[done:], done):
            self._write(number, average)
            self._move(average, weight, rates[0], generators[0])


class Copy(_Eager):
    """Copies each weight over its average, whatever their devices and dtypes, in one call."""

    name = "copy"

    def __init__(self, lanes: Lanes, weights: Sequence[Tensor]) -> None:
        super().__init__()
        (self._averages,), self._weights = lanes, weights

    @override
    def __call__(self, rates: Sequence[float], generators: Sequence[Generators], done: int) -> None:
        self._write(0, self._averages[0])
        copy_all(self._averages, self._weights)


class Foreach(_Eager):
    """All tensors of one dtype and device, and all lanes, in one call; equals ``loop`` bit for bit."""

    name = "foreach"

    def __init__(self, lanes: Lanes, weights: Sequence[Tensor]) -> None:
        super().__init__()
        self._lanes, self._weights = lanes, list(weights)
        self._runs = runs_of(lanes, weights, _CHUNK)
        self._fewer = self._runs.lanes
        self._joined = _joined(self._fewer)

    @override
    def __call__(self, rates: Sequence[float], generators: Sequence[Generators], done: int) -> None:
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
        weights = self._runs.gathered(_scratch)
        self._write(len(replaced), averages[0])
        each = [weight for weight in weights for _ in slower] if len(slower) > 1 else weights
        _foreach_lerp_(averages, each, slower[0] if len(slower) == 1 else slower * len(weights))


def _joined(lanes: Lanes) -> list[Tensor]:
    # Tensor by tensor: a weight is still in the cache when it is read for the next lane.
    return [average for of_one in zip(*lanes, strict=True) for average in of_one]


def _version(tensor: Tensor) -> int:
    return tensor._version  # noqa: SLF001 - torch has no public way to read it


def copy_all(targets: Sequence[Tensor], sources: Sequence[Tensor]) -> None:
    """Copy each source over its target, whatever their devices and dtypes, in one call."""
    _foreach_copy_(list(targets), list(sources))


def loop(average: Tensor, weight: Tensor, rate: float, generators: Generators) -> None:
    """Move one tensor: the reference, for any devices and dtypes."""
    del generators
    alike = average.dtype == weight.dtype and average.device == weight.device
    average.lerp_(weight if alike else _converted(weight, average.device, average.dtype), rate)


def stochastic(average: Tensor, weight: Tensor, rate: float, generators: Generators) -> None:
    """Move a bfloat16 or float16 average in float32, and round up with the probability of the discarded fraction.

    Without it steps below the dtype's resolution are lost: a bfloat16 average at decay 0.9999 never moves.
    """
    exact = average.float().lerp_(_converted(weight, average.device, torch.float32), rate)
    generator = generators(average.device)
    average.copy_(_cut_bits(exact, generator) if average.dtype == torch.bfloat16 else _choose(exact, generator))


def _pieces(average: Tensor, weight: Tensor) -> list[tuple[Tensor, Tensor]]:
    if average.numel() <= _CHUNK or not (average.is_contiguous() and weight.is_contiguous()):
        return [(average, weight)]
    return list(zip(torch.split(average.view(-1), _CHUNK), torch.split(weight.view(-1), _CHUNK), strict=True))


def _converted(weight: Tensor, device: torch.device, dtype: torch.dtype) -> Tensor:
    # In memory that is used again: new pages at every update take longer than the sums.
    if weight.numel() > _CHUNK:
        return weight.to(device, dtype)
    return _scratch(device, dtype, weight.numel()).view(weight.shape).copy_(weight)


def _scratch(device: torch.device, dtype: torch.dtype, size: int) -> Tensor:
    """Return memory for so many elements, a chunk at most, which holds until it is asked for again."""
    scratch = _SCRATCH.kept.get((device, dtype))
    if scratch is None:
        scratch = _SCRATCH.kept[device, dtype] = torch.empty(_CHUNK, dtype=dtype, device=device)
    return scratch[:size]


def _cut_bits(exact: Tensor, generator: torch.Generator) -> Tensor:
    """Return float32 values that bfloat16 can hold: random bits are added to those that it lacks, which are cut off."""
    random = torch.empty(-(-exact.numel() // 4), dtype=torch.int64, device=exact.device)
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
