"""Threads that work on pieces at once, and do some of the work in the order of the pieces."""

from __future__ import annotations

import os
import threading
from contextlib import contextmanager
from typing import TYPE_CHECKING, Generic, TypeVar

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

__all__ = ["Lane", "StoppedError", "run", "usual_threads"]

T = TypeVar("T")

_MOST = 8


class StoppedError(Exception):
    """Another thread failed, or the user interrupted."""


class Lane:
    """Lets one thread after the other in, in the order of the pieces."""

    def __init__(self) -> None:
        self._turn, self._stopped = 0, False
        self._changed = threading.Condition()

    @contextmanager
    def turn(self, number: int) -> Iterator[None]:
        """Wait for all pieces before this one.

        Raises:
            StoppedError: If one of them will never come.
        """
        with self._changed:
            self._changed.wait_for(lambda: self._stopped or self._turn == number)
            if self._stopped:
                raise StoppedError
        yield
        with self._changed:
            self._turn += 1
            self._changed.notify_all()

    def stop(self) -> None:
        """Let all that wait give up."""
        with self._changed:
            self._stopped = True
            self._changed.notify_all()


def usual_threads() -> int:
    """Return as many threads as this process has processors, eight at most."""
    count = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, min(_MOST, count))


def run(
    items: Iterable[T], worker: Callable[[], Callable[[int, T], None]], threads: int, lanes: Iterable[Lane]
) -> None:
    """Work on numbered items on several threads; after an error or Ctrl-C none is still at work.

    Args:
        items: The items, in order.
        worker: Makes what works on an item, once per thread: it may hold memory.
        threads: How many.
        lanes: What to stop if a thread fails.

    Raises:
        BaseException: What the first thread that failed raised.
    """
    crew = _Crew(items, worker, [*lanes])
    started = [threading.Thread(target=crew.work, name=f"polyak-files-{i}", daemon=True) for i in range(threads)]
    try:
        for thread in started:
            thread.start()
        for thread in started:
            thread.join()
    except BaseException:  # Ctrl-C
        crew.stop()
        for thread in started:
            if thread.ident is not None:
                thread.join()
        raise
    if crew.errors:
        raise crew.errors[0]


class _Crew(Generic[T]):
    """What the threads share."""

    def __init__(self, items: Iterable[T], worker: Callable[[], Callable[[int, T], None]], lanes: list[Lane]) -> None:
        self.errors: list[BaseException] = []
        self._items, self._worker, self._lanes = enumerate(items), worker, lanes
        self._lock, self._stopped = threading.Lock(), threading.Event()

    def work(self) -> None:
        """Work on one item after the other, until there are no more or a thread fails."""
        try:
            do = self._worker()
            while (item := self._next()) is not None:
                do(*item)
        except StoppedError:
            return
        except BaseException as error:  # noqa: BLE001 - the caller's thread raises it
            self.errors.append(error)
            self.stop()

    def stop(self) -> None:
        """Let all threads end after their present item."""
        self._stopped.set()
        for lane in self._lanes:
            lane.stop()

    def _next(self) -> tuple[int, T] | None:
        with self._lock:
            return None if self._stopped.is_set() else next(self._items, None)
