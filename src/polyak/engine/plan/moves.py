"""An update of several moves: the average and the slots of a strategy that needs more than one running tensor."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from polyak.engine.plan.tensor_update import TensorUpdate

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from polyak.engine.plan.groups import Group, Lane
    from polyak.strategy.base import Move
    from polyak.tensors.generators import OwnGenerators

__all__ = ["Moves"]

_COPIED = ("average", "copied")


class Moves:
    """Makes the moves of one averager's update, one after the other: all of them or none.

    Whether weights are finite is decided by the move of the average towards the weights, which most strategies are.
    """

    def __init__(self, lane: Lane) -> None:
        self._whole = TensorUpdate([lane])
        self._lane = lane
        self._updates: dict[tuple[str, str], TensorUpdate] = {}
        self._todo: Sequence[tuple[TensorUpdate, float]] = ()
        self._made, self._prepared = 0, -1

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
            self._todo, self._prepared = [(self._whole, moves[0].rate)], 0
        else:
            self._todo = [(self._update(target, source), rate) for target, source, rate in [(*_COPIED, 1.0), *moves]]
        return self._whole.prepare(check=check)

    def move(self, generators: OwnGenerators) -> None:
        """Make the moves one after the other, or the rest of them after an interruption."""
        while self._made < len(self._todo):
            update, rate = self._todo[self._made]
            if self._prepared < self._made:
                update.prepare(check=False)
                self._prepared = self._made
            update.move([rate], [generators])
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

    def replace(self, generators: OwnGenerators) -> None:
        """Copy the weights over the average, and count nothing."""
        self._whole.update([1.0], [generators], lambda: None, check=False)

    @property
    def groups(self) -> Sequence[Group]:
        """The groups of tensors that the move of the average towards the weights consists of."""
        return self._whole.groups

    def _update(self, target: str, source: str) -> TensorUpdate:
        if (target, source) not in self._updates:
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
            self._updates[target, source] = TensorUpdate([self._lane._replace(stored=stored, live=live)])
        return self._updates[target, source]
