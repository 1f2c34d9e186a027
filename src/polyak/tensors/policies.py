"""What an update does with each entry: average it, copy it, or leave it alone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from difflib import get_close_matches
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING, Literal, cast

from polyak.errors import ConfigError
from polyak.tensors.finite import FiniteCheck
from polyak.tensors.storage import unfit

if TYPE_CHECKING:
    from polyak.tensors.entries import Entry

__all__ = ["Buffers", "Globs", "Policy", "policies"]

Policy = Literal["average", "copy", "skip"]
Globs = str | Sequence[str] | None
Buffers = Literal["auto", "average", "copy", "skip"] | Mapping[str, Policy]


def policies(
    entries: Sequence[Entry],
    *,
    buffers: Buffers = "auto",
    include: Globs = None,
    exclude: Globs = None,
    strict: bool = True,
) -> list[Policy]:
    """Return the policy of each entry.

    Floating and complex parameters are averaged, others copied. With ``buffers="auto"`` floating buffers are
    averaged, except the vectors of power iterations (their average has not unit norm) and those that hold
    infinities by design, such as attention masks; these, integers and booleans are copied.

    Args:
        entries: What ``polyak.tensors.walk`` returned.
        buffers: One policy for all buffers, or a mapping of glob to policy (the first that matches; else "auto").
        include: Globs of canonical names; all entries that match none are left alone.
        exclude: Globs of canonical names that are left alone.
        strict: Whether a glob that matches nothing is refused and values are looked at; else only "skip" is sure.

    Raises:
        ConfigError: A glob matches no tensor.

    Examples:
        >>> from torch import nn
        >>> from polyak.tensors import walk
        >>> policies(walk(nn.BatchNorm1d(3)))
        ['average', 'average', 'average', 'average', 'copy']
    """
    included, excluded = _globs(include), _globs(exclude)
    by_glob = buffers if isinstance(buffers, Mapping) else {}
    if strict:
        _refuse_idle("include", included, entries)
        _refuse_idle("exclude", excluded, entries)
        _refuse_idle("buffers", tuple(by_glob), [entry for entry in entries if entry.kind == "buffer"])

    def choose(entry: Entry) -> Policy | None:
        if (include is not None and not _matches(entry, included)) or (excluded and _matches(entry, excluded)):
            return "skip"
        if entry.kind == "parameter":
            return "average" if _is_float(entry) else "copy"
        wanted = buffers if isinstance(buffers, str) else "auto"
        wanted = next((policy for glob, policy in by_glob.items() if _matches(entry, (glob,))), wanted)
        return _buffer_policy(entry, wanted)

    chosen = [choose(entry) for entry in entries]
    # One look at all of them, since each waits for the device.
    undecided = [entry.tensor for entry, policy in zip(entries, chosen, strict=True) if policy is None]
    finite = not strict or FiniteCheck(undecided)()
    return [
        policy or ("average" if finite or FiniteCheck([entry.tensor])() else "copy")
        for entry, policy in zip(entries, chosen, strict=True)
    ]


def _buffer_policy(entry: Entry, wanted: str) -> Policy | None:
    """Return the policy of a buffer; None where its values decide, which are looked at once."""
    if wanted in {"copy", "skip"}:
        return cast("Policy", wanted)
    if not _is_float(entry):
        return "copy"
    if wanted != "auto" or unfit(entry.tensor):
        return "average"  # what is unfit is refused where it is to be stored: there are no values to read here
    return "copy" if entry.iterated else None


def _is_float(entry: Entry) -> bool:
    return entry.tensor.is_floating_point() or entry.tensor.is_complex()


def _globs(globs: Globs) -> tuple[str, ...]:
    return () if globs is None else (globs,) if isinstance(globs, str) else tuple(globs)


def _matches(entry: Entry, globs: Sequence[str]) -> bool:
    return any(fnmatchcase(name, glob) for glob in globs for name in entry.aliases)


def _refuse_idle(option: str, globs: Sequence[str], entries: Sequence[Entry]) -> None:
    for glob in globs:
        if not any(_matches(entry, (glob,)) for entry in entries):
            names = [name for entry in entries for name in entry.aliases]
            near = get_close_matches(glob.replace("*", ""), names, n=3, cutoff=0.3) or names[:3]
            message = (
                f"{option}: the glob {glob!r} matches none of the {len(names)} tensor names; "
                f"such names are {', '.join(map(repr, near)) or '(none)'}"
            )
            raise ConfigError(message)
