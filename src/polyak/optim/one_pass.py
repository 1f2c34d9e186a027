"""One step and the update behind it as one: all of both or nothing, whatever interrupts it."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch

from polyak.engine.nonfinite import Held
from polyak.engine.pending import PendingUpdate, Seen
from polyak.engine.plan.tensor_update import TensorUpdate
from polyak.optim.fused import pairs
from polyak.tensors.modes import Untracked

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from torch import Tensor

    from polyak.engine import Engine
    from polyak.engine.plan.plan import Plan
    from polyak.optim.fused import AdamWCPU, Hyper

__all__ = ["OnePass"]


class _Pairing(NamedTuple):
    """Which averages move with the parameters of a step, and what moves the rest of the plan."""

    plan: Plan
    params: list[int]
    names: list[str]
    averages: list[Tensor | None]
    rest: TensorUpdate | None

    def held(self, kernel: AdamWCPU) -> Held:
        """Return what an update held, by the step and by what moves the rest."""
        each = kernel.held()
        rest = None if self.rest is None else self.rest.held()
        elements = sum(average.numel() for average in self.averages if average is not None)

        def names() -> dict[str, int]:
            own = {name: int(n) for name, n in zip(self.names, each, strict=True) if n}
            return {**own, **({} if rest is None else rest.names())}

        counts = [torch.tensor(int(each.sum()), device="cpu")]
        if rest is None:
            return Held([counts], elements, names)
        return Held([[*counts, *rest.moves[0]]], elements + rest.elements, names)


class OnePass:
    """Makes the steps of an optimiser, and the updates of an averager with them."""

    def __init__(self, averager: Engine) -> None:
        self._averager = averager
        self._pairing: _Pairing | None = None

    def make(self, kernel: AdamWCPU, grads: Sequence[Tensor], hypers: Sequence[Hyper], lr: float) -> str:
        """Make a step and the update that is due behind it; return what keeps it from that: then nothing is made.

        Args:
            kernel: What makes the step.
            grads: The gradients.
            hypers: What their groups ask for, in the same order.
            lr: The learning rate, for the averager.

        Raises:
            PolyakError: If ``Averager.update`` would raise. Nothing has changed then.
        """
        if found := kernel.unfit(grads):
            return found
        with self._averager.lock:
            return self._made(kernel, grads, hypers, lr)

    def _made(self, kernel: AdamWCPU, grads: Sequence[Tensor], hypers: Sequence[Hyper], lr: float) -> str:
        averages: list[Tensor | None] = [None] * len(grads)
        kernel.reset()
        update = self._averager.updater.prepare(None, None, lr)
        if isinstance(update, Seen):
            rate, rest = 0.0, update.commit
        else:
            if found := _ineligible(update):
                return found
            pairing = self._paired(update.plan, kernel.params)
            rate, averages, rest = update.rate, pairing.averages, _rest(update, pairing, kernel)
        try:
            kernel.prepare(averages, hypers, rate, hold=self._averager.core.holding)
            kernel()
            rest()
        except BaseException:
            if kernel.begun():
                kernel()
                rest()
            raise
        if isinstance(update, PendingUpdate):
            self._averager.updater.announce(update)
            self._averager.core.holds.warn(self._averager.core.warn)
        return ""

    def _paired(self, plan: Plan, params: Sequence[Tensor]) -> _Pairing:
        numbers = [*map(id, params)]
        if self._pairing is None or self._pairing.plan is not plan or self._pairing.params != numbers:
            self._pairing = _pair(plan, numbers)
        return self._pairing


def _ineligible(update: PendingUpdate) -> str:
    if update.plan.offload is not None:
        return "the average lives on another device than the model"
    if tuple(update.moves) != (("average", "weights", update.rate),):
        return "the strategy moves more than the average"
    return ""


def _pair(plan: Plan, numbers: list[int]) -> _Pairing:
    stepped, own, lane = {*numbers}, {}, plan.lane
    rest = []
    for stored, live in zip(plan.stored, plan.live, strict=True):
        if stored.policy == "average" and id(live) in stepped and pairs(stored.average, live):
            own[id(live)] = stored
        else:
            rest.append((stored, live))
    left = lane._replace(stored=[stored for stored, _ in rest], live=[live for _, live in rest])
    names = [own[number].name if number in own else "" for number in numbers]
    averages = [own[number].average if number in own else None for number in numbers]
    return _Pairing(plan, numbers, names, averages, TensorUpdate([left]) if rest else None)


def _rest(update: PendingUpdate, pairing: _Pairing, kernel: AdamWCPU) -> Callable[[], None]:
    """Return a function that makes the rest of an update and counts it; idempotent."""
    moved: list[bool] = []
    core, others = update.updater.core, pairing.rest

    def commit() -> None:
        moved.append(True)
        update.commit(pairing.held(kernel) if core.holding else None)

    def move() -> None:
        if others is not None and not moved:
            with Untracked():
                others.update([update.rate], [update.generators], commit, core.options.nonfinite)
        commit()

    return move
