"""An update of several moves: the average and the slots of a strategy that needs more than one running tensor."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING

from polyak.engine.nonfinite import Held, Nonfinite
from polyak.engine.plan.tensor_update import TensorUpdate

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from polyak.engine.plan.groups import Group, Lane
    from polyak.engine.plan.verdict import Verdict
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
        self._verdict: Verdict | None = None

    def verdict(self, moves: Sequence[Move]) -> Verdict | None:
        """Return the verdict that all of these moves obey; None where the host must know at once."""
        found = self._whole.verdict
        return found if found is None or all(update.guards for update, _ in self._steps(moves)) else None

    def prepare(self, moves: Sequence[Move], nonfinite: Nonfinite, verdict: Verdict | None = None) -> bool:
        """Begin an update; nothing moves yet.

        Args:
            moves: The moves.
            nonfinite: What is done about values that are not finite.
            verdict: Keeps the update from moving anything where weights are not finite. None waits for the answer.

        Returns:
            Whether the update can be made; False if the weights were looked at, and are not finite. True where that
            is left to a verdict.
        """
        self._made, self._prepared, self._verdict = 0, -1, verdict
        # Only the first move may look: the others read what it has let in.
        self._rest: Nonfinite = "hold" if nonfinite == "hold" else "propagate"
        self._todo = self._steps(moves)
        if self._todo[0][0] is self._whole:
            self._prepared = 0
        return self._whole.prepare(nonfinite, verdict)

    def move(self, generators: OwnGenerators) -> None:
        """Make the moves one after the other, or the rest of them after an interruption."""
        while self._made < len(self._todo):
            update, rate = self._todo[self._made]
            if self._prepared < self._made:
                update.prepare(self._rest, self._verdict)
                self._prepared = self._made
            update.move([rate], [generators])
            self._made += 1

    def begun(self) -> bool:
        """Return whether anything has moved since ``prepare``."""
        return self._made > 0 or (self._prepared == 0 and self._todo[0][0].begun())

    def update(
        self, moves: Sequence[Move], generators: OwnGenerators, commit: Callable[[], None], nonfinite: Nonfinite
    ) -> bool:
        """Make a whole update, then commit: all of it, or nothing if it is interrupted before anything has moved.

        Args:
            moves: The moves.
            generators: What they draw random numbers from.
            commit: Counts the update; may be called twice.
            nonfinite: What is done about values that are not finite.

        Returns:
            Whether it was done; False if the weights are not finite, and nothing has changed.
        """
        if not self.prepare(moves, nonfinite):
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

    def held(self) -> Held:
        """Return what the moves held since ``prepare``."""
        made = [update.held() for update, _ in self._todo]
        names = [one.names for one in made]
        return Held([counts for one in made for counts in one.moves], made[-1].elements, partial(_most, names))

    def replace(self, generators: OwnGenerators, nonfinite: Nonfinite) -> None:
        """Copy the weights over the average, and count nothing."""
        self._whole.update([1.0], [generators], lambda: None, "hold" if nonfinite == "hold" else "propagate")

    @property
    def groups(self) -> Sequence[Group]:
        """The groups of tensors that the move of the average towards the weights consists of, then those of others."""
        return [group for update in (self._whole, *self._updates.values()) for group in update.groups]

    def _steps(self, moves: Sequence[Move]) -> Sequence[tuple[TensorUpdate, float]]:
        if len(moves) == 1 and moves[0][:2] == ("average", "weights"):
            return [(self._whole, moves[0].rate)]
        return [(self._update(target, source), rate) for target, source, rate in [(*_COPIED, 1.0), *moves]]

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


def _most(names: Sequence[Callable[[], Mapping[str, int]]]) -> dict[str, int]:
    """Return how many elements of each tensor were held, by the move that held most."""
    most: dict[str, int] = {}
    for name, count in (pair for one in names for pair in one().items()):
        most[name] = max(count, most.get(name, 0))
    return most
