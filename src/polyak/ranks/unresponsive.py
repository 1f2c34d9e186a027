"""Which rank does not answer: asked through the process group's store, once a collective has failed."""

from __future__ import annotations

import re
import time
from collections import Counter
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING
from zlib import crc32

import torch.distributed as dist

from polyak.errors import DistributedError

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from torch._C._distributed_c10d import Store

__all__ = ["answered", "words"]

# In seconds. A rank that waits for one that already knows of the failure learns of it after the group's own timeout.
_MOST, _SLACK, _SURE, _PAUSE, _FAREWELL = 60.0, 5.0, 1.0, 0.05, 2.0
_KEY = "polyak/roll call"
# What gloo says; the other backends raise errors of their own.
_TALK = re.compile(r"\[\S*/gloo/|^operation timed out|pair closure", re.IGNORECASE)
_CLOSED = re.compile("connection (closed|reset)|broken pipe", re.IGNORECASE)
_calls: Counter[int] = Counter()


@contextmanager
def answered(purpose: str, rest: str = "", *, ranks: Sequence[int] | None = None) -> Iterator[None]:
    """Name the rank that does not answer, once the others have reported to each other, where ranks cannot communicate.

    They wait for each other until the group's own timeout is over, but no longer than a minute, and then for some
    seconds more, since not all begin at once.

    Args:
        purpose: What fails, as a verb: "save to 'folder'".
        rest: What that means, and what to do.
        ranks: The participants. Defaults to all.

    Raises:
        DistributedError: If the ranks could not communicate. Other errors pass unchanged.
    """
    began = time.monotonic()
    try:
        yield
    except Exception as error:
        if isinstance(error, DistributedError) or not (dist.is_available() and dist.is_initialized()):
            raise
        if not (isinstance(error, dist.DistError) or (type(error) is RuntimeError and _TALK.search(str(error)))):
            with suppress(RuntimeError):  # for the ranks that will wait in vain
                _store().set(f"{_KEY}/last words/{dist.get_rank()}", f"{type(error).__name__}: {error}"[:200])
            raise
        who = _missing(error, [*range(dist.get_world_size())] if ranks is None else ranks, began)
        message = f"rank {dist.get_rank()} could not {purpose}: {who}. {rest}\n(torch: {error})"
        raise DistributedError(message) from error


def words(ranks: Sequence[int]) -> str:
    """Return ranks in words.

    Examples:
        >>> words([1]), words([0, 2])
        ('rank 1', 'ranks 0, 2')
    """
    return f"rank {ranks[0]}" if len(ranks) == 1 else f"ranks {', '.join(map(str, ranks))}"


def _missing(error: Exception, ranks: Sequence[int], began: float) -> str:
    """Return in words which ranks do not answer."""
    call = _Call(_store(), ranks)
    timeout = call.store.timeout.total_seconds()  # type: ignore[attr-defined]  # torch has it, its stubs have not
    now = time.monotonic()
    gone = ""
    try:
        call.answer(closed=_CLOSED.search(str(error)) is not None)
        call.wait(now + _SURE, max(min(began + timeout, now + _MOST), now) + min(timeout, _SLACK))
    except RuntimeError:
        gone = "the process group's store, which rank 0 keeps (torchrun: its agent), is gone"
    missing = [rank for rank in ranks if rank not in call.reports]
    if gone and 0 not in call.reports:
        return f"{gone}: rank 0 died, or stopped by an error of its own"
    if not missing:
        ago = {rank: time.time() - sent for rank, (_, sent) in call.reports.items()}  # by the clocks of their machines
        old = [
            f"rank {rank} reported {past:.0f} s ago and may have ended since"
            for rank, past in ago.items()
            if past > _SLACK
        ]
        late = "one did not take part, or too late for the group's timeout"
        return f"all ranks answered: {'; '.join([late, *old])}"
    if call.certain:
        return f"{words(missing)} is gone: it closed its connections and does not answer{_last_words(missing)}"
    do = "does not answer: it died, hangs or did not take part"
    if len(missing) > 1:
        do = "do not answer: they died, hang, did not take part, or wait for one that did not"
    return f"{words(missing)} {do}{_last_words(missing)}"


class _Call:
    """The report and its time of each rank: whether it saw a connection closed, and did not only wait in vain."""

    def __init__(self, store: Store, ranks: Sequence[int]) -> None:
        group = crc32(repr(tuple(ranks)).encode())
        _calls[group] += 1
        self.store, self.reports, self._ranks, self._read = store, dict[int, tuple[bool, float]](), ranks, 0
        self._key = f"{_KEY}/{group}/{_calls[group]}"

    @property
    def certain(self) -> bool:
        """Whether one rank only is missing and surely gone: a timeout closes connections between living ranks, too."""
        return len(self.reports) == len(self._ranks) - 1 and all(closed for closed, _ in self.reports.values())

    def answer(self, *, closed: bool) -> None:
        number = self.store.add(f"{self._key}/count", 1)
        self.store.set(f"{self._key}/{number}", f"{dist.get_rank()} {int(closed)} {time.time()}")

    def wait(self, sure: float, until: float) -> None:
        while True:
            self._listen()
            now = time.monotonic()
            if len(self.reports) == len(self._ranks) or (self.certain and now > sure) or now > until:
                break
            time.sleep(_PAUSE)
        here = self.store.add(f"{self._key}/heard", 1)
        until = time.monotonic() + _FAREWELL
        # The store may end with this rank: the others read it first.
        while dist.get_rank() == 0 and here < len(self.reports) and time.monotonic() < until:
            time.sleep(_PAUSE)
            here = self.store.add(f"{self._key}/heard", 0)

    def _listen(self) -> None:
        count = self.store.add(f"{self._key}/count", 0)
        keys = [f"{self._key}/{number}" for number in range(self._read + 1, count + 1)]
        if keys and self.store.check(keys):  # counted first, written then
            for key in keys:
                rank, closed, when = self.store.get(key).split()
                self.reports[int(rank)] = closed == b"1", float(when)
            self._read = count


def _last_words(ranks: Sequence[int]) -> str:
    errors: list[str] = []
    with suppress(RuntimeError):
        keys = {rank: f"{_KEY}/last words/{rank}" for rank in ranks}
        errors = [f"rank {rank}: {_store().get(key).decode()}" for rank, key in keys.items() if _store().check([key])]
    return f" (the last error it reported: {'; '.join(errors)})" if errors else ""


def _store() -> Store:
    return dist.distributed_c10d._get_default_store()  # noqa: SLF001 - torch has no public way to it
