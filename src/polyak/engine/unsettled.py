"""Passes that are counted later: made by another thread, or with weights that only their device has looked at."""

from __future__ import annotations

import os
from concurrent.futures import Future, wait
from contextlib import ExitStack
from threading import RLock
from typing import TYPE_CHECKING, Protocol

from typing_extensions import override

from polyak.engine.passes import Joint, Pass
from polyak.engine.transaction import whole
from polyak.errors import StateError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

    from polyak.engine.pending import PendingUpdate
    from polyak.engine.plan.offload import Offload
    from polyak.engine.plan.tensor_update import TensorUpdate
    from polyak.engine.plan.verdict import Verdict
    from polyak.tensors.arrival import Arrival

__all__ = ["Unsettled", "alone", "jointly"]


class Unsettled(Protocol):
    """An update that was called for and is not counted yet."""

    def wait(self) -> None:
        """Wait until it is made or skipped, and count it."""

    def release(self) -> None:
        """Let what is enqueued from now on overwrite the weights, once they were read."""


class Background(Pass):
    """An update that another thread makes, and counts."""

    def __init__(self, update: PendingUpdate, offload: Offload) -> None:
        self._offload = offload
        super().__init__(update)
        self._process, self._future = os.getpid(), Future[bool]()

    @override
    def prepare(self) -> None:
        """The other thread looks at the weights."""

    @override
    def begun(self) -> bool:
        return self.updates[0].updater.core.pending is self

    @override
    def commit(self) -> None:
        """The other thread counts, and who waits for it calls the listeners."""

    @override
    def announce(self, update: PendingUpdate) -> None:
        if self.begun() and update.updater.view.is_held:
            self.wait()

    @override
    def _verdict(self) -> None:
        """The other thread waits."""

    @override
    def _move(self) -> None:
        (update,) = self.updates
        if not self.begun():
            core, moves = update.updater.core, self._offload.moves
            self._future = self._offload.start(
                update.moves,
                update.generators,
                lambda: update.commit(moves.held() if core.holding else None),
                core.options.nonfinite,
            )
            update.updater.core.pending = self
        if not update.updater.guards:
            self.release()

    def release(self) -> None:
        """Let what is enqueued from now on overwrite the weights, once they were read."""
        self._offload.release()

    def wait(self) -> None:
        """Wait until the update is made.

        Raises:
            StateError: If it was under way in another process, which was forked.
            NonFiniteError: If weights are not finite and the averager does not skip such updates.
        """
        (update,) = self.updates
        if self._process != os.getpid():
            update.updater.core.pending = None
            message = (
                "the process was forked while an update was under way on another thread, which is not there now; "
                "call averager.synchronize() before forking. This process has half an average."
            )
            raise StateError(message)
        wait([self._future])
        update.updater.core.pending = None
        if self._future.result():
            update.updater.announce(update)
            update.updater.core.holds.warn(update.updater.core.warn)
            return
        update.refuse()
        update.skip()
        update.warn()


class Deferred(Pass):
    """A pass whose weights only their device has looked at.

    The host reads the answer and counts the updates when the next one begins, or when anything is read of the averages.
    """

    def __init__(self, made: Pass, verdict: Verdict) -> None:
        super().__init__(made.updates[0])
        self.updates, self.verdict = made.updates, verdict
        self._made = made
        self._sent: Arrival | None = None
        self._drawn: list[dict[str, Tensor]] = []
        self._counting = RLock()

    @override
    def prepare(self) -> None:
        self._drawn = [update.state.generators.states() for update in self.updates]
        self._made.prepare()

    @override
    def begun(self) -> bool:
        return self._made.begun()

    @override
    def commit(self) -> None:
        """Nothing is known yet."""

    @override
    def announce(self, update: PendingUpdate) -> None:
        if self._is_pending(update) and update.updater.view.is_held:
            self.wait()

    @override
    def _move(self) -> None:
        self._made.move()
        assert self.verdict is not None  # noqa: S101 - it was made with one
        self._sent = self.verdict.send()
        for update in self.updates:
            update.updater.core.pending = self

    def release(self) -> None:
        """The device has read the weights before it does what is enqueued from now on."""

    def wait(self) -> None:
        """Wait until the device has looked, and count the updates as made or skipped.

        Raises:
            NonFiniteError: If weights are not finite and the averagers do not skip such updates.
        """
        with self._counting:
            if self.counted or self._sent is None:
                return
            (found,) = self._sent.read()
            self._made.finite = not found.numpy()[0]
            whole(self._count)
        with ExitStack() as stack:  # a listener that fails keeps none of the others from being called
            for update in reversed(self.updates):
                stack.callback(self._made.announce, update)
            if not self._made.finite:
                for update in self.updates:
                    update.refuse()
                    update.warn()

    def _count(self) -> None:
        if self._made.finite or self._skips():
            self._made.commit()
        self.counted = True
        for update, drawn in zip(self.updates, self._drawn, strict=True):
            if not self._made.finite:
                update.state.generators.restore(drawn)  # nothing was rounded by what it drew
            if self._is_pending(update):
                update.updater.core.pending = None

    def _skips(self) -> bool:
        return self.updates[0].updater.core.options.nonfinite == "skip"

    def _is_pending(self, update: PendingUpdate) -> bool:
        return update.updater.core.pending is self


def alone(update: PendingUpdate) -> Pass:
    """Return the pass that makes an update of one averager only."""
    offload = update.plan.offload
    return _deferred(Pass(update)) if offload is None else Background(update, offload)


def jointly(updates: Sequence[PendingUpdate], joint: TensorUpdate) -> Pass:
    """Return the pass that makes updates of several averagers of the same weights."""
    return _deferred(Joint(updates, joint))


def _deferred(made: Pass) -> Pass:
    return made if made.verdict is None else Deferred(made, made.verdict)
