"""What an averager's updates held: the last one by name, and how many of them held anything."""

from __future__ import annotations

from collections import deque
from typing import TYPE_CHECKING, NamedTuple

from polyak.errors.formatting import counted
from polyak.tensors.arrival import Arrival, send

if TYPE_CHECKING:
    from collections.abc import Callable

    from polyak.engine.nonfinite import Held
    from polyak.engine.state import State

__all__ = ["Holds"]

_SHOWN = 3  # tensors


class _Read(NamedTuple):
    """Counts of one update on their way from its devices.

    Attributes:
        state: The state that counts them.
        n: The number of the update.
        step: Its optimiser step.
        held: What it held.
        counts: The counts of all moves, one after the other.
    """

    state: State
    n: int
    step: int
    held: Held
    counts: Arrival

    def most(self) -> int:
        """Return how many elements the move held that held most; waits for the devices."""
        counts = (int(count.numpy()) for count in self.counts.read())  # int() of a tensor would ask a device
        return max((sum(next(counts) for _ in own) for own in self.held.moves), default=0)


class Holds:
    """Counts what updates held; where that is on a device it is read later, and nothing waits for it."""

    def __init__(self) -> None:
        self._last: Held | None = None
        self._waiting: deque[_Read] = deque()
        self._messages: list[tuple[str, str]] = []
        self._warned = self._holding = False
        self._counted = 0

    def note(self, state: State, n: int, step: int, held: Held) -> None:
        """Note what update number ``n`` held; the same one twice is once."""
        if n <= self._counted or any(one.n == n for one in self._waiting):
            return
        self._last = held
        read = _Read(state, n, step, held, send([count for counts in held.moves for count in counts]))
        if read.counts.here:
            self._count(read)
            return
        self._waiting.append(read)
        self.settle(wait=False)

    def settle(self, *, wait: bool = True) -> None:
        """Count what has arrived from the devices.

        Args:
            wait: Whether to wait for what has not.
        """
        while self._waiting and (wait or self._waiting[0].counts.arrived()):
            self._count(self._waiting[0])
            self._waiting.popleft()

    def last(self) -> dict[str, int]:
        """Return how many elements of each tensor the last update held, those with none left out."""
        return {} if self._last is None else dict(self._last.names())

    def follow(self, held: Held) -> None:
        """Let a graph's replays, which nobody notes, be the last update from now on."""
        self._last = held

    def forget(self) -> None:
        """Begin anew: another state was loaded."""
        self._waiting.clear()
        self._messages.clear()
        self._last, self._holding, self._counted = None, False, 0

    def warn(self, warn: Callable[[str, str], None]) -> None:
        """Give the warnings that are due.

        Args:
            warn: Warns of one kind of thing, once. It is not kept: an averager is freed with its last reference.
        """
        while self._messages:
            warn(*self._messages.pop(0))

    def _count(self, read: _Read) -> None:
        most = read.most()
        self._counted = read.n
        if most:
            read.state.history.hold(read.n)
            read.state.skipped += most == read.held.elements
            if not self._warned:
                self._messages.append(("held", _first(read, most)))
        elif self._holding:
            what = f"since the update at step {read.step} every element of the average moves again"
            held = counted(read.state.history.held, "update")
            self._messages.append(("held no more", f"{what}; {held} kept the old values of some"))
        self._warned, self._holding = self._warned or bool(most), bool(most)


def _first(read: _Read, most: int) -> str:
    names = [f"{count} of {name}" for name, count in sorted(read.held.names().items(), key=lambda one: -one[1])]
    shown = ", ".join(names[:_SHOWN]) + (f" and of {len(names) - _SHOWN} others" if len(names) > _SHOWN else "")
    where = f" ({shown})" if shown else ""
    return (
        f"{counted(most, 'element')} of the average would not be finite after the update at step {read.step}{where} "
        "and kept the old value; averager.held says which after each update"
    )
