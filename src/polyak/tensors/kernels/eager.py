"""The kernels of plain torch, for any device: the reference loop, and those that equal it bit for bit.

``average += rate * (weights - average)``, in place. A function takes one lane, pair by pair of equal shapes;
``done`` counts the in-place operations per tensor that an interrupted call made already, which are left out.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor
from typing_extensions import override

from polyak.tensors.kernels.kernel import Kernel

if TYPE_CHECKING:
    from collections.abc import Sequence

    from polyak.tensors.kernels.kernel import Generators, Lanes

__all__ = ["Foreach", "PerTensor", "copy", "copy_all", "loop", "mixed", "stochastic"]

_CHUNK = 1 << 20

try:  # torch 2.15 made these public; older versions have only the private names
    from torch.foreach import copy_ as _foreach_copy_
    from torch.foreach import lerp_ as _foreach_lerp_
except ImportError:
    from torch import _foreach_copy_, _foreach_lerp_  # type: ignore[no-redef]  # the same functions under older names


class Move(Protocol):
    """Moves the tensors of one lane."""

    def __call__(
        self, averages: Sequence[Tensor], weights: Sequence[Tensor], rate: float, generators: Generators, done: int
    ) -> None:
        """Move ``averages`` towards ``weights`` by ``rate``."""


class _Unchecked(Kernel):
    checks = False

    @override
    def prepare(self, *, moved: bool) -> None:
        """Nothing: torch finds the tensors itself."""

    @override
    def finite(self) -> bool:
        raise NotImplementedError  # nobody asks a kernel that does not check


class PerTensor(_Unchecked):
    """One lane of tensors, moved one after the other by a function."""

    def __init__(self, name: str, move: Move, averages: Sequence[Tensor], weights: Sequence[Tensor]) -> None:
        self.name = name
        self._move, self._averages, self._weights = move, averages, weights

    @override
    def __call__(self, rates: Sequence[float], generators: Sequence[Generators], done: int) -> None:
        self._move(self._averages, self._weights, rates[0], generators[0], done)

    @override
    def position(self) -> int:
        # A call moves all of them or is told where it stopped by the last one.
        return _version(self._averages[-1])


class Foreach(_Unchecked):
    """All tensors of one dtype and device, and all lanes, in one call; equals ``loop`` bit for bit."""

    name = "foreach"

    def __init__(self, lanes: Lanes, weights: Sequence[Tensor]) -> None:
        self._lanes, self._one_lane = lanes, list(weights)
        # Tensor by tensor: a weight is still in the cache when it is read for the next lane.
        self._averages = [average for of_one in zip(*lanes, strict=True) for average in of_one]
        self._weights = [weight for weight in weights for _ in lanes]

    @override
    def __call__(self, rates: Sequence[float], generators: Sequence[Generators], done: int) -> None:
        del generators
        if 1.0 in rates:
            self._replace(rates, done)
        elif not done:
            self._lerp(self._averages, self._weights, rates)

    def _replace(self, rates: Sequence[float], done: int) -> None:
        # lerp with weight 1 is no copy: a NaN in the average would stay.
        replaced = [lane for lane, rate in zip(self._lanes, rates, strict=True) if rate == 1.0]
        for lane in replaced:
            copy_all(lane, self._one_lane)
        if done <= len(replaced) < len(self._lanes):
            moved = [(lane, rate) for lane, rate in zip(self._lanes, rates, strict=True) if rate != 1.0]
            averages = [average for lane, _ in moved for average in lane]
            self._lerp(averages, self._one_lane * len(moved), [rate for _, rate in moved], by_tensor=False)

    def _lerp(
        self, averages: list[Tensor], weights: list[Tensor], rates: Sequence[float], *, by_tensor: bool = True
    ) -> None:
        if len({*rates}) == 1:
            _foreach_lerp_(averages, weights, rates[0])
        else:
            count = len(self._one_lane)
            each = [*rates] * count if by_tensor else [rate for rate in rates for _ in range(count)]
            _foreach_lerp_(averages, weights, each)

    @override
    def position(self) -> int:
        return sum(_version(lane[0]) for lane in self._lanes)


def _version(tensor: Tensor) -> int:
    return tensor._version  # noqa: SLF001 - torch has no public way to read it


def copy_all(targets: Sequence[Tensor], sources: Sequence[Tensor]) -> None:
    """Copy each source over its target, whatever their devices and dtypes, in one call."""
    _foreach_copy_(list(targets), list(sources))


def copy(averages: Sequence[Tensor], weights: Sequence[Tensor], rate: float, generators: Generators, done: int) -> None:
    """Copy each weight over its average, whatever their devices and dtypes, in one call."""
    del rate, generators
    if not done:
        copy_all(averages, weights)


def loop(averages: Sequence[Tensor], weights: Sequence[Tensor], rate: float, generators: Generators, done: int) -> None:
    """Move one tensor after the other: the reference, for any devices and dtypes."""
    del generators
    for average, weight in zip(averages, weights, strict=True):
        # lerp with weight 1 is no copy: a NaN in the average would stay.
        if not done:
            average.copy_(weight) if rate == 1.0 else average.lerp_(weight.to(average), rate)


def mixed(
    averages: Sequence[Tensor], weights: Sequence[Tensor], rate: float, generators: Generators, done: int
) -> None:
    """Move averages from weights of another dtype or device, a bounded piece at a time; equals ``loop`` bit for bit."""
    if rate == 1.0:
        copy(averages, weights, rate, generators, done)
        return
    for average, weight in zip(averages, weights, strict=True):
        for piece, source in _pieces(average, weight)[done:]:
            piece.lerp_(source.to(piece), rate)


def stochastic(
    averages: Sequence[Tensor], weights: Sequence[Tensor], rate: float, generators: Generators, done: int
) -> None:
    """Move bfloat16 or float16 averages in float32, and round up with the probability of the discarded fraction.

    Without it steps below the dtype's resolution are lost: a bfloat16 average at decay 0.9999 never moves.
    """
    if rate == 1.0:
        copy(averages, weights, rate, generators, done)
        return
    for average, weight in zip(averages, weights, strict=True):
        for piece, source in _pieces(average, weight)[done:]:
            exact = piece.float().lerp_(source.to(piece.device, torch.float32), rate)
            piece.copy_(_round_stochastically(exact, piece.dtype, generators(piece.device)))


def _pieces(average: Tensor, weight: Tensor) -> list[tuple[Tensor, Tensor]]:
    if average.numel() <= _CHUNK or not (average.is_contiguous() and weight.is_contiguous()):
        return [(average, weight)]
    return list(zip(torch.split(average.view(-1), _CHUNK), torch.split(weight.view(-1), _CHUNK), strict=True))


def _round_stochastically(exact: Tensor, dtype: torch.dtype, generator: torch.Generator) -> Tensor:
    noise = torch.rand(exact.shape, dtype=torch.float32, device=exact.device, generator=generator)
    nearest = exact.to(dtype)
    # The two neighbours of the exact value in the short dtype, and where it lies between them.
    error = exact - nearest.float()
    toward = torch.where(error > 0, math.inf, -math.inf).to(dtype)
    other = torch.nextafter(nearest, toward)
    fraction = error.abs() / (other.float() - nearest.float()).abs()
    return torch.where(noise < fraction, other, nearest)
