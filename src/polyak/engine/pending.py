"""One update that is due: all that is decided before any tensor moves."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch

from polyak.engine.sources import writes
from polyak.errors import NonFiniteError
from polyak.tensors.finite import FiniteCheck

if TYPE_CHECKING:
    from collections.abc import Sequence

    from polyak.engine.cadence import Progress, Tick
    from polyak.engine.plan.plan import Plan
    from polyak.engine.state import State
    from polyak.engine.updates import Updating
    from polyak.strategy.base import Move
    from polyak.strategy.clock import Clock
    from polyak.tensors.entries import Model
    from polyak.tensors.generators import OwnGenerators

__all__ = ["LOOK", "Seen", "Turn", "doubt_weights", "replaces_start"]

_SHOWN = 200  # characters

LOOK = 128
"""The update before which ``doubt_weights`` looks."""


class Seen(NamedTuple):
    """A call of ``update`` that averages nothing.

    Attributes:
        averager: The averager that was called.
        state: The state that counts it.
        after: The progress once it is counted.
    """

    averager: Updating
    state: State
    after: Progress

    def commit(self) -> None:
        """Count the call; idempotent."""
        self.state.progress = self.after
        if not self.after.n:
            self.averager.keep_in_step()


class Turn(NamedTuple):
    """An update that is due.

    Attributes:
        averager: The averager that it updates.
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

    averager: Updating
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

    def commit(self) -> None:
        """Count the update; idempotent."""
        lr = self.clock.lr if self.averager.uses_lr else None
        self.state.history.record(self.clock.n, self.rate, self.now.stride, lr=lr, counted=self.now.counted)
        self.state.progress = self.after
        self.plan.settle()

    def skip(self) -> None:
        """Count the update as skipped; idempotent."""
        self.state.progress = self.before.seen(self.now)
        self.state.skipped = self.skipped + 1

    def refuse(self) -> None:
        """Raise for weights that are not finite, unless such updates are skipped.

        Raises:
            NonFiniteError: If ``nonfinite="raise"``.
        """
        if self.averager.options.nonfinite == "raise":
            message = f"{self.complaint()}; the average is unchanged. nonfinite='skip' goes on without such updates."
            raise NonFiniteError(message)

    def warn(self) -> None:
        """Warn of a skipped update, once."""
        if "nonfinite" not in self.averager.warned:  # the names are looked for once only
            what = f"{self.complaint()}; such updates are left out and counted in averager.skipped"
            self.averager.warn("nonfinite", what, level=5)

    def complaint(self) -> str:
        """Return which of the weights that this update read are not finite."""
        plan = self.plan
        pairs = zip(plan.stored, plan.live if plan.offload is None else plan.offload.staged, strict=True)
        names = ", ".join(s.name for s, t in pairs if s.policy == "average" and not FiniteCheck([t])())
        where = names[:_SHOWN] or "weights of another rank"
        return f"the weights hold NaN or infinities at step {self.now.step} (in {where})"


def replaces_start(averager: Updating, plan: Plan) -> bool:
    """Return whether the first update replaces the start of the average, which is not finite; warn once then.

    Raises:
        NonFiniteError: If the start is not finite under ``nonfinite="raise"``.
    """
    starts = [s for s in plan.stored if s.policy == "average"]
    finite = FiniteCheck([t for s in starts for t in s.tensors])()
    if finite if plan.lane.agree is None else plan.lane.agree(finite):
        return False
    names = ", ".join(s.name for s in starts if not FiniteCheck(s.tensors)())[:_SHOWN] or "weights of another rank"
    what = f"the weights that the averager was built from hold NaN or infinities (in {names})"
    if averager.options.nonfinite == "raise":
        message = f"{what}; the average is unchanged. Build it from finite weights, or with origin='first'."
        raise NonFiniteError(message)
    averager.warn("origin", f"{what}; the first update replaces them, as with origin='first'", level=6)
    return True


def doubt_weights(averager: Updating, plan: Plan) -> None:
    """Warn once if no weight has ever changed although some want gradients: their average equals them, bit for bit.

    Version counters are looked at first, those of buffers too, which a forward in train mode writes. Optimisers that
    write through ``.data`` leave them as they are.
    """
    if averager.built is None or averager.options.capturable or plan.offload is not None:
        return
    if not any(t.requires_grad for t in plan.live) or writes(plan.live) != averager.built:
        return
    pairs = [(s.average, t) for s, t in zip(plan.stored, plan.live, strict=True) if s.policy == "average"]
    if all(torch.equal(average, live.detach().to(average.dtype)) for average, live in pairs):
        message = (
            f"the weights have not changed in {LOOK - 1} updates; was the model built again after the averager? "
            "Build the averager from the model that the optimiser trains."
        )
        averager.warn("constant", message, level=5)
