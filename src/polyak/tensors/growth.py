"""Buffers that a model fills, drops or gives another shape while it trains: masks, positions, caches, observers."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import nn

from polyak.tensors.matching import Changes
from polyak.tensors.storage import allocate

if TYPE_CHECKING:
    from collections.abc import Collection, Mapping, Sequence

    import torch

    from polyak.tensors.entries import Entry, Model
    from polyak.tensors.policies import Policy
    from polyak.tensors.storage import Stored

__all__ = ["changes", "filled", "settled", "with_past"]

Kept = list[tuple["Entry", "Policy"]]


def settled(entries: Sequence[Entry], stored: Sequence[Stored]) -> set[str]:
    """Return the names of the entries that are as they were stored, so that their values need not be looked at."""
    known = _by_name(stored)
    return {e.name for e in entries if e.name in known and known[e.name].average.shape == e.tensor.shape}


def with_past(entries: Sequence[Entry], policies: Sequence[Policy], stored: Sequence[Stored]) -> Kept:
    """Return the entries that are not skipped, each with its policy: what was copied is never averaged later."""
    copied = {name for name, s in _by_name(stored).items() if s.policy == "copy"}
    pairs = zip(entries, policies, strict=True)
    return [(e, "copy" if e.name in copied else policy) for e, policy in pairs if policy != "skip"]


def changes(model: Model, kept: Kept, vacant: Collection[str], was_vacant: Collection[str]) -> Changes:
    """Return which buffers may come and go: copies, those that are not persistent, and registered ones.

    Args:
        model: The model.
        kept: Its entries and their policies.
        vacant: The names of its buffers that are registered and not filled now.
        was_vacant: The names of those that were not filled when it was last looked at.
    """
    if not isinstance(model, nn.Module):
        return Changes()
    copied = {entry for entry, policy in kept if policy == "copy"}

    def comes(entry: Entry, name: str) -> bool:
        return entry.kind == "buffer" and (entry in copied or not entry.persistent or name in was_vacant)

    def goes(stored: Stored, name: str) -> bool:
        return stored.follows or (stored.kind == "buffer" and name in vacant)

    return Changes(comes, goes)


def filled(
    paired: Sequence[Stored | None],
    kept: Kept,
    stored: Sequence[Stored],
    device: torch.device | None,
    dtype: torch.dtype | None,
) -> tuple[list[Stored], list[str]]:
    """Return what is stored of each entry, with new storage for what begins anew, and the averages that do so.

    Args:
        paired: What is stored of each entry, None for those that begin anew.
        kept: The entries and their policies.
        stored: All that was stored.
        device: Where averages live; None: with the model.
        dtype: How precisely; None: as the model's dtype asks for.
    """
    slots = next(([*s.slots] for s in stored if s.policy == "average"), [])
    new = [one for one, s in zip(kept, paired, strict=True) if s is None]
    made = allocate(new, slots, device=device, dtype=dtype) if new else []
    for s in made:
        s.fresh = True
    known, waiting = _by_name(stored), iter(made)
    restarted = [s.name for s in made if s.name in known and not s.follows]
    return [next(waiting) if s is None else s for s in paired], restarted


def _by_name(stored: Sequence[Stored]) -> Mapping[str, Stored]:
    return {name: s for s in stored for name in s.aliases}
