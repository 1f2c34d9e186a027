"""One call of ``update``: all that it changes, or nothing, whatever interrupts it."""

from __future__ import annotations

import os
import sys
from concurrent.futures import Future, wait
from contextlib import ExitStack
from typing import TYPE_CHECKING

from typing_extensions import override

from polyak.errors import StateError
from polyak.tensors.modes import Untracked

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from polyak.engine.nonfinite import Held
    from polyak.engine.pending import PendingUpdate, Seen
    from polyak.engine.plan.offload import Offload
    from polyak.engine.plan.tensor_update import TensorUpdate
    from polyak.engine.updates import Updater

__all__ = ["Background", "Joint", "Pass", "alone", "carry_out", "refuse_within", "whole"]


class Pass:
    """One pass over the weights: an update of one averager, with all its moves.

    Attributes:
        updates: The updates that it makes.
        finite: Whether the weights are finite, or need not be.
        moved: Whether all its tensors have moved.
        counted: Whether it was counted.
    """

    def __init__(self, update: PendingUpdate) -> None:
        self.updates: Sequence[PendingUpdate] = (update,)
        self.finite, self.moved, self.counted = True, False, False

    def prepare(self) -> None:
        """Look at the weights; nothing moves yet."""
        (update,) = self.updates
        self.finite = update.plan.moves.prepare(update.moves, update.updater.core.options.nonfinite)

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


class Joint(Pass):
    """One pass over the weights for several averagers."""

    def __init__(self, updates: Sequence[PendingUpdate], joint: TensorUpdate) -> None:
        super().__init__(updates[0])
        self.updates, self._joint = updates, joint

    @override
    def prepare(self) -> None:
        self.finite = self._joint.prepare(self.updates[0].updater.core.options.nonfinite)

    @override
    def begun(self) -> bool:
        return self.finite and self._joint.begun()

    @override
    def _move(self) -> None:
        self._joint.move([update.rate for update in self.updates], [update.generators for update in self.updates])

    @override
    def _held(self, number: int) -> Held:
        return self._joint.held(number)


class Background(Pass):
    """An update that another thread makes, and counts."""

    def __init__(self, update: PendingUpdate, offload: Offload) -> None:
        super().__init__(update)
        self._offload = offload
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
            update.updater.core.holds.warn()
            return
        update.refuse()
        update.skip()
        update.warn()


def alone(update: PendingUpdate) -> Pass:
    """Return the pass that makes an update of one averager only."""
    offload = update.plan.offload
    return Pass(update) if offload is None else Background(update, offload)


def carry_out(passes: Sequence[Pass], others: Sequence[Seen] = ()) -> None:
    """Make and count updates, all or none, then call their listeners.

    Args:
        passes: The updates, by the passes that make them.
        others: Calls that are only counted.

    Raises:
        NonFiniteError: If weights are not finite and an averager does not skip such updates.
    """
    with ExitStack() as stack:  # a listener that fails keeps none of the others from being called
        for one in reversed(passes):
            for update in reversed(one.updates):
                stack.callback(one.announce, update)
        _make(passes, others)
        for update in _skipped(passes):
            update.warn()
        for one in passes:
            for update in one.updates:
                update.updater.core.holds.warn()


def whole(act: Callable[[], None]) -> None:
    """Do what is idempotent; where it is interrupted, it is done all the same before the interruption goes on."""
    try:
        act()
    except BaseException:
        act()
        raise


def refuse_within(updater: Updater) -> None:
    """Refuse a state that a signal handler takes in the middle of an update: some tensors would have moved.

    Raises:
        StateError: If this thread is in the middle of an update of the averager.
    """
    frame = sys._getframe()  # noqa: SLF001 - a flag could outlive an update that is interrupted
    while (back := frame.f_back) is not None:
        frame = back
        if frame.f_code is _make.__code__:
            passes, others = frame.f_locals["passes"], frame.f_locals["others"]
            if any(
                update.updater is updater for update in (*others, *(update for one in passes for update in one.updates))
            ):
                message = (
                    "state_dict() in the middle of an update, from a signal handler: half of the average has moved. "
                    "Let the handler set a flag, and save behind the next update."
                )
                raise StateError(message)


def _skipped(passes: Sequence[Pass]) -> list[PendingUpdate]:
    return [update for one in passes if not one.finite for update in one.updates]


def _make(passes: Sequence[Pass], others: Sequence[Seen]) -> None:
    counting: list[bool] = []

    def go_on() -> None:
        for one in passes:
            one.move()
        counting.append(True)
        for one in passes:
            one.commit()
        for seen in others:
            seen.commit()

    with Untracked():
        for one in passes:
            one.prepare()
        for update in _skipped(passes):
            update.refuse()
        try:
            go_on()
        except BaseException:
            if counting or any(one.begun() for one in passes):
                _finish(go_on, passes)
            raise


def _finish(go_on: Callable[[], None], passes: Sequence[Pass]) -> None:
    """Make the rest of what has begun; where that fails again, count what has moved."""
    try:
        go_on()
    except BaseException:
        for one in passes:
            if one.moved:
                one.commit()
        raise
