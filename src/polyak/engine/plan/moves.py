"""An update of several moves: the average and the slots of a strategy that needs more than one running tensor."""

from __future__ import annotations

from dataclasses import replace
from functools import cached_property
from typing import TYPE_CHECKING

from polyak.engine.plan.tensor_update import Mover
from polyak.tensors.finite import FiniteCheck

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from polyak.engine.plan.groups import Lane
    from polyak.strategy.base import Move
    from polyak.tensors.generators import OwnGenerators

__all__ = ["Moves"]

_COPIED = ("average", "copied")


class Moves:
    """Makes the moves of one averager's update, one after the other: all of them or none.

    Attributes:
        mover: Makes the one move that most strategies are: the average towards the weights.
    """

    def __init__(self, lane: Lane) -> None:
        self.mover = Mover([lane])
        self._lane = lane
        self._movers: dict[tuple[str, str], Mover] = {}
        self._todo: Sequence[tuple[Mover, float]] = ()
        self._made, self._prepared = 0, -1

    @cached_property
    def _finite(self) -> FiniteCheck:
        lane = self._lane
        return FiniteCheck([live for s, live in zip(lane.stored, lane.live, strict=True) if s.policy == "average"])

    def prepare(self, moves: Sequence[Move], *, check: bool) -> bool:
        """Begin an update; nothing moves yet.

        Args:
            moves: The moves.
            check: Whether weights that are not finite are refused.

        Returns:
            Whether the update can be made; False if the weights are not finite.
        """
        self._made, self._prepared = 0, -1
        if len(moves) == 1 and moves[0][:2] == ("average", "weights"):
            self._todo = [(self.mover, moves[0].rate)]
            self._prepared = 0
            return self.mover.prepare(check=check)
        self._todo = [(self._mover(target, source), rate) for target, source, rate in [(*_COPIED, 1.0), *moves]]
        if not check:
            return True
        finite = self._finite()
        return finite if self._lane.agree is None else self._lane.agree(finite)

    def move(self, generators: OwnGenerators) -> None:
        """Make the moves one after the other, or the rest of them after an interruption."""
        while self._made < len(self._todo):
            mover, rate = self._todo[self._made]
            if self._prepared < self._made:
                mover.prepare(check=False)
                self._prepared = self._made
            mover.move([rate], [generators])
            self._made += 1

    def begun(self) -> bool:
        """Return whether anything has moved since ``prepare``."""
        return self._made > 0 or (self._prepared == 0 and self._todo[0][0].begun())

    def update(
        self, moves: Sequence[Move], generators: OwnGenerators, commit: Callable[[], None], *, check: bool
    ) -> bool:
        """Make a whole update, then commit: all of it, or nothing if it is interrupted before anything has moved.

        Args:
            moves: The moves.
            generators: What they draw random numbers from.
            commit: Counts the update; may be called twice.
            check: Whether weights that are not finite are refused.

        Returns:
            Whether it was done; False if the weights are not finite, and nothing has changed.
        """
        if not self.prepare(moves, check=check):
            return False
        try:
            self.move(generators)
            commit()
        except BaseException:
            if self.begun():
                self.move(generators)
                commit()
            raise
        return True

    def _mover(self, target: str, source: str) -> Mover:
        if (target, source) not in self._movers:
            pairs = [*zip(self._lane.stored, self._lane.live, strict=True)]
            if (target, source) == _COPIED:
                chosen = [(stored, live) for stored, live in pairs if stored.policy == "copy"]
            else:
                chosen = [
                    (replace(stored, average=stored.slot(target)), live if source == "weights" else stored.slot(source))
                    for stored, live in pairs
                    if stored.policy == "average"
                ]
            stored, live = [one for one, _ in chosen], [tensor for _, tensor in chosen]
            self._movers[target, source] = Mover([self._lane._replace(stored=stored, live=live)])
        return self._movers[target, source]
