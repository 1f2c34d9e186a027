"""An update of several moves: the average and the slots of a strategy that needs more than one running tensor."""

from __future__ import annotations

from dataclasses import replace
from functools import cached_property, partial
from typing import TYPE_CHECKING

from polyak.tensors.finite import FiniteCheck
from polyak.tensors.mover import Mover

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from polyak.strategy import Move
    from polyak.tensors.generators import OwnGenerators
    from polyak.tensors.groups import Lane

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

    @cached_property
    def _finite(self) -> FiniteCheck:
        lane = self._lane
        return FiniteCheck([live for s, live in zip(lane.stored, lane.live, strict=True) if s.policy == "average"])

    def update(
        self, moves: Sequence[Move], generators: OwnGenerators, commit: Callable[[], None], *, check: bool
    ) -> bool:
        """Make the moves in this order, copy the copied, then commit.

        Args:
            moves: The moves.
            generators: What they draw random numbers from.
            commit: Counts the update; may be called twice.
            check: Whether weights that are not finite are refused.

        Returns:
            Whether it was done; False where the weights are not finite, and nothing has changed.
        """
        if len(moves) == 1 and moves[0][:2] == ("average", "weights"):
            return self.mover.update([moves[0].rate], [generators], commit, check=check)
        if check:
            finite = self._finite()
            if not (finite if self._lane.agree is None else self._lane.agree(finite)):
                return False
        done: set[int] = set()

        def go_on() -> None:
            for i, (target, source, rate) in enumerate([(*_COPIED, 1.0), *moves]):
                if i not in done:
                    # What interrupts a mover finds its move whole or not begun, and noted.
                    mover, note = self._mover(target, source), partial(done.add, i)
                    mover.update([rate], [generators], note, check=False)
            commit()

        try:
            go_on()
        except BaseException:
            if done:
                go_on()
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
