"""One update that is due: all that is decided before any tensor moves."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from polyak.errors import NonFiniteError
from polyak.tensors.finite import FiniteCheck

if TYPE_CHECKING:
    from collections.abc import Sequence

    from polyak.engine.cadence import Progress, Tick
    from polyak.engine.nonfinite import Held
    from polyak.engine.plan.plan import Plan
    from polyak.engine.state import State
    from polyak.engine.updates import Updater
    from polyak.strategy.base import Move
    from polyak.strategy.clock import Clock
    from polyak.tensors.entries import Model
    from polyak.tensors.generators import OwnGenerators

__all__ = ["PendingUpdate", "Seen"]

_SHOWN = 200  # characters


class Seen(NamedTuple):
    """A call of ``update`` that averages nothing.

    Attributes:
        updater: The part of the averager that was called.
        state: The state that counts it.
        after: The progress once it is counted.
    """

    updater: Updater
    state: State
    after: Progress

    def commit(self) -> None:
        """Count the call; idempotent."""
        self.state.progress = self.after
        if not self.after.n:
            self.updater.view.keep_in_step()


class PendingUpdate(NamedTuple):
    """An update that is due.

    Attributes:
        updater: The part of the averager that makes it.
        state: The state it changes.
        root: The model without wrappers.
        plan: What moves.
        now: What the call of ``update`` amounts to.
        clock: The moment, as the strategy sees it.
        rate: The coefficient.
        moves: What it does to the average and the slots.
        after: The progress once it is made.
        before: The progress before it.
        skipped: How many updates were skipped before it.
    """

    updater: Updater
    state: State
    root: Model
    plan: Plan
    now: Tick
    clock: Clock
    rate: float
    moves: Sequence[Move]
    after: Progress
    before: Progress
    skipped: int

    @property
    def generators(self) -> OwnGenerators:
        """What it draws random numbers from."""
        self.state.generators.update = self.clock.n
        return self.state.generators

    def commit(self, held: Held | None = None) -> None:
        """Count the update; idempotent.

        Args:
            held: What it held; None where it holds nothing.
        """
        lr = self.clock.lr if self.updater.uses_lr else None
        self.state.history.record(self.clock.n, self.rate, self.now.stride, lr=lr, counted=self.now.counted)
        self.state.progress = self.after
        self.plan.settle()
        if held is not None:
            self.updater.core.holds.note(self.state, self.clock.n, self.now.step, held)

    def skip(self) -> None:
        """Count the update as skipped; idempotent."""
        self.state.progress = self.before.seen(self.now)
        self.state.skipped = self.skipped + 1

    def refuse(self) -> None:
        """Raise for weights that are not finite, unless such updates are skipped.

        Raises:
            NonFiniteError: If ``nonfinite="raise"``.
        """
        if self.updater.core.options.nonfinite == "raise":
            message = f"{self.complaint()}; the average is unchanged. nonfinite='skip' goes on without such updates."
            raise NonFiniteError(message)

    def warn(self) -> None:
        """Warn of a skipped update, once."""
        if "nonfinite" not in self.updater.core.warned:  # the names are looked for once only
            what = f"{self.complaint()}; such updates are left out and counted in averager.skipped"
            self.updater.core.warn("nonfinite", what)

    def complaint(self) -> str:
        """Return which of the weights that this update read are not finite."""
        plan = self.plan
        pairs = zip(plan.stored, plan.live if plan.offload is None else plan.offload.staged, strict=True)
        names = ", ".join(s.name for s, t in pairs if s.policy == "average" and not FiniteCheck([t])())
        others = "weights of another rank" if plan.lane.agree else "weights that are finite again"
        where = names[:_SHOWN] or others
        return f"the weights hold NaN or infinities at step {self.now.step} (in {where})"
