"""One update of the tensors: all of it or nothing, whatever interrupts it."""

from __future__ import annotations

from typing import TYPE_CHECKING

from polyak.engine.plan.groups import Lane, grouped
from polyak.kernels.select import Checking
from polyak.tensors.finite import FiniteCheck

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from polyak.tensors.generators import OwnGenerators

__all__ = ["TensorUpdate"]


class TensorUpdate:
    """Moves the averages of one averager, or of several of the same weights, in one pass over them.

    Attributes:
        groups: What one update calls.
    """

    def __init__(self, lanes: Sequence[Lane]) -> None:
        self._lanes, self._epochs = lanes, [lane.watch.epoch for lane in lanes]
        self.groups = grouped(lanes)
        averaged = [group for group in self.groups if group.policy == "average"]
        self._checking = [group.kernel for group in averaged if isinstance(group.kernel, Checking)]
        others = [group for group in averaged if not isinstance(group.kernel, Checking)]
        self._others = FiniteCheck([weight for group in others for weight in group.weights])

    def prepare(self, *, check: bool) -> bool:
        """Begin an update; nothing moves yet.

        Args:
            check: Whether weights that are not finite are refused.

        Returns:
            Whether the update can be made; False if the weights are not finite.
        """
        epochs = [lane.watch.epoch for lane in self._lanes]
        for group in self.groups:
            group.kernel.prepare(moved=epochs != self._epochs)
        self._epochs = epochs
        return not check or self._finite()

    def move(self, rates: Sequence[float], generators: Sequence[OwnGenerators]) -> None:
        """Move every average by the rate of its lane and copy the copied, or the rest of it after an interruption.

        Ctrl-C between two calls finds some tensors moved and others not. How far it came each kernel knows.

        Args:
            rates: The coefficient of this update for each lane.
            generators: What each lane draws random numbers from.
        """
        self._move(rates, generators, [group.kernel.position() for group in self.groups])

    def begun(self) -> bool:
        """Return whether anything has moved since ``prepare``."""
        return any(group.kernel.position() for group in self.groups)

    def update(
        self, rates: Sequence[float], generators: Sequence[OwnGenerators], commit: Callable[[], None], *, check: bool
    ) -> bool:
        """Make a whole update, then commit: all of it, or nothing if it is interrupted before anything has moved.

        Args:
            rates: The coefficient of this update for each lane.
            generators: What each lane draws random numbers from.
            commit: Counts the update; may be called twice.
            check: Whether weights that are not finite are refused.

        Returns:
            Whether it was done; False if the weights are not finite, and nothing has changed.
        """
        if not self.prepare(check=check):
            return False
        try:
            self.move(rates, generators)
            commit()
        except BaseException:
            if self.begun():
                self.move(rates, generators)
                commit()
            raise
        return True

    def _finite(self) -> bool:
        finite = all(kernel.finite() for kernel in self._checking) and self._others()
        agree = self._lanes[0].agree  # all lanes are of one model
        return finite if agree is None else agree(finite)

    def _move(self, rates: Sequence[float], generators: Sequence[OwnGenerators], done: Sequence[int]) -> None:
        for group, made in zip(self.groups, done, strict=True):
            lanes = group.lanes
            own = [generators[lane].of(group.draws) if group.draws else generators[lane] for lane in lanes]
            group.kernel([rates[lane] for lane in lanes], own, made)
