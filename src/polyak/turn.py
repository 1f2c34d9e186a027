"""One update that is due: all that is decided before any tensor moves."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from polyak.tensors.finite import FiniteCheck

if TYPE_CHECKING:
    from collections.abc import Sequence

    from polyak.cadence import Progress, Tick
    from polyak.clock import Clock
    from polyak.state import State
    from polyak.strategy import Move
    from polyak.tensors.entries import Model
    from polyak.tensors.generators import OwnGenerators
    from polyak.tensors.plan import Plan

__all__ = ["Turn"]

_SHOWN = 200  # characters


class Turn(NamedTuple):
    """An update that is due.

    Attributes:
        state: The state it changes.
        root: The model without wrappers.
        plan: What moves.
        now: What the call of ``update`` amounts to.
        clock: The moment, as the strategy sees it.
        rate: The coefficient.
        moves: What it does to the average and the slots.
        after: The progress once it is made.
    """

    state: State
    root: Model
    plan: Plan
    now: Tick
    clock: Clock
    rate: float
    moves: Sequence[Move]
    after: Progress

    @property
    def generators(self) -> OwnGenerators:
        """What it draws random numbers from."""
        self.state.generators.update = self.clock.n
        return self.state.generators

    def commit(self) -> None:
        """Count the update; twice is once."""
        self.state.history.record(self.clock.n, self.rate, self.now.stride)
        self.state.progress = self.after
        self.plan.settle()

    def skip(self) -> None:
        """Count the update as left out."""
        self.state.progress = self.state.progress.seen(self.now)
        self.state.skipped += 1

    def complaint(self) -> str:
        """Return which of the weights that this update read are not finite."""
        plan = self.plan
        pairs = zip(plan.stored, plan.live if plan.offload is None else plan.offload.staged, strict=True)
        names = ", ".join(s.name for s, t in pairs if s.policy == "average" and not FiniteCheck([t])())
        where = names[:_SHOWN] or "weights of another rank"
        return f"the weights hold NaN or infinities at step {self.now.step} (in {where})"
