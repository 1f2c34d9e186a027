"""Put the average into a model and take it out again: exact, whatever interrupts it."""
# ruff: noqa: SLF001 - the swaps of one model's memory look into each other

from __future__ import annotations

import threading
from enum import Enum, auto
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor
from torch.nn.utils import parametrize

from polyak.tensors.entries import address, identity
from polyak.tensors.owner import Owner
from polyak.tensors.versions import numbers, set_version, version
from polyak.tensors.writing import overwrite, writable

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

__all__ = ["Swap", "forget_computed", "in_force", "swapped"]

_ATTEMPTS = 3


class _Stage(Enum):
    SAVED = auto()  # `own` holds the model's bits; the model's may be overwritten already
    GIVEN = auto()  # the model holds the average; the stored tensor may be overwritten already
    EXCHANGED = auto()  # the stored tensor holds the model's bits
    RETURNING = auto()  # `own` holds the average; the model's may be overwritten already
    RETURNED = auto()  # the model has its bits; the stored tensor may be overwritten already


class _Step(NamedTuple):
    number: int
    average: Tensor
    live: Tensor
    own: Tensor | None
    stage: _Stage
    writes: int | None  # what autograd counted before


class Swap:
    """One exchange of the average's and the model's values.

    Values are copied, never pointers: parameters, optimisers, compiled graphs and captured CUDA graphs keep the
    memory they know. Where storage and model have the same dtype the two are exchanged through one tensor's worth
    of scratch memory; where they differ the rounded average cannot carry the exact one back, so the
    model's own values are kept in one copy of those tensors.

    Every step is journalled before it is made, so that an exception between any two calls can be undone.
    Several swaps of one model's memory may be in force, and may be undone in any order, but only one owner's at a time.

    Autograd's counts of writes are restored on exit, so that graphs recorded before stay valid. Inside they are
    numbers of this swap's own, so that graphs recorded inside are refused later.

    Args:
        holder: The averager's binding, which finds its swap by it.
        averages: The stored tensors.
        live: The model's tensor for each.

    Attributes:
        holder: The averager's binding.
        owner: Who computes with the average.
        users: The contexts of the owner that are open.
        repacked: The numbers of the tensors that had another shape or dtype inside, once the swap is undone.
        written: The numbers of the tensors that were written inside, once the swap is undone.
    """

    def __init__(self, holder: object, averages: Sequence[Tensor], live: Sequence[Tensor]) -> None:
        self.holder, self.owner = holder, Owner.current()
        self.users: list[object] = []
        self.repacked: set[int] = set()
        self.written: set[int] = set()
        self._pairs = [*zip(averages, live, strict=True)]
        self._places = [tensor.data for tensor in live]
        self._memory = {*map(identity, live)}
        self._first = next(numbers)
        self._writes: list[int | None] = [None if tensor.is_inference() else self._first for tensor in live]
        self._journal: list[_Step] = []
        self._computed: dict[tuple[int, str], Tensor | None] = {}
        self._gate = threading.Lock()
        self._gate.acquire()

    def claim(self) -> None:
        """Wait until no other owner computes with an average in any of this memory, and keep others from it.

        Raises:
            AppliedError: If the caller cannot wait; see ``Owner.wait``.
        """
        while (rival := self._rival()) is not None:
            holds = any(swap.owner.thread is self.owner.thread for swap in [*in_force])
            self.owner.wait(rival.owner, rival._gate, holds=holds)

    def put(self) -> None:
        """Write the average into the model; on any exception the model and the average are as before."""
        try:
            self._exchange()
            forget_computed()
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
        if self not in in_force and self._gate.locked():
            self._gate.release()
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

    def _rival(self) -> Swap | None:
        """Return a swap of another owner that must be undone before; where there is none, this one is in force."""
        with _GUARD:
            for swap in in_force:
                if not swap.owner.covers(self.owner) and swap._memory & self._memory:
                    return swap
            if self not in in_force:
                in_force.append(self)
        return None

    def _exchange(self) -> None:
        self._computed, parametrize._cache = parametrize._cache, {}
        with writable([live for _, live in self._pairs]):
            for number, (average, live) in enumerate(self._pairs):
                self._put_one(number, average, live)

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
        parametrize._cache = self._computed if parametrize._cache_enabled else {}

    def _put_one(self, number: int, average: Tensor, live: Tensor) -> None:
        step = _Step(number, average, live, live.detach().clone(), _Stage.SAVED, version(live))
        self._journal.append(step)
        set_version(live, self._writes[number])
        overwrite(live, average)
        if average.dtype == live.dtype:
            self._journal[-1] = step._replace(stage=_Stage.GIVEN)
            overwrite(average, step.own)
            self._journal[-1] = step._replace(own=None, stage=_Stage.EXCHANGED)

    def _take_one(self) -> None:
        step = self._journal[-1]
        average, live, own, stage = step.average, step.live, step.own, step.stage
        if not _alike(live, self._places[step.number]):
            self.repacked.add(step.number)
            live.data = self._places[step.number]
        if stage is _Stage.EXCHANGED:
            own, stage = live.detach().clone(), _Stage.RETURNING
            self._journal[-1] = step._replace(own=own, stage=stage)
        if stage is _Stage.RETURNING:
            overwrite(live, average)
            stage = _Stage.RETURNED
            self._journal[-1] = step._replace(own=own, stage=stage)
        if stage is _Stage.RETURNED:
            overwrite(average, own)
        else:
            if stage is _Stage.GIVEN:
                overwrite(average, live)
                self._journal[-1] = step._replace(stage=_Stage.SAVED)
            overwrite(live, own)
        self._count(step)
        self._journal.pop()

    def _count(self, step: _Step) -> None:
        """Note what autograd counted inside, and set the count of before."""
        now = version(step.live)
        if now == step.writes:  # where it was done already
            return
        self._writes[step.number] = now
        if now != self._first:
            self.written.add(step.number)
        set_version(step.live, step.writes)


in_force: list[Swap] = []
"""The swaps that were put and not taken, in that order: these models' values are not weights."""
_GUARD = threading.RLock()


def swapped(tensors: Callable[[], Iterable[Tensor]]) -> bool:
    """Return whether any of these tensors holds an averager's average now; asked for only where one could."""
    memory = {*map(identity, tensors())} if in_force else set()
    return any(swap._memory & memory for swap in [*in_force])


def forget_computed() -> None:
    """Forget what was computed from the values before: autocast's copies, and the weights of parametrizations."""
    torch.clear_autocast_cache()
    parametrize._cache.clear()


def _alike(live: Tensor, before: Tensor) -> bool:
    """Return whether a tensor has the form it had before; other memory of the same form may hold its values, too."""
    if live.shape != before.shape or live.dtype != before.dtype:
        return False
    return live.stride() == before.stride() or address(live) != address(before)
