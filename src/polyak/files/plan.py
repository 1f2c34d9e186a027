"""What becomes of each tensor: which are combined, which are copied, and whether the files agree."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import torch

from polyak.errors import ConfigError, MismatchError
from polyak.errors.formatting import brief, shortened, shown
from polyak.files.names import near
from polyak.files.reading.raw import Box, Part, Stored

if TYPE_CHECKING:
    from collections.abc import Collection, Mapping, Sequence

    from polyak.files.checkpoint import Checkpoint

__all__ = ["Entry", "Integers", "Match", "as_dtype", "as_real", "planned", "widest"]

Match = Literal["same", "common"]
Integers = Literal["last", "equal", "first"]

_SHOWN = 6
_REAL = {torch.complex32: torch.float16, torch.complex64: torch.float32, torch.complex128: torch.float64}


@dataclass(frozen=True)
class Entry:
    """A tensor of the output.

    Attributes:
        names: Its names; several if it is tied in all files.
        dtype: Its dtype.
        shape: Its shape.
        sources: Where it lies in each file.
        combined: Whether it is computed from all files; else it is copied from one.
        chosen: The index of the file that it is copied from.
    """

    names: tuple[str, ...]
    dtype: torch.dtype
    shape: tuple[int, ...]
    sources: tuple[Stored, ...]
    combined: bool
    chosen: int = -1


def planned(
    checkpoints: Sequence[Checkpoint],
    *,
    match: Match,
    integers: Integers,
    dtype: torch.dtype | None,
    skip: Collection[str] = (),
) -> tuple[list[Entry], list[str]]:
    """Return the tensors of the output in the order of the first file, and notes.

    Args:
        checkpoints: The files.
        match: "same": all have the same names; "common": names that some lack are skipped.
        integers: What becomes of integers and booleans.
        dtype: The dtype of floats. Defaults to the widest of the inputs.
        skip: Names that are not planned. Defaults to none.

    Raises:
        MismatchError: If names or shapes differ.
    """
    tables = [{name: one for name, one in table.items() if name not in skip} for table in _aligned(checkpoints)]
    names = [name for name in tables[0] if all(name in table for table in tables)]
    notes = _compare_names(checkpoints, tables, names, match)
    entries: dict[object, Entry] = {}
    for name in names:
        sources = tuple(table[name] for table in tables)
        _compare_shapes(checkpoints, name, sources)
        place = tuple(stored.place for stored in sources) if 0 not in sources[0].shape else name
        if place in entries:
            known = entries[place]
            entries[place] = Entry(
                (*known.names, name), known.dtype, known.shape, known.sources, known.combined, known.chosen
            )
        else:
            entries[place] = _entry(name, sources, integers, dtype)
    if raw := [entry.names[0] for entry in entries.values() if entry.combined and entry.dtype.itemsize == 1]:
        notes.append(f"averaged as plain float8 values, without scales: {shortened(raw, _SHOWN, ', ')}")
    return [*entries.values()], notes


def as_dtype(given: object) -> torch.dtype | None:
    """Return a dtype by its name; None for "same".

    Raises:
        ConfigError: If it is no dtype of floats.
    """
    found = given if isinstance(given, torch.dtype) else getattr(torch, given, None) if isinstance(given, str) else None
    if given == "same":
        return None
    if not isinstance(found, torch.dtype) or not found.is_floating_point:
        message = f"dtype: got {shown(given)}; expected 'same' or a dtype of floats, such as 'float32' or 'bfloat16'"
        raise ConfigError(message)
    return found


def as_real(stored: Stored) -> Stored:
    """Return a complex tensor as one of pairs, and any other one as it is."""
    if not stored.dtype.is_complex:
        return stored
    parts = tuple(Part(part.file, part.offset, 2 * part.begin, 2 * part.end) for part in stored.parts)
    boxes = tuple(
        Box(box.file, box.offset, (*box.starts, 0), (*box.shape, 2), (*(2 * step for step in box.stride), 1))
        for box in stored.boxes
    )
    return Stored(_REAL[stored.dtype], (*stored.shape, 2), parts, boxes)


def _aligned(checkpoints: Sequence[Checkpoint]) -> list[dict[str, Stored]]:
    """Return the tensors of each file; a missing name is found by a tensor that it is tied to elsewhere."""
    tables = [dict(checkpoint.tensors) for checkpoint in checkpoints]
    groups = [group for checkpoint in checkpoints for group in checkpoint.tied]
    for table in tables:
        for group in groups:
            known = next((name for name in group if name in table), None)
            if known is not None:
                for name in group:
                    table.setdefault(name, table[known])
    return tables


def _compare_names(
    checkpoints: Sequence[Checkpoint], tables: Sequence[Mapping[str, Stored]], names: list[str], match: Match
) -> list[str]:
    everything = dict.fromkeys(name for table in tables for name in table)
    left = [name for name in everything if name not in names]
    if not left:
        return []
    if match == "common" and names:
        return [f"skipped, since not all files have them: {shortened(left, _SHOWN, ', ')}"]
    lines = []
    for name in left[:_SHOWN]:
        there = [one.path.name for one, table in zip(checkpoints, tables, strict=True) if name in table]
        lacking = [(one.path.name, table) for one, table in zip(checkpoints, tables, strict=True) if name not in table]
        similar = near(name, [known for known in lacking[0][1] if known not in names])
        hint = f" (there: {similar!r})" if similar else ""
        lines.append(f"{shown(name)} is in {there[0]!r} and not in {lacking[0][0]!r}{hint}")
    rule = "match='common' (--match common) skips them" if names else "they have no name in common"
    message = brief("\n  ".join([f"the files have different tensors; {rule}:", shortened(lines, _SHOWN)]))
    if len(left) > _SHOWN:
        message += f"\n  … and {len(left) - _SHOWN} more"
    raise MismatchError(message)


def _compare_shapes(checkpoints: Sequence[Checkpoint], name: str, sources: Sequence[Stored]) -> None:
    kinds = [stored.dtype.is_floating_point or stored.dtype.is_complex for stored in sources]
    for number, stored in enumerate(sources):
        if stored.shape != sources[0].shape:
            what = f"shape {sources[0].shape}", f"{stored.shape}"
        elif kinds[number] != kinds[0] or stored.dtype.is_complex != sources[0].dtype.is_complex:
            what = f"dtype {sources[0].dtype}", f"{stored.dtype}"
        else:
            continue
        first, other = checkpoints[0].path.name, checkpoints[number].path.name
        message = f"{shown(name)} has {what[0]} in {first!r} and {what[1]} in {other!r}; give files of one model"
        raise MismatchError(message)


def _entry(name: str, sources: tuple[Stored, ...], integers: Integers, dtype: torch.dtype | None) -> Entry:
    first = sources[0]
    if first.dtype.is_complex:
        wide = first.dtype
        for stored in sources:
            wide = torch.promote_types(wide, stored.dtype)
        return Entry((name,), wide, first.shape, tuple(map(as_real, sources)), combined=True)
    if first.dtype.is_floating_point:
        return Entry(
            (name,), dtype or widest([stored.dtype for stored in sources]), first.shape, sources, combined=True
        )
    chosen = 0 if integers == "first" else len(sources) - 1
    return Entry((name,), sources[chosen].dtype, first.shape, sources, combined=False, chosen=chosen)


def widest(dtypes: Sequence[torch.dtype]) -> torch.dtype:
    """Return the shortest dtype of floats that holds all of several."""
    wide = dtypes[0]
    for other in dtypes[1:]:
        pair = {wide, other}
        if len(pair) == 1:
            continue
        if all(dtype.itemsize == 1 for dtype in pair):
            wide = torch.float32  # two kinds of float8, of which none holds the other's values
        elif any(dtype.itemsize == 1 for dtype in pair):
            wide = max(pair, key=lambda dtype: dtype.itemsize)  # torch promotes no float8
        else:
            wide = torch.promote_types(wide, other)
    return wide
