"""Who computes with an average: a thread, or one task of its event loop."""

from __future__ import annotations

import sys
import threading
from typing import NamedTuple

from polyak.errors import AppliedError
from polyak.errors.calls import warn_user

__all__ = ["Owner"]

_PATIENCE = 60.0
"""Seconds after which a waiting thread warns once: the owner may be waiting for it."""
_ALONE = "Evaluate one after the other, or run the forward passes inside the context that is open."


class Owner(NamedTuple):
    """A thread, and what its event loop runs.

    Attributes:
        thread: The thread.
        task: The running task, or the event loop between tasks; None where no event loop runs.
    """

    thread: threading.Thread
    task: object = None

    @classmethod
    def current(cls) -> Owner:
        """Return the owner of what is entered now."""
        # An event loop runs only where asyncio was imported.
        asyncio = sys.modules.get("asyncio")
        loop = None if asyncio is None else asyncio._get_running_loop()  # noqa: SLF001 - get_running_loop() raises where none runs
        task = None if asyncio is None or loop is None else asyncio.current_task(loop) or loop
        return cls(threading.current_thread(), task)

    def covers(self, other: Owner) -> bool:
        """Return whether the context that the other enters now ends before this one's."""
        # A loop that was started inside of a context is over before the context is left.
        return self.thread is other.thread and self.task in (None, other.task)

    def wait(self, other: Owner, gate: threading.Lock, *, holds: bool) -> None:
        """Wait until another owner has opened a gate.

        Args:
            other: The owner of the gate.
            gate: A lock that the other one holds.
            holds: Whether this thread holds a gate of its own: two such threads would wait for each other.

        Raises:
            AppliedError: If this one cannot wait: in an event loop, with a gate of its own, or for a thread that ended.
        """
        name = other.thread.name
        if self.thread is other.thread:
            message = f"another task of this event loop is inside applied() of the same model. {_ALONE}"
            raise AppliedError(message)
        reason = (
            "this thread runs an event loop, which would stop"
            if self.task is not None
            else "this thread is inside another applied() itself"
            if holds
            else ""
            if other.thread.is_alive()
            else "that thread ended without leaving it"
        )
        if reason:
            message = f"thread {name!r} is inside applied() of the same model, and {reason}. {_ALONE}"
            raise AppliedError(message)
        if not gate.acquire(timeout=_PATIENCE):
            message = (
                f"applied() waits for thread {name!r}, which is inside applied() of the same model. "
                "If that thread waits for this one, neither continues: enter applied() in one of them only."
            )
            warn_user(message)
            gate.acquire()
        gate.release()
