"""The kernels of plain torch that move or copy all tensors in one call, on any device."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor
from typing_extensions import override

from polyak.kernels.base import Kernel
from polyak.kernels.eager.coalesce import runs_of
from polyak.kernels.eager.scratch import CHUNK, scratch

if TYPE_CHECKING:
    from collections.abc import Sequence

    from polyak.kernels.base import Generators, Lanes

__all__ = ["Copy", "Eager", "Foreach", "copy_all", "lerp_all"]


try:  # torch 2.15 made these public; older versions have only the private names
    from torch.foreach import copy_ as _foreach_copy_, lerp_ as _foreach_lerp_
except ImportError:
    from torch import _foreach_copy_, _foreach_lerp_  # type: ignore[no-redef]  # the same functions under older names


class Eager(Kernel):
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


class Copy(Eager):
    """Copies each weight over its average, whatever their devices and dtypes, in one call."""

    name = "copy"

    def __init__(self, lanes: Lanes, weights: Sequence[Tensor]) -> None:
        super().__init__()
        (self._averages,), self._weights = lanes, weights

    @override
    def __call__(self, rates: Sequence[float], generators: Sequence[Generators], done: int) -> None:
        self._write(0, self._averages[0])
        copy_all(self._averages, self._weights)


class Foreach(Eager):
    """All tensors of one dtype and device, and all lanes, in one call; equals ``loop`` bit for bit."""

    name = "foreach"

    def __init__(self, lanes: Lanes, weights: Sequence[Tensor]) -> None:
        super().__init__()
        self._lanes, self._weights = lanes, list(weights)
        self._runs = runs_of(lanes, weights, CHUNK)
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
        weights = self._runs.gathered(scratch)
        self._write(len(replaced), averages[0])
        each = [weight for weight in weights for _ in slower] if len(slower) > 1 else weights
        lerp_all(averages, each, slower[0] if len(slower) == 1 else slower * len(weights))


def _joined(lanes: Lanes) -> list[Tensor]:
    # Tensor by tensor: a weight is still in the cache when it is read for the next lane.
    return [average for of_one in zip(*lanes, strict=True) for average in of_one]


def _version(tensor: Tensor) -> int:
    return tensor._version  # noqa: SLF001 - torch has no public way to read it


def copy_all(targets: Sequence[Tensor], sources: Sequence[Tensor]) -> None:
    """Copy each source over its target, whatever their devices and dtypes, in one call."""
    _foreach_copy_(list(targets), list(sources))


def lerp_all(averages: list[Tensor], weights: list[Tensor], rate: float | list[float]) -> None:
    """Move each average towards its weight by one rate, or each by its own, in one call."""
    _foreach_lerp_(averages, weights, rate)
