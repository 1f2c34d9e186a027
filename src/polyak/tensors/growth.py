"""Buffers that a model fills, drops or gives another shape while it trains: masks, positions, caches, observers."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import nn

from polyak.errors.calls import warn_user
from polyak.tensors.entries import vacant
from polyak.tensors.matching import Changes, pair
from polyak.tensors.storage import allocate, check_storable, refuse_unfit

if TYPE_CHECKING:
    from collections.abc import Collection, Mapping, Sequence

    from polyak.tensors.entries import Entry, Model
    from polyak.tensors.matching import Match
    from polyak.tensors.policies import Policy
    from polyak.tensors.storage import Precision, Stored

__all__ = ["Growth", "settled", "with_past"]

Kept = list[tuple["Entry", "Policy"]]
_SHOWN = 6


def settled(entries: Sequence[Entry], stored: Sequence[Stored]) -> set[str]:
    """Return the names of the entries that are as they were stored, so that their values need not be looked at."""
    known = _by_name(stored)
    return {e.name for e in entries if e.name in known and known[e.name].average.shape == e.tensor.shape}


def with_past(entries: Sequence[Entry], policies: Sequence[Policy], stored: Sequence[Stored]) -> Kept:
    """Return the entries that are not skipped, each with its policy: what was copied is never averaged later."""
    copied = {name for name, s in _by_name(stored).items() if s.policy == "copy"}
    pairs = zip(entries, policies, strict=True)
    return [(e, "copy" if e.name in copied else policy) for e, policy in pairs if policy != "skip"]


class Growth:
    """Follows the buffers of an averager's models, and remembers which were not filled when it last looked."""

    def __init__(self) -> None:
        self._vacant: Mapping[str, bool] = {}
        self._warned = False

    def look(self, model: Model) -> Collection[str]:
        """Remember and return the names of the buffers that a model has not filled."""
        self._vacant = vacant(model)
        return self._vacant

    def optional(self, *, copied: bool) -> set[str]:
        """Return the buffers that a saved state may have although they are not filled now.

        Args:
            copied: Whether all buffers are copied, so that none has a past.
        """
        return {name for name, persistent in self._vacant.items() if copied or not persistent}

    def paired(
        self,
        model: Model,
        kept: Kept,
        stored: Sequence[Stored],
        bound: Mapping[int, int],
        match: Match,
        place: tuple[torch.device | None, Precision],
    ) -> tuple[list[Stored], list[str]]:
        """Return the storage of each entry, new where an average begins again, and the names of these averages.

        Args:
            model: The model.
            kept: Its entries and their policies.
            stored: All that was stored.
            bound: See ``polyak.tensors.matching.pair``.
            match: By name or by order.
            place: Where averages live (None: with the model), and how precisely (None: as its dtypes ask for).

        Raises:
            MismatchError: If the model's tensors are not those that were stored.
            ModelError: If one of them cannot be stored.
        """
        entries = [entry for entry, _ in kept]
        slots = next(([*s.slots] for s in stored if s.policy == "average"), [])
        # Under the caller's inference mode new storage could never be updated outside of it.
        with torch.inference_mode(mode=False), torch.no_grad():
            paired = pair(stored, entries, match, bound, self._changes(model, kept))
            new = [one for one, s in zip(kept, paired, strict=True) if s is None]
            refuse_unfit([entry for entry, _ in new])
            made = allocate(new, slots, device=place[0], dtype=place[1]) if new else []
            waiting = iter(made)
            whole = [next(waiting) if s is None else s for s in paired]
            check_storable(entries, [s.policy for s in whole])
            if place[0] is None:
                whole = [s.on_device_of(entry.tensor) for s, entry in zip(whole, entries, strict=True)]
        for s in made:
            s.fresh = True
        known = _by_name(stored)
        return whole, [s.name for s in made if s.name in known and not s.follows]

    def warn(self, restarted: Sequence[str]) -> None:
        """Say once which averages begin again."""
        if restarted and not self._warned:
            self._warned = True
            message = (
                f"{', '.join(restarted[:_SHOWN])} changed shape: the average of each begins again with its "
                "new value. buffers={name: 'copy'} keeps no average of it"
            )
            warn_user(message)

    def _changes(self, model: Model, kept: Kept) -> Changes:
        """Return which buffers may come and go: copies, those that are not persistent, and registered ones."""
        if not isinstance(model, nn.Module):
            return Changes()
        copied, before, now = {entry for entry, policy in kept if policy == "copy"}, self._vacant, vacant(model)

        def comes(entry: Entry, name: str) -> bool:
            return entry.kind == "buffer" and (entry in copied or not entry.persistent or name in before)

        def goes(stored: Stored, name: str) -> bool:
            return stored.follows or (stored.kind == "buffer" and name in now)

        return Changes(comes, goes)


def _by_name(stored: Sequence[Stored]) -> Mapping[str, Stored]:
    return {name: s for s in stored for name in s.aliases}
