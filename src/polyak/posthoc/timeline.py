"""When an average that never ran would have been updated in a recorded run."""

from __future__ import annotations

from itertools import groupby
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from polyak.errors import ConfigError
from polyak.strategy.updates import Updates

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

    from polyak.posthoc.snapshot import Snapshot

__all__ = ["Timeline"]

_LONGEST = 100_000_000  # updates


class _Series(NamedTuple):
    """The updates of one recorded average."""

    updates: Updates
    every: int

    @property
    def first(self) -> int:
        return int(self.updates.steps[0])

    @property
    def is_delayed(self) -> bool:
        """Whether the run may have had earlier steps, which ``start`` skipped."""
        before = self.first - self.every
        return before > 0 and (self.updates.start is None or self.updates.start > before)

    def would_start(self, start: int) -> bool:
        """Return whether an average with this ``start`` has the same first update."""
        before = self.first - self.every
        return before < start <= self.first or (start <= before and not self.is_delayed)


class Timeline:
    """The updates of a recorded run.

    Args:
        snapshots: All snapshots of the run: later ones know what earlier ones do not.
    """

    def __init__(self, snapshots: Sequence[Snapshot]) -> None:
        recorded = sorted((one for one in snapshots if len(one.profile)), key=lambda one: one.average)
        groups = groupby(recorded, key=lambda one: one.average)
        self._series = [_joined(sorted(group, key=lambda one: -one.step)) for _, group in groups]

    def updates(self, step: int, every: int | None, start: int) -> Updates:
        """Return the updates up to a step of an average with this cadence; every: as often as what was recorded.

        An average with the cadence of a recorded one has its updates. One that is updated more rarely has those of its
        steps that are due, and any other one regular updates.

        Raises:
            ConfigError: If there are too many.
        """
        every = min(one.every for one in self._series) if every is None else every
        own = [one for one in self._series if one.every == every and one.would_start(start)]
        finer = own or [one for one in self._series if every % one.every == 0]
        if not finer:
            return Updates(self._regular(step, every, start), every)
        steps = _together(finer)
        known = _together([one for one in self._series if every % one.every == 0])
        gap = int(known[-1] - known[-2]) if len(known) > 1 else finer[0].every
        later = np.concatenate((known[known > steps[-1]], _range(int(known[-1]) + gap, step, gap)))
        if own:
            later = _due(later, every, int(steps[-1]))
            steps = np.concatenate((steps, later))
        else:
            steps = np.concatenate((self._earlier(finer), steps, later))
            steps = _due(steps, every, min(0, int(steps[0]) - 1))
            steps = steps[steps >= start]
        return self._with_known(Updates(steps[steps <= step], every))

    def _regular(self, step: int, every: int, start: int) -> NDArray[np.int64]:
        earliest = min(self._series, key=lambda one: one.first)
        before = 0 if earliest.is_delayed else max(0, earliest.first - earliest.every)
        if earliest.first == 0:  # counted from 0
            before = -1
        first = max(before + 1, start)
        return _range(-(-first // every) * every, step, every)

    def _earlier(self, series: Sequence[_Series]) -> NDArray[np.int64]:
        """Return the steps before the first update, where a recorded average left them out."""
        first = min(one.first for one in series)
        earliest = [one for one in series if one.first == first]
        every = min(one.every for one in earliest)
        return _range(every, first - 1, every) if all(one.is_delayed for one in earliest) else _range(1, 0, 1)

    def _with_known(self, made: Updates) -> Updates:
        """Return updates with the learning rates that were recorded, and whether their steps were counted."""
        n = len(made.steps)
        counted, lrs = np.full(n, fill_value=True), np.full(n, np.inf)
        for known, _ in self._series:
            at = np.searchsorted(known.steps, made.steps).clip(0, len(known.steps) - 1)
            same = known.steps[at] == made.steps
            counted[same] &= np.broadcast_to(known.counted, len(known.steps))[at[same]]
            if isinstance(known.lr, np.ndarray):
                lrs[same] = np.where(np.isfinite(known.lr[at[same]]), known.lr[at[same]], lrs[same])
        return made._replace(counted=counted, lr=lrs if np.isfinite(lrs).any() else None)


def _together(series: Sequence[_Series]) -> NDArray[np.int64]:
    """Return the steps of all updates of several averages."""
    return np.unique(np.concatenate([one.updates.steps for one in series]))


def _due(steps: NDArray[np.int64], every: int, before: int) -> NDArray[np.int64]:
    """Return which of some steps are due at a cadence, where ``before`` is the step before the first."""
    previous = np.concatenate(([before], steps[:-1])) if len(steps) else steps
    return steps[steps // every > previous // every]


def _range(first: int, last: int, every: int) -> NDArray[np.int64]:
    if (last - first) // every >= _LONGEST:
        message = (
            f"one update each every={every} steps up to step {last} is more than {_LONGEST} updates; give a larger "
            "every=, such as the samples or tokens of one step"
        )
        raise ConfigError(message)
    return np.arange(first, last + 1, every, dtype=np.int64)


def _joined(snapshots: Sequence[Snapshot]) -> _Series:
    """Return the updates of one average from its snapshots, the last one first; each may hold one block of them."""
    parts: list[Updates] = []
    for snapshot in snapshots:
        profile = snapshot.profile
        made = profile.updates or Updates(profile.steps)
        if not parts or made.steps[0] < parts[-1].steps[0]:
            stride = profile.stride or int(np.diff(profile.steps[:2]).sum()) or 1
            kept = made.steps < (parts[-1].steps[0] if parts else np.inf)
            lr = made.lr[kept] if isinstance(made.lr, np.ndarray) else np.full(int(kept.sum()), np.inf)
            counted = np.broadcast_to(made.counted, len(made.steps))[kept]
            parts.append(Updates(made.steps[kept], stride, lr, counted, made.start))
    parts.reverse()
    steps, lr, counted = (
        np.concatenate([np.asarray(getattr(part, name)) for part in parts]) for name in ("steps", "lr", "counted")
    )
    every = min(part.stride for part in parts)
    return _Series(Updates(steps, every, lr, counted, parts[0].start), every)
