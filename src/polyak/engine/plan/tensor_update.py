"""One update of the tensors: all of it or nothing, whatever interrupts it."""

from __future__ import annotations

from functools import cached_property, partial
from typing import TYPE_CHECKING, NamedTuple

from polyak.engine.nonfinite import Held, Nonfinite, looks
from polyak.engine.plan.groups import Group, Lane, grouped
from polyak.engine.plan.verdict import Verdict, unguard
from polyak.kernels.select import Checking, Holding
from polyak.tensors.finite import FiniteCheck

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from torch import Tensor

    from polyak.tensors.generators import OwnGenerators

__all__ = ["TensorUpdate"]


class _Part(NamedTuple):
    """The averages of one lane that one kernel moves, in the kernel's lane number ``place``."""

    kernel: Holding
    place: int
    averages: Sequence[Tensor]
    elements: int

    @classmethod
    def of(cls, group: Group, lane: int) -> _Part:
        assert isinstance(group.kernel, Holding)  # noqa: S101 - all that average are
        place = group.lanes.index(lane)
        averages = group.averages[place]
        return cls(group.kernel, place, averages, sum(average.numel() for average in averages))


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
        self._holding = [
            [_Part.of(group, lane) for group in averaged if lane in group.lanes] for lane in range(len(lanes))
        ]
        self._guarded = False

    @cached_property
    def verdict(self) -> Verdict | None:
        """The verdict that all of this obeys; None where the host must know at once, as with several ranks."""
        return Verdict(self.groups) if self.guards and self._lanes[0].agree is None else None

    @cached_property
    def guards(self) -> bool:
        """Whether a verdict on the device can keep all of this from moving."""
        return Verdict.guards(self.groups)

    def prepare(self, nonfinite: Nonfinite, verdict: Verdict | None = None) -> bool:
        """Begin an update; nothing moves yet.

        Args:
            nonfinite: What is done about values that are not finite.
            verdict: Keeps the update from moving anything where weights are not finite. None waits for the answer.

        Returns:
            Whether the update can be made; False if the weights were looked at, and are not finite. True where that
            is left to a verdict.
        """
        epochs = [lane.watch.epoch for lane in self._lanes]
        for group in self.groups:
            group.kernel.prepare(moved=epochs != self._epochs, hold=nonfinite == "hold")
        self._epochs = epochs
        if verdict is not None:
            verdict.guard(self.groups)
        elif self._guarded:
            unguard(self.groups)
        self._guarded = verdict is not None
        if verdict is not None and looks(nonfinite):
            verdict.look()
            return True
        return not looks(nonfinite) or self._finite()

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
        self,
        rates: Sequence[float],
        generators: Sequence[OwnGenerators],
        commit: Callable[[], None],
        nonfinite: Nonfinite,
    ) -> bool:
        """Make a whole update, then commit: all of it, or nothing if it is interrupted before anything has moved.

        Args:
            rates: The coefficient of this update for each lane.
            generators: What each lane draws random numbers from.
            commit: Counts the update; may be called twice.
            nonfinite: What is done about values that are not finite.

        Returns:
            Whether it was done; False if the weights are not finite, and nothing has changed.
        """
        if not self.prepare(nonfinite):
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

    def held(self, lane: int = 0) -> Held:
        """Return what a lane held since ``prepare``."""
        parts = self._holding[lane]
        counts = [part.kernel.held[part.place] for part in parts]
        return Held([counts], sum(part.elements for part in parts), partial(self._held_names, lane))

    def _held_names(self, lane: int) -> dict[str, int]:
        names = {id(stored.average): stored.name for stored in self._lanes[lane].stored}
        each = [(part, part.kernel.held_each()[part.place].tolist()) for part in self._holding[lane]]
        return {names[id(a)]: n for part, counts in each for a, n in zip(part.averages, counts, strict=True) if n}

    def _finite(self) -> bool:
        finite = all(kernel.finite() for kernel in self._checking) and self._others()
        agree = self._lanes[0].agree  # all lanes are of one model
        return finite if agree is None else agree(finite)

    def _move(self, rates: Sequence[float], generators: Sequence[OwnGenerators], done: Sequence[int]) -> None:
        for group, made in zip(self.groups, done, strict=True):
            lanes = group.lanes
            own = [generators[lane].of(group.draws) if group.draws else generators[lane] for lane in lanes]
            group.kernel([rates[lane] for lane in lanes], own, made)
