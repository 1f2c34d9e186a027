"""Whether the snapshots in a folder are those that an average remembers."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from polyak.errors import StateError

if TYPE_CHECKING:
    from collections.abc import Collection, Sequence
    from pathlib import Path

    from polyak.engine import Engine
    from polyak.history import Identity
    from polyak.posthoc.snapshot import Snapshot

__all__ = ["Past", "newer_mark", "refuse_other_start", "remember"]


class Past(NamedTuple):
    """An average before the update that is recorded first.

    Attributes:
        identity: What tells its history from others.
        step: The optimiser step of its last update; -1: none.
    """

    identity: Identity
    step: int


def remember(engine: Engine, mark: tuple[int, str]) -> None:
    """Note in the history of an average that there is a snapshot of it."""
    identity = engine.identity
    if mark not in identity.marks:
        engine.identity = identity._replace(marks=(*identity.marks, mark))


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


def newer_mark(folder: Path, name: str, past: Past, kept: Sequence[Snapshot]) -> tuple[int, str] | None:
    """Return the mark of a snapshot that was written after the state of its average was saved, if there is one.

    That is what ``close()`` writes, at the step of the state.

    Args:
        folder: The folder.
        name: The name of the average.
        past: The average before this update.
        kept: The snapshots up to there, in order.

    Raises:
        StateError: If the last snapshot of the average is none that it remembers.
    """
    own = [snapshot for snapshot in kept if snapshot.average == name and snapshot.about.mark]
    if past.step < 0 or not own:
        return None
    newest, mark = own[-1], None
    if newest.step == past.step and newest.step not in dict(past.identity.marks):
        if len(own) == 1 and newest.about.start == past.identity.start:
            return newest.step, newest.about.mark
        if len(own) > 1:
            newest, mark = own[-2], (newest.step, newest.about.mark)
    remembered = [digest for step, digest in past.identity.marks if step == newest.step]
    if newest.about.mark in remembered:
        return mark
    message = (
        f"the average {name!r} is of another run than the one in {str(folder)!r}: of step {newest.step} it remembers "
        f"{_listed(remembered) or 'no snapshot'}, and the snapshot there is {newest.about.mark}. Load a state that was "
        "saved while that run was recorded, or record into a folder of its own."
    )
    raise StateError(message)


def _listed(digests: Collection[str]) -> str:
    return ", ".join(sorted(digests))
