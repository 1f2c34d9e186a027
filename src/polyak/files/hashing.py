"""The sha256 of files, taken from the pieces that are read anyway."""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from polyak.files.reading.raw import RawFile

__all__ = ["Digest"]

_PIECE = 1 << 20


class Digest:
    """The running sha256 of a file. Pieces that come in order cost no second read; gaps are read when they appear."""

    def __init__(self, file: RawFile) -> None:
        self._file, self._position = file, 0
        self._sha = hashlib.sha256()

    def feed(self, offset: int, data: memoryview) -> None:
        """Take a piece that was read."""
        if offset > self._position:
            self._read_to(offset)
        if offset == self._position:
            self._sha.update(data)
            self._position += len(data)

    def finish(self) -> str:
        """Return the digest of the whole file, of which the rest is read now."""
        self._read_to(self._file.size)
        return self._sha.hexdigest()

    def _read_to(self, end: int) -> None:
        buffer = memoryview(bytearray(min(_PIECE, max(0, end - self._position))))
        while self._position < end:
            piece = buffer[: end - self._position]
            self._file.read_into(piece, self._position)
            self._sha.update(piece)
            self._position += len(piece)
