"""Work on other threads: in slices over as many as torch uses, or beside the training."""

from __future__ import annotations

import os
from concurrent.futures import Future, wait
from queue import SimpleQueue
from threading import Thread
from typing import TYPE_CHECKING, TypeVar

import numpy as np
import torch

from polyak.kernels.openmp import on_team

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

__all__ = ["Slices", "background"]

T = TypeVar("T")


class _Pool:
    """Threads that wait for work; a forked process starts its own."""

    def __init__(self) -> None:
        self._forget()
        if hasattr(os, "register_at_fork"):
            os.register_at_fork(after_in_child=self._forget)

    def need(self, threads: int) -> None:
        """Start threads until there are so many."""
        while self._started < threads:
            Thread(target=_serve, args=[self._queue], name=f"polyak-{self._started}", daemon=True).start()
            self._started += 1

    def do(self, future: Future[T], work: Callable[[], T]) -> None:
        """Let one of the threads do some work, unless its future is cancelled before."""

        def fulfil() -> None:
            if future.set_running_or_notify_cancel():
                try:
                    future.set_result(work())
                except BaseException as error:  # noqa: BLE001 - whoever waits for the future gets it
                    future.set_exception(error)

        self._queue.put(fulfil)

    def _forget(self) -> None:
        self._queue: SimpleQueue[Callable[[], None]] = SimpleQueue()
        self._started = 0


def _serve(queue: SimpleQueue[Callable[[], None]]) -> None:
    while True:
        queue.get()()


_POOL = _Pool()
_BACKGROUND = _Pool()


def background(work: Callable[[], T]) -> Future[T]:
    """Return the future of some work that another thread does, one after the other."""
    _BACKGROUND.need(1)
    future: Future[T] = Future()
    _BACKGROUND.do(future, work)
    return future


class Slices:
    """Work cut in slices, done in any order by torch.get_num_threads() threads.

    The work must release Python's lock, and may mark its slice in ``done`` as its last act: such slices are left out
    when ``run`` is called again, until they are reset.

    Args:
        count: How many slices there are.

    Attributes:
        done: For each slice, whether it is done.
    """

    def __init__(self, count: int) -> None:
        self._running: list[Future[None]] = []
        self._process = 0
        self.done = np.zeros(count, np.bool_)

    def reset(self) -> None:
        """Forget what was done."""
        self._join()
        self.done[:] = False

    def finished(self) -> int:
        """Return how many slices are done; waits for those that an interrupted call left running."""
        self._join()
        return int(np.count_nonzero(self.done))

    def run(self, work: Callable[[int], None]) -> None:
        """Do all slices that are not done.

        Args:
            work: Does one of them, by its number. It is not kept: its owner is freed with its last reference.
        """
        self._join()
        if len(self.done) == 1:  # small models: what a single slice does not need takes longer than its work
            if not self.done[0]:
                work(0)
            return
        left = np.flatnonzero(~self.done).tolist()
        slices = iter(left)
        threads = min(torch.get_num_threads(), len(left))
        if threads > 1 and on_team(lambda: _take(slices, work), threads):
            return
        if threads > 1:
            _POOL.need(threads - 1)
            # Known before they begin: an interruption that struck in between would leave them behind.
            self._process = os.getpid()
            self._running = [Future() for _ in range(threads - 1)]
            for future in self._running:
                _POOL.do(future, lambda: _take(slices, work))
        try:
            _take(slices, work)
        finally:
            self._join()

    def _join(self) -> None:
        if self._running:
            self._wait()

    def _wait(self) -> None:
        if self._process != os.getpid():  # forked: the threads that would have finished them are not here
            self._running = []
        while self._running:
            # Who has not begun is not needed any more.
            if not self._running[-1].cancel():
                wait(self._running[-1:])
                self._running.pop().result()
            else:
                self._running.pop()


def _take(slices: Iterator[int], work: Callable[[int], None]) -> None:
    # The next one goes to a thread that is free: a core that others use does not hold up the rest.
    for number in slices:
        work(number)
