"""What an update does with each entry: average it, copy it, or leave it alone."""

from __future__ import annotations

from collections.abc import Collection, Container, Mapping, Sequence
from difflib import get_close_matches
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING, Literal, cast

from polyak.errors import ConfigError
from polyak.errors.formatting import shown
from polyak.tensors.finite import FiniteCheck
from polyak.tensors.storage import encoded, unfit
from polyak.tensors.wrappers import spellings

if TYPE_CHECKING:
    from polyak.tensors.entries import Entry

__all__ = ["Buffers", "Globs", "Policy", "policies"]

Policy = Literal["average", "copy", "skip"]
Globs = str | Sequence[str] | None
Buffers = Literal["auto", "average", "copy", "skip"] | Mapping[str, Policy]

_LONGEST = 200  # letters of a glob for which similar names are looked up
_MAGIC = frozenset("*?[")
_ABSENT = -1


def policies(
    entries: Sequence[Entry],
    *,
    buffers: Buffers = "auto",
    include: Globs = None,
    exclude: Globs = None,
    strict: bool = True,
    settled: Container[str] = (),
    absent: Collection[str] = (),
) -> list[Policy]:
    """Return the policy of each entry.

    Floating and complex parameters are averaged, others copied. With ``buffers="auto"`` floating buffers are
    averaged, except the vectors of power iterations (their average has not unit norm), pruning masks, and those that
    hold infinities by design, such as attention masks; these, integers and booleans are copied. Frozen tensors with
    quantised values are skipped.

    A pattern is a name or a glob. It names one tensor where it is that tensor's name, whatever characters are in it.
    The prefixes of wrappers in it may be missing or not.

    Args:
        entries: What ``polyak.tensors.walk`` returned.
        buffers: One policy for all buffers, or a mapping of pattern to policy (the first that matches; else "auto").
        include: Patterns; all entries that match none are skipped.
        exclude: Patterns of entries to skip.
        strict: Whether a pattern that matches nothing is refused.
        settled: Names of buffers whose values are not examined: "average" is assumed where values would decide.
        absent: Names of buffers that are not filled yet, which patterns may match too.

    Raises:
        ConfigError: If a pattern matches no tensor.

    Examples:
        >>> from torch import nn
        >>> from polyak.tensors import walk
        >>> policies(walk(nn.BatchNorm1d(3)))
        ['average', 'average', 'average', 'average', 'copy']
    """
    everything = _Names(dict(enumerate(entries)), absent)
    only_buffers = _Names({i: entry for i, entry in enumerate(entries) if entry.kind == "buffer"}, absent)
    included = everything.matched("include", _patterns(include), strict=strict)
    excluded = everything.matched("exclude", _patterns(exclude), strict=strict)
    wanted: dict[int, str] = {}
    for pattern, policy in buffers.items() if isinstance(buffers, Mapping) else ():
        matched = only_buffers.matched("buffers", (pattern,), strict=strict)
        wanted = {**dict.fromkeys(matched, policy), **wanted}
    rest = buffers if isinstance(buffers, str) else "auto"

    def choose(number: int, entry: Entry) -> Policy | None:
        if (include is not None and number not in included) or number in excluded:
            return "skip"
        if encoded(entry.tensor):  # what is trained, or asked for, is refused where it is to be stored
            return "average" if entry.tensor.requires_grad or wanted.get(number) == "average" else "skip"
        if entry.kind == "parameter":
            return "average" if _is_float(entry) else "copy"
        return _buffer_policy(entry, wanted.get(number, rest))

    chosen = [choose(*numbered) for numbered in enumerate(entries)]
    # One look at all of them, since each waits for the device.
    pairs = [*zip(entries, chosen, strict=True)]
    undecided = [entry.tensor for entry, policy in pairs if policy is None and entry.name not in settled]
    finite = not undecided or FiniteCheck(undecided)()
    return [
        policy or ("average" if finite or entry.name in settled or FiniteCheck([entry.tensor])() else "copy")
        for entry, policy in pairs
    ]


def _buffer_policy(entry: Entry, wanted: str) -> Policy | None:
    """Return the policy of a buffer; None where its values decide, which are looked at once."""
    if wanted in {"copy", "skip"}:
        return cast("Policy", wanted)
    if not _is_float(entry):
        return "copy"
    if wanted != "auto" or unfit(entry.tensor):
        return "average"  # what is unfit is refused where it is to be stored: there are no values to read here
    return "copy" if entry.verbatim else None


def _is_float(entry: Entry) -> bool:
    return entry.tensor.is_floating_point() or entry.tensor.is_complex()


def _patterns(patterns: Globs) -> Sequence[str]:
    return () if patterns is None else (patterns,) if isinstance(patterns, str) else patterns


class _Names:
    """The names of some entries, tied ones under each of theirs, and the number of the entry that has each."""

    def __init__(self, entries: Mapping[int, Entry], absent: Collection[str]) -> None:
        self._numbers = {**dict.fromkeys(absent, _ABSENT), **{n: i for i, e in entries.items() for n in e.aliases}}

    def matched(self, option: str, patterns: Sequence[str], *, strict: bool) -> set[int]:
        """Return the numbers of the entries that any of the patterns names."""
        found: set[int] = set()
        for pattern in patterns:
            matched = self._match(pattern)
            if strict and not matched:
                raise ConfigError(self._complaint(option, pattern))
            found |= matched
        return found

    def _match(self, pattern: str) -> set[int]:
        names = [*spellings(pattern)]
        exact = [self._numbers[name] for name in names if name in self._numbers][:1]
        if exact or _MAGIC.isdisjoint(pattern):
            return {*exact}
        # A bracket that opens no set of characters is one of the name.
        globs = [glob for name in names for glob in (name, name.replace("[", "[[]"))]
        found = ({n for name, n in self._numbers.items() if fnmatchcase(name, glob)} for glob in globs)
        return next(filter(None, found), set())

    def _complaint(self, option: str, pattern: str) -> str:
        names = [*self._numbers]
        near = get_close_matches(pattern[:_LONGEST].replace("*", ""), names, n=3, cutoff=0.3) or names[:3]
        return (
            f"{option}: the glob {shown(pattern)} matches none of the {len(names)} tensor names; "
            f"such names are {', '.join(map(repr, near)) or '(none)'}"
        )
