"""Whether the snapshots in a folder are those that an average remembers."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from polyak.errors import StateError

if TYPE_CHECKING:
    from collections.abc import Collection, Sequence
    from pathlib import Path

    from polyak.engine import Engine
    from polyak.engine.history import Identity
    from polyak.posthoc.snapshot import Snapshot

__all__ = ["Past", "newer_marks", "refuse_other_start", "remember"]


class Past(NamedTuple):
    """An average before the update that is recorded first.

    Attributes:
        identity: What distinguishes its history from others.
        step: The optimiser step of its last update; -1: none.
    """

    identity: Identity
    step: int


def remember(engine: Engine, *marks: tuple[int, str]) -> None:
    """Note in the history of an average that there are snapshots of it."""
    identity = engine.identity
    if new := [mark for mark in marks if mark not in identity.marks]:
        engine.identity = identity._replace(marks=(*identity.marks, *new))


def refuse_other_start(folder: Path, found: Sequence[Snapshot], starts: Collection[str]) -> None:
    """Refuse a run without updates that starts from other weights than the one that was recorded.

    Args:
        folder: The folder.
        found: The snapshots in it.
        starts: The digests of the run's starts.

    Raises:
        StateError: If no start in the folder is one of these.
    """
    known = {snapshot.about.start for snapshot in found if snapshot.is_start} - {""}
    if known and starts and known.isdisjoint(starts):
        message = (
            f"{str(folder)!r} holds snapshots of a run that started from other weights (digest {_listed(known)}) than "
            f"the averager that was loaded, which has no update yet (digest {_listed(starts)}). Load a state of that "
            "run, or give this one a folder of its own."
        )
        raise StateError(message)


def newer_marks(
    folder: Path, name: str, past: Past, found: Sequence[Snapshot], last: int
) -> tuple[tuple[int, str], ...]:
    """Return the marks of snapshots that were written after the state of their average was saved.

    One is at the step of the state: ``close()`` wrote it. Others are from steps that one average of a bank made again.

    Args:
        folder: The folder.
        name: The name of the average.
        past: The average before this update.
        found: The snapshots in the folder, in order.
        last: The last optimiser step of any average before this update. What lies behind it is removed.

    Raises:
        StateError: If the last snapshot before the state is none that the average remembers.
    """
    own = [snapshot for snapshot in found if snapshot.average == name and snapshot.about.mark]
    if past.step < 0 or not own:
        return ()
    before = [snapshot for snapshot in own if snapshot.step <= past.step]
    newer = [snapshot for snapshot in own if past.step < snapshot.step <= last]
    if before and before[-1].step == past.step and past.step not in dict(past.identity.marks):
        newer.insert(0, before.pop())
    known = past.identity.start in {snapshot.about.start for snapshot in own}
    remembered = [digest for step, digest in past.identity.marks if before and step == before[-1].step]
    if known and (not before or before[-1].about.mark in remembered):
        return tuple((snapshot.step, snapshot.about.mark) for snapshot in newer)
    if known:
        what = f"of step {before[-1].step} it remembers {_listed(remembered) or 'no snapshot'}"
        there = before[-1].about.mark
    else:
        what, there = f"it started from {past.identity.start or 'unknown weights'}", own[-1].about.start or "unknown"
    message = (
        f"the average {name!r} is of another run than the one in {str(folder)!r}: {what}; expected {there}. "
        "Load a state that was saved while that run was recorded, or record into a folder of its own."
    )
    raise StateError(message)


def _listed(digests: Collection[str]) -> str:
    return ", ".join(sorted(digests))
