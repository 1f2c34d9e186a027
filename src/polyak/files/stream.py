"""Tensors of many files read in pieces, combined in float64, and written where they belong: memory stays small."""

from __future__ import annotations

import math
from contextlib import nullcontext
from typing import TYPE_CHECKING, NamedTuple, Protocol

import torch

from polyak.errors import MismatchError, NonFiniteError
from polyak.errors.formatting import shown
from polyak.files.hashing import Digest
from polyak.files.lanes import Lane, run
from polyak.files.reading.values import bytes_of, fill, spans

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from torch import Tensor

    from polyak.files.checkpoint import Checkpoint
    from polyak.files.plan import Entry, Integers
    from polyak.files.reading.raw import RawFile

__all__ = ["Combine", "Output", "Piece", "Settings", "real_of", "stream"]

_MEMORY = 12 << 20  # bytes of pieces that all threads hold
_LARGEST, _LEAST = 1 << 20, 1 << 14  # bytes of one piece: below and above that the system calls or the cache cost more


class Piece(NamedTuple):
    """Values from ``begin`` to ``end`` of an output tensor that is flat, complex ones as pairs."""

    entry: Entry
    begin: int
    end: int


class Combine(Protocol):
    """Makes the output of the inputs; one object for each thread, since it may hold memory."""

    whole: bool
    """Whether it needs whole tensors, which it gets in float64."""

    def __call__(self, piece: Piece, sources: Sequence[Tensor], out: Tensor) -> int:
        """Fill ``out``; return -1, or the index of the first input with a NaN or an infinity."""


class Output(Protocol):
    """Where the pieces go."""

    ordered: bool
    """Whether the pieces of a tensor have to come in order."""

    def write(self, name: str, offset: int, data: memoryview) -> None:
        """Write bytes of a tensor."""


class Settings(NamedTuple):
    """How to stream.

    Attributes:
        threads: On how many threads.
        hashes: Whether the sha256 of the inputs is taken.
        integers: What becomes of tensors that are copied.
        progress: Gets the number of bytes of each read.
    """

    threads: int
    hashes: bool
    integers: Integers
    progress: Callable[[int], None]


def stream(
    checkpoints: Sequence[Checkpoint],
    entries: Sequence[Entry],
    output: Output,
    combine: Callable[[], Combine],
    settings: Settings,
) -> dict[str, str]:
    """Read all tensors once, piece by piece, and write the output; return the sha256 of each input file by its path.

    Args:
        checkpoints: The inputs.
        entries: The tensors of the output, in the order in which they are written.
        output: Where they go.
        combine: Makes what combines pieces, once for each thread.
        settings: How.

    Raises:
        NonFiniteError: If an input has a NaN or an infinity and ``combine`` says so.
        MismatchError: If integers differ under ``integers="equal"``.
        StateError: If a file cannot be read.
    """
    lanes = [Lane() for _ in checkpoints] if settings.hashes else []
    last = Lane() if output.ordered else None
    digests: list[dict[RawFile, Digest]] = [
        {file: Digest(file) for file in checkpoint.raw_files()} for checkpoint in checkpoints
    ]

    def worker() -> Callable[[int, Piece], None]:
        return _Worker(checkpoints, output, combine(), settings, lanes, last, digests).do

    whole = combine().whole
    pieces = _pieces(entries, len(checkpoints), settings.threads, whole=whole)
    run(pieces, worker, settings.threads, [*lanes, *([last] if last else [])])
    if not settings.hashes:
        return {}
    sums: dict[str, str] = {}
    files = [(file, digest) for own in digests for file, digest in own.items()]

    def finish(_: int, item: tuple[RawFile, Digest]) -> None:
        sums[str(item[0].path)] = item[1].finish()

    run(files, lambda: finish, settings.threads, [])
    return sums


class _Worker:
    """The memory of one thread, and what it does with a piece."""

    def __init__(
        self,
        checkpoints: Sequence[Checkpoint],
        output: Output,
        combine: Combine,
        settings: Settings,
        lanes: Sequence[Lane],
        last: Lane | None,
        digests: Sequence[dict[RawFile, Digest]],
    ) -> None:
        self._checkpoints, self._output, self._combine, self._settings = checkpoints, output, combine, settings
        self._lanes, self._last, self._digests = lanes, last, digests
        self._memory = self._made = torch.empty(0, dtype=torch.uint8, device="cpu")

    def do(self, number: int, piece: Piece) -> None:
        """Read a piece of each input, combine them and write the result."""
        entry, sources = piece.entry, self._read(number, piece)
        if entry.combined:
            made = self._room(piece.end - piece.begin, real_of(entry))
            if (bad := self._combine(piece, sources, made)) >= 0:
                name, file = entry.names[0], str(self._checkpoints[bad].path)
                message = (
                    f"{shown(name)} in {file!r} has a NaN or an infinity; leave that file out, or let it into the "
                    "result by nonfinite='propagate' (--nonfinite propagate)"
                )
                raise NonFiniteError(message)
        else:
            made = sources[entry.chosen]
            if self._settings.integers == "equal":
                self._compare(entry, sources)
        offset = piece.begin * made.dtype.itemsize
        with self._last.turn(number) if self._last else nullcontext():
            for name in entry.names:
                self._output.write(name, offset, bytes_of(made))

    def _read(self, number: int, piece: Piece) -> list[Tensor]:
        count = piece.end - piece.begin
        sizes = [count * stored.dtype.itemsize for stored in piece.entry.sources]
        rooms = [-(-size // 64) * 64 for size in sizes]
        widens = self._combine.whole and piece.entry.combined  # the memory of one file serves all, one after the other
        need = max(rooms) if widens else sum(rooms)
        if need > len(self._memory):
            self._memory = torch.empty(need, dtype=torch.uint8, device="cpu")
        found, at = [], 0
        for index, stored in enumerate(piece.entry.sources):
            tensor = self._memory[at : at + sizes[index]].view(stored.dtype)
            at += 0 if widens else rooms[index]
            fill(stored, piece.begin, tensor)
            self._settings.progress(sizes[index])
            if self._lanes:
                data = bytes_of(tensor)
                with self._lanes[index].turn(number):
                    for file, offset, first, last in spans(stored, piece.begin, piece.end):
                        self._digests[index][file].feed(offset, data[first:last])
            found.append(tensor.to(torch.float64, copy=True) if widens else tensor)
        if widens:
            self._memory = torch.empty(0, dtype=torch.uint8, device="cpu")  # it is as large as an input
        for lane in self._lanes[len(found) :]:  # files that this tensor is not read from
            with lane.turn(number):
                pass
        return found

    def _room(self, count: int, dtype: torch.dtype) -> Tensor:
        if count * dtype.itemsize > len(self._made):
            self._made = torch.empty(count * dtype.itemsize, dtype=torch.uint8, device="cpu")
        return self._made[: count * dtype.itemsize].view(dtype)

    def _compare(self, entry: Entry, sources: Sequence[Tensor]) -> None:
        first = sources[entry.chosen]
        for index, other in enumerate(sources):
            if other.dtype != first.dtype or not torch.equal(other, first):
                names = f"{str(self._checkpoints[entry.chosen].path)!r} and {str(self._checkpoints[index].path)!r}"
                message = (
                    f"{shown(entry.names[0])} holds integers that differ between {names}; integers='last' "
                    "(--integers last) takes those of the last file"
                )
                raise MismatchError(message)


def real_of(entry: Entry) -> torch.dtype:
    """Return the dtype of the output's values, complex ones as pairs."""
    if entry.dtype.is_complex:
        return {4: torch.float16, 8: torch.float32}.get(entry.dtype.itemsize, torch.float64)
    return entry.dtype


def _pieces(entries: Sequence[Entry], files: int, threads: int, *, whole: bool) -> Iterator[Piece]:
    most = max(_LEAST, min(_LARGEST, _MEMORY // (threads * files)))
    for entry in entries:
        count = math.prod(entry.sources[0].shape)
        together = (whole and entry.combined) or any(stored.boxes for stored in entry.sources)
        step = count if together else most // max(stored.dtype.itemsize for stored in entry.sources)
        for begin in range(0, count, max(1, step)):
            yield Piece(entry, begin, min(count, begin + step))
