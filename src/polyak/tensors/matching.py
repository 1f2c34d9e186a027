"""Pair stored tensors with a model's entries, by name or by order; loud on any mismatch."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal, NamedTuple

from torch import Tensor

from polyak.errors import MismatchError
from polyak.errors.formatting import shortened
from polyak.tensors.entries import address
from polyak.tensors.sharding.placement import described

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from polyak.tensors.entries import Entry
    from polyak.tensors.storage import Stored

__all__ = ["Changes", "Match", "pair"]

Match = Literal["name", "order"]
_SHOWN = 6


class Changes(NamedTuple):
    """Which buffers a model may fill and drop while it trains.

    Attributes:
        comes: Whether a buffer may be new under one of its names.
        goes: Whether a buffer may be gone under one of its names.
    """

    comes: Callable[[Entry, str], bool] = lambda entry, name: False  # noqa: ARG005 - the names of what it is given
    goes: Callable[[Stored, str], bool] = lambda stored, name: False  # noqa: ARG005 - as above


def pair(
    stored: Sequence[Stored],
    entries: Sequence[Entry],
    match: Match,
    bound: Mapping[int, int],
    changes: Changes = Changes(),  # noqa: B008 - it cannot be changed
) -> list[Stored | None]:
    """Return, for each entry, the stored tensor that averages it; None for a buffer whose average begins again.

    ``"name"`` looks each name up. ``"order"`` takes the entries one after the other, for models whose names are
    all different; where the names are the same, their order must be too, so that two modules that changed
    places are refused. Tensors that were tied since share the average of the one that survived; tensors that
    were untied since go on with a copy of it each.

    Args:
        stored: The average's tensors.
        entries: The model's entries that are not skipped.
        match: ``"name"`` or ``"order"``.
        bound: The address of the live tensor each stored one was paired with last, by its id: who survived a tie.
        changes: Which buffers may come and go; where the shape changes, the average begins again.

    Raises:
        MismatchError: If a tensor is missing, new, renamed, reordered, reshaped, or no longer floating.
    """
    known = {name for s in stored for name in s.aliases}
    names = {name for entry in entries for name in entry.aliases}
    if match == "order" and known.isdisjoint(names):
        problems = [f"{len(entries)} tensors where {len(stored)} were expected"] if len(entries) != len(stored) else []
        chosen: list[Stored | None] = [*stored]
    else:
        gone = [(s, name) for s in stored for name in s.aliases if name not in names]
        new = [(entry, name) for entry in entries for name in entry.aliases if name not in known]
        problems = [f"missing: {name}" for s, name in gone if not changes.goes(s, name)]
        problems += [f"new: {name}" for entry, name in new if not changes.comes(entry, name)]
        if match == "order":
            problems += _moved(stored, entries)
        chosen = [] if problems else _by_name(stored, entries, bound)
    if not problems:
        chosen = [s if s is None or _fits(s, e) else None for s, e in zip(chosen, entries, strict=True)]
        pairs = [(s, entry) for s, entry in zip(chosen, entries, strict=True) if s is not None]
        problems = [difference for s, entry in pairs if (difference := _differs(s, entry))]
    if problems:
        raise MismatchError(_message(problems, len(stored), len(entries), match))
    return chosen


def _by_name(stored: Sequence[Stored], entries: Sequence[Entry], bound: Mapping[int, int]) -> list[Stored | None]:
    holders = {name: s for s in stored for name in s.aliases}
    used: set[int] = set()
    chosen: list[Stored | None] = []
    for entry in entries:
        candidates = [*{id(holders[name]): holders[name] for name in entry.aliases if name in holders}.values()]
        if not candidates:
            chosen.append(None)
            continue
        s = next((s for s in candidates if bound.get(id(s)) == address(entry.tensor)), candidates[0])
        # A tie that was broken: both go on from the average they shared.
        own = s if id(s) not in used else s.mapped(Tensor.clone)
        used.add(id(s))
        chosen.append(own.named(entry))
    return chosen


def _moved(stored: Sequence[Stored], entries: Sequence[Entry]) -> list[str]:
    # A buffer that is registered again comes after the others.
    position = {name: i for i, s in enumerate(stored) if s.kind == "parameter" for name in s.aliases}
    problems, last = [], -1
    for entry in entries:
        place = min((position[name] for name in entry.aliases if name in position), default=last)
        if place < last:
            problems.append(f"moved: {entry.name} was before its neighbour and is now behind it")
        last = max(last, place)
    return problems


def _fits(stored: Stored, entry: Entry) -> bool:
    """Return whether an entry, if it is a buffer, can go on from what is stored of it."""
    tensor, average = entry.tensor, stored.average
    if "parameter" in {entry.kind, stored.kind} or stored.spread != entry.spread:
        return True  # or else it is refused
    if stored.policy == "copy":
        return (average.shape, average.dtype) == (tensor.shape, tensor.dtype)
    floating = tensor.is_floating_point() or tensor.is_complex()
    return floating and (average.shape, average.is_complex()) == (tensor.shape, tensor.is_complex())


def _differs(stored: Stored, entry: Entry) -> str:
    tensor = entry.tensor
    if stored.spread != entry.spread:
        return f"spread otherwise: {entry.name} is {described(entry.spread)} and was {described(stored.spread)}"
    if stored.average.shape != tensor.shape:
        return f"reshaped: {entry.name} is {tuple(tensor.shape)} and was {tuple(stored.shape)}"
    floating = tensor.is_floating_point() or tensor.is_complex()
    if stored.policy == "average" and not floating:
        return f"retyped: {entry.name} is {tensor.dtype}, which has no average, and was a floating tensor"
    if stored.policy == "average" and stored.average.is_complex() != tensor.is_complex():
        return f"retyped: {entry.name} is {tensor.dtype} and its average {stored.average.dtype}"
    return ""


def _message(problems: list[str], averaged: int, found: int, match: Match) -> str:
    shown = shortened(problems, _SHOWN)
    return (
        "the model's tensors are not those the average was built from "
        f"({averaged} averaged, {found} in the model, matched by {match}):\n  {shown}\n"
        "Nothing was changed. Give the model the averager was built from, or build a new averager for this one"
        + (
            " after it was sharded; polyak.distributed.save and load carry an average from one layout to another."
            if any(problem.startswith("spread") for problem in problems)
            else "."
        )
    )
