"""One pass over the weights, which moves one average or several."""

from __future__ import annotations

from typing import TYPE_CHECKING

from typing_extensions import override

if TYPE_CHECKING:
    from collections.abc import Sequence

    from polyak.engine.nonfinite import Held
    from polyak.engine.pending import PendingUpdate
    from polyak.engine.plan.tensor_update import TensorUpdate
    from polyak.engine.plan.verdict import Verdict

__all__ = ["Joint", "Pass"]


class Pass:
    """One pass over the weights: an update of one averager, with all its moves.

    Attributes:
        updates: The updates that it makes.
        finite: Whether the weights are finite, or need not be.
        verdict: What their device finds of them and obeys; None where the host knows at once, or need not know.
        moved: Whether all its tensors have moved.
        counted: Whether it was counted.
    """

    def __init__(self, update: PendingUpdate) -> None:
        self.updates: Sequence[PendingUpdate] = (update,)
        self.finite, self.moved, self.counted = True, False, False
        self.verdict = self._verdict() if update.updater.core.checks else None

    def prepare(self) -> None:
        """Look at the weights; nothing moves yet."""
        (update,) = self.updates
        self.finite = update.plan.moves.prepare(update.moves, update.updater.core.options.nonfinite, self.verdict)

    def begun(self) -> bool:
        """Return whether anything has moved."""
        return self.finite and self.updates[0].plan.moves.begun()

    def move(self) -> None:
        """Move what has not moved yet."""
        if self.finite and not self.moved:
            self._move()
            self.moved = True

    def commit(self) -> None:
        """Count the updates; idempotent."""
        for number, update in enumerate(self.updates):
            if self.finite:
                update.commit(self._held(number) if update.updater.core.holding else None)
            else:
                update.skip()
        self.counted = True

    def announce(self, update: PendingUpdate) -> None:
        """Call the listeners of an update that was made."""
        if self.counted and self.finite:
            update.updater.announce(update)

    def _move(self) -> None:
        (update,) = self.updates
        update.plan.moves.move(update.generators)

    def _held(self, number: int) -> Held:
        return self.updates[number].plan.moves.held()

    def _verdict(self) -> Verdict | None:
        (update,) = self.updates
        return update.plan.moves.verdict(update.moves)


class Joint(Pass):
    """One pass over the weights for several averagers."""

    def __init__(self, updates: Sequence[PendingUpdate], joint: TensorUpdate) -> None:
        self._joint = joint
        super().__init__(updates[0])
        self.updates = updates

    @override
    def prepare(self) -> None:
        self.finite = self._joint.prepare(self.updates[0].updater.core.options.nonfinite, self.verdict)

    @override
    def begun(self) -> bool:
        return self.finite and self._joint.begun()

    @override
    def _move(self) -> None:
        self._joint.move([update.rate for update in self.updates], [update.generators for update in self.updates])

    @override
    def _held(self, number: int) -> Held:
        return self._joint.held(number)

    @override
    def _verdict(self) -> Verdict | None:
        return self._joint.verdict
