"""Parts of files as streams, of which no more is read than there is, whatever lengths a file claims."""

from __future__ import annotations

import io
from typing import IO, TYPE_CHECKING, Any

from typing_extensions import override

if TYPE_CHECKING:
    from polyak.files.reading.raw import RawFile

__all__ = ["Bounded", "Window"]

_LARGEST = 1 << 28  # bytes of a pickle, which holds no tensor


class Bounded:
    """A file of which no more than a bounded part is read, whatever lengths a pickle in it claims."""

    def __init__(self, file: IO[bytes], most: int = _LARGEST) -> None:
        self._file, self._left = file, most

    def read(self, size: int) -> bytes:
        """Return the next bytes.

        Raises:
            ValueError: If more are asked for than a pickle without tensors has.
        """
        self._spend(size)
        return self._file.read(size)

    def readline(self) -> bytes:
        """Return the rest of a line."""
        line = self._file.readline(self._left + 1)
        self._spend(len(line))
        return line

    def tell(self) -> int:
        """Return the position in the file."""
        return self._file.tell()

    def _spend(self, size: int) -> None:
        self._left -= size
        if self._left < 0:
            message = "its pickle is larger than one that holds no tensor"
            raise ValueError(message)


class Window(io.RawIOBase):
    """A part of a file as a file."""

    def __init__(self, file: RawFile, begin: int, size: int) -> None:
        super().__init__()
        self._file, self._begin, self._position = file, begin, 0
        self.size = size

    @override
    def readable(self) -> bool:
        return True

    @override
    def seekable(self) -> bool:
        return True

    @override
    def seek(self, offset: int, whence: int = 0) -> int:
        base = (0, self._position, self.size)[whence]
        if base + offset < 0:
            message = "a position before the beginning"
            raise ValueError(message)
        self._position = base + offset
        return self._position

    @override
    def tell(self) -> int:
        return self._position

    @override
    def read(self, size: int = -1) -> bytes:
        rest = max(0, self.size - self._position)
        found = self._file.read(rest if size < 0 else min(size, rest), self._begin + self._position)
        self._position += len(found)
        return found

    @override
    def readinto(self, into: Any) -> int:
        view = memoryview(into).cast("B")
        count = max(0, min(len(view), self.size - self._position))
        self._file.read_into(view[:count], self._begin + self._position)
        self._position += count
        return count
