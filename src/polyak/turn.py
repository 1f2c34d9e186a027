"""One update that is due: all that is decided before any tensor moves."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from polyak.cadence import Progress, Tick
    from polyak.clock import Clock
    from polyak.state import State
    from polyak.tensors.entries import Model
    from polyak.tensors.plan import Plan

__all__ = ["Turn"]


class Turn(NamedTuple):
    """An update that is due.

    Attributes:
        state: The state it changes.
        root: The model without wrappers.
        plan: What moves.
        now: What the call of ``update`` amounts to.
        clock: The moment, as the strategy sees it.
        rate: The coefficient.
        after: The progress once it is made.
    """

    state: State
    root: Model
    plan: Plan
    now: Tick
    clock: Clock
    rate: float
    after: Progress

    def commit(self) -> None:
        """Count the update; twice is once."""
        self.state.history.record(self.clock.n, self.rate, self.now.stride)
        self.state.progress = self.after

    def skip(self) -> None:
        """Count the update as left out."""
        self.state.progress = self.state.progress.seen(self.now)
        self.state.skipped += 1
