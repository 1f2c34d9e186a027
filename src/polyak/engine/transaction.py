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

    from polyak.engine.pending import Seen, Turn
    from polyak.engine.plan.offload import Offload
    from polyak.engine.plan.tensor_update import Mover
    from polyak.engine.updates import Updating

__all__ = ["Background", "Joint", "Pass", "alone", "carry_out", "refuse_within", "whole"]


class Pass:
    """One pass over the weights: an update of one averager, with all its moves.

    Attributes:
        turns: The updates that it makes.
        finite: Whether the weights are finite, or need not be.
        moved: Whether all its tensors have moved.
        counted: Whether it was counted.
    """

    def __init__(self, turn: Turn) -> None:
        self.turns: Sequence[Turn] = (turn,)
        self.finite, self.moved, self.counted = True, False, False

    def prepare(self) -> None:
        """Look at the weights; nothing moves yet."""
        (turn,) = self.turns
        self.finite = turn.plan.moves.prepare(turn.moves, check=turn.averager.checks)

    def begun(self) -> bool:
        """Return whether anything has moved."""
        return self.finite and self.turns[0].plan.moves.begun()

    def move(self) -> None:
        """Move what has not moved yet."""
        if self.finite and not self.moved:
            self._move()
            self.moved = True

    def commit(self) -> None:
        """Count the updates; idempotent."""
        for turn in self.turns:
            if self.finite:
                turn.commit()
            else:
                turn.skip()
        self.counted = True

    def announce(self, turn: Turn) -> None:
        """Call the listeners of an update that was made."""
        if self.counted and self.finite:
            turn.averager.announce(turn)

    def _move(self) -> None:
        (turn,) = self.turns
        turn.plan.moves.move(turn.generators)


class Joint(Pass):
    """One pass over the weights for several averagers."""

    def __init__(self, turns: Sequence[Turn], mover: Mover) -> None:
        super().__init__(turns[0])
        self.turns, self._mover = turns, mover

    @override
    def prepare(self) -> None:
        self.finite = self._mover.prepare(check=self.turns[0].averager.checks)

    @override
    def begun(self) -> bool:
        return self.finite and self._mover.begun()

    @override
    def _move(self) -> None:
        self._mover.move([turn.rate for turn in self.turns], [turn.generators for turn in self.turns])


class Background(Pass):
    """An update that another thread makes, and counts."""

    def __init__(self, turn: Turn, offload: Offload) -> None:
        super().__init__(turn)
        self._offload = offload
        self._process, self._future = os.getpid(), Future[bool]()

    @override
    def prepare(self) -> None:
        """The other thread looks at the weights."""

    @override
    def begun(self) -> bool:
        return self.turns[0].averager.pending is self

    @override
    def commit(self) -> None:
        """The other thread counts, and who waits for it calls the listeners."""

    @override
    def announce(self, turn: Turn) -> None:
        if self.begun() and turn.averager.is_followed:
            self.wait()

    @override
    def _move(self) -> None:
        (turn,) = self.turns
        if not self.begun():
            self._future = self._offload.start(turn.moves, turn.generators, turn.commit, check=turn.averager.checks)
            turn.averager.pending = self
        if not turn.averager.guards:
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
        (turn,) = self.turns
        if self._process != os.getpid():
            turn.averager.pending = None
            message = (
                "the process was forked while an update was under way on another thread, which is not there now; "
                "call averager.synchronize() before forking. This process has half an average."
            )
            raise StateError(message)
        wait([self._future])
        turn.averager.pending = None
        if self._future.result():
            turn.averager.announce(turn)
            return
        turn.refuse()
        turn.skip()
        turn.warn()


def alone(turn: Turn) -> Pass:
    """Return the pass that makes an update of one averager only."""
    offload = turn.plan.offload
    return Pass(turn) if offload is None else Background(turn, offload)


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
            for turn in reversed(one.turns):
                stack.callback(one.announce, turn)
        _make(passes, others)
        for turn in _skipped(passes):
            turn.warn()


def whole(act: Callable[[], None]) -> None:
    """Do what is idempotent; where it is interrupted, it is done all the same before the interruption goes on."""
    try:
        act()
    except BaseException:
        act()
        raise


def refuse_within(averager: Updating) -> None:
    """Refuse a state that a signal handler takes in the middle of an update: some tensors would have moved.

    Raises:
        StateError: If this thread is in the middle of an update of the averager.
    """
    frame = sys._getframe()  # noqa: SLF001 - a flag could outlive an update that is interrupted
    while (back := frame.f_back) is not None:
        frame = back
        if frame.f_code is _make.__code__:
            passes, others = frame.f_locals["passes"], frame.f_locals["others"]
            if any(turn.averager is averager for turn in (*others, *(turn for one in passes for turn in one.turns))):
                message = (
                    "state_dict() in the middle of an update, from a signal handler: half of the average has moved. "
                    "Let the handler set a flag, and save behind the next update."
                )
                raise StateError(message)


def _skipped(passes: Sequence[Pass]) -> list[Turn]:
    return [turn for one in passes if not one.finite for turn in one.turns]


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
        for turn in _skipped(passes):
            turn.refuse()
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
