"""The fastest of some kernels that give the same bits: each is tried on the real tensors during the first updates."""

from __future__ import annotations

from time import perf_counter
from typing import TYPE_CHECKING

from typing_extensions import override

from polyak.kernels.base import Checking

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from torch import Tensor

    from polyak.kernels.base import Generators, Holding

__all__ = ["Trial"]

_CALLS = 3  # that are timed of each kernel; the one before them warms it up
_WORTH = 0.95  # of the first one's time: what another must take less than


class Trial(Checking):
    """Calls kernels in turns until each was timed, and the fastest ever after.

    What else runs decides it too: threads that torch leaves spinning after a step, other programs. So it is tried where
    updates are made, and on a CPU, where a call ends when its work does.

    Args:
        first: The kernel that is kept unless another is clearly faster; it also looks for what is not finite.
        others: Makes each other one.

    Attributes:
        name: The kernel that is called.
        tried: Once it was chosen, how many times as long each other one took.
    """

    def __init__(self, first: Checking, others: Sequence[Callable[[], Holding]]) -> None:
        self._first, self._left = first, list(others)
        self._kernels: list[Holding] = [first]
        self._times: list[list[float]] = [[]]
        self._now: Holding = first
        self.name, self.tried = first.name, dict[str, float]()
        self._hold = False
        self._chosen = False

    @override
    def prepare(self, *, moved: bool, hold: bool) -> None:
        if hold != self._hold:  # which costs some kernels more than others
            self._hold, self._chosen, self._times = hold, False, [[] for _ in self._kernels]
        if not self._chosen:
            self._now = self._next()
        for kernel in {id(kernel): kernel for kernel in (self._first, self._now)}.values():
            kernel.prepare(moved=moved or not self._chosen, hold=hold)

    @override
    def __call__(self, rates: Sequence[float], generators: Sequence[Generators], done: int) -> None:
        begin = perf_counter()
        self._now(rates, generators, done)
        if not self._chosen and not done and 1.0 not in rates:  # which copies
            self._times[self._kernels.index(self._now)].append(perf_counter() - begin)

    @override
    def position(self) -> int:
        return self._now.position()

    @override
    def finite(self) -> bool:
        return self._first.finite()

    @property
    @override
    def held(self) -> Tensor:
        return self._now.held

    @override
    def held_each(self) -> Tensor:
        return self._now.held_each()

    def _next(self) -> Holding:
        """Return the kernel whose turn it is; once all were timed, the fastest."""
        if self._left and len(self._times[0]) > _CALLS:
            self._kernels.append(self._left.pop(0)())
            self._times.append([])
        waiting = [kernel for kernel, times in zip(self._kernels, self._times, strict=True) if len(times) <= _CALLS]
        if waiting or self._left:
            return waiting[0]
        self._times = [times[1:] for times in self._times]
        self._chosen = True
        best = min(self._kernels, key=self._rated)
        others = [kernel for kernel in self._kernels if kernel is not best]
        self.tried = {kernel.name: self._best(kernel) / self._best(best) for kernel in others}
        self.name = best.name
        return best

    def _rated(self, kernel: Holding) -> float:
        return self._best(kernel) * (_WORTH if kernel is self._first else 1.0)

    def _best(self, kernel: Holding) -> float:
        return min(self._times[self._kernels.index(kernel)])
