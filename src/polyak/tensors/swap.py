"""Put the average into a model and take it out again: exact, whatever interrupts it."""
# ruff: noqa: SLF001 - the swaps of one model's memory look into each other

from __future__ import annotations

from enum import Enum, auto
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from polyak.tensors.entries import identity

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

__all__ = ["Swap", "in_force", "overwrite", "swapped", "writable"]

_ATTEMPTS = 3


class _Stage(Enum):
    SAVED = auto()  # `own` holds the model's bits; the model's may be overwritten already
    GIVEN = auto()  # the model holds the average; the stored tensor may be overwritten already
    EXCHANGED = auto()  # the stored tensor holds the model's bits
    RETURNING = auto()  # `own` holds the average; the model's may be overwritten already
    RETURNED = auto()  # the model has its bits; the stored tensor may be overwritten already


class _Step(NamedTuple):
    average: Tensor
    live: Tensor
    own: Tensor | None
    stage: _Stage


class Swap:
    """One exchange of the average's and the model's values.

    Values are copied, never pointers: parameters, optimisers, compiled graphs and captured CUDA graphs keep the
    memory they know. Where storage and model have the same dtype the two are exchanged through one tensor's worth
    of scratch memory; where they differ the rounded average cannot carry the exact one back, so the
    model's own values are kept beside (one copy of those tensors).

    Every step is journalled before it is made, so that an exception between any two calls can be undone.
    Several swaps of one model's memory may be in force, and may be undone in any order.
    """

    def __init__(self, averages: Sequence[Tensor], live: Sequence[Tensor]) -> None:
        self._pairs = [*zip(averages, live, strict=True)]
        self._memory = {*map(identity, live)}
        self._journal: list[_Step] = []

    def put(self) -> None:
        """Write the average into the model; on any exception the model and the average are as before."""
        in_force.append(self)
        try:
            self._exchange()
            torch.clear_autocast_cache()  # an enclosing autocast keeps casts of the values before
        except BaseException:
            self.take()
            raise

    def take(self) -> None:
        """Give the model its own values back, bit for bit, however far ``put`` came; then raise what interrupted.

        Swaps that were put on top of this one stay in force. Twice is once.
        """
        interruption: BaseException | None = None
        for _ in range(_ATTEMPTS):
            try:
                self._undo()
                break
            except BaseException as error:  # noqa: BLE001 - a half restored model is worse than a late Ctrl-C
                interruption = error
        torch.clear_autocast_cache()
        if interruption is not None:
            raise interruption

    def places(self) -> dict[int, Tensor]:
        """Return the tensor that holds the values of each exchanged average now, by the average's id."""
        later = in_force[in_force.index(self) + 1 :] if self in in_force else []
        kept = [
            {identity(step.live): step.average if step.own is None else step.own for step in s._journal} for s in later
        ]
        places = {}
        for step in self._journal:
            if step.stage is _Stage.EXCHANGED:
                place = step.live
                for by_memory in kept:
                    place = by_memory.get(identity(place), place)
                places[id(step.average)] = place
        return places

    def _exchange(self) -> None:
        with writable([live for _, live in self._pairs]):
            for average, live in self._pairs:
                self._put_one(average, live)

    def _undo(self) -> None:
        if self not in in_force:
            return
        above = self._above()
        for swap in reversed(above):
            swap._restore()
        self._restore()
        for swap in above:
            swap._exchange()
        # The last line: until then all of this can be done again.
        in_force.remove(self)

    def _above(self) -> list[Swap]:
        memory, above = set(self._memory), []
        for swap in in_force[in_force.index(self) + 1 :]:
            if swap._memory & memory:
                memory |= swap._memory
                above.append(swap)
        return above

    def _restore(self) -> None:
        with writable([step.live for step in self._journal]):
            # The last first: tensors may overlap in memory.
            while self._journal:
                self._take_one()

    def _put_one(self, average: Tensor, live: Tensor) -> None:
        step = _Step(average, live, live.detach().clone(), _Stage.SAVED)
        self._journal.append(step)
        overwrite(live, average)
        if average.dtype == live.dtype:
            self._journal[-1] = step._replace(stage=_Stage.GIVEN)
            overwrite(average, step.own)
            self._journal[-1] = step._replace(own=None, stage=_Stage.EXCHANGED)

    def _take_one(self) -> None:
        average, live, own, stage = self._journal[-1]
        if stage is _Stage.EXCHANGED:
            own, stage = live.detach().clone(), _Stage.RETURNING
            self._journal[-1] = _Step(average, live, own, stage)
        if stage is _Stage.RETURNING:
            overwrite(live, average)
            stage = _Stage.RETURNED
            self._journal[-1] = _Step(average, live, own, stage)
        if stage is _Stage.RETURNED:
            overwrite(average, own)
        else:
            if stage is _Stage.GIVEN:
                overwrite(average, live)
                self._journal[-1] = _Step(average, live, own, _Stage.SAVED)
            overwrite(live, own)
        self._journal.pop()


in_force: list[Swap] = []
"""The swaps that were put and not taken, in that order: nobody may take these models' values for weights."""


def swapped(tensors: Callable[[], Iterable[Tensor]]) -> bool:
    """Return whether any of these tensors holds an averager's average now; asked for only where one could."""
    memory = {*map(identity, tensors())} if in_force else set()
    return any(swap._memory & memory for swap in in_force)


def overwrite(target: Tensor, value: Tensor | None) -> None:
    """Copy values into a tensor without autograd noticing: graphs that saved it stay valid once it is restored."""
    if value is None:
        return
    # An expanded tensor holds each value once: write through the one element of each expanded dimension.
    for dim, (size, stride) in enumerate(zip(target.shape, target.stride(), strict=True)):
        if stride == 0 and size > 1:
            target, value = target.narrow(dim, 0, 1), value.narrow(dim, 0, 1)
    target.data.copy_(value.detach())


def writable(live: Sequence[Tensor]) -> torch.inference_mode:
    """Return the mode in which these tensors may be written."""
    # Inference tensors may be written under inference mode only, normal ones keep their version counters outside of it.
    return torch.inference_mode(mode=any(tensor.is_inference() for tensor in live))
