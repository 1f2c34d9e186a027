"""One call of ``update``: all that it changes, or nothing, whatever interrupts it."""

from __future__ import annotations

import sys
from contextlib import ExitStack
from typing import TYPE_CHECKING

from polyak.errors import StateError
from polyak.tensors.modes import Untracked

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from polyak.engine.passes import Pass
    from polyak.engine.pending import PendingUpdate, Seen
    from polyak.engine.updates import Updater

__all__ = ["carry_out", "refuse_within", "whole"]


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
                update.updater.core.holds.warn(update.updater.core.warn)


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
