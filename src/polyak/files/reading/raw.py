"""Regular files read at any offset by several threads, and the places where tensors lie in them."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, NamedTuple

from polyak.errors import MissingFileError, StateError
from polyak.io.atomic import open_regular

if TYPE_CHECKING:
    from pathlib import Path
    from typing import IO

    import torch

__all__ = ["Box", "Part", "RawFile", "Stored"]

_OPEN = 200  # files of all checkpoints that are kept open; a process may often have 1,024


class RawFile:
    """A file that is read by ``pread``: no memory map, no position, and so no lock between threads.

    Attributes:
        path: The file.
        size: Its bytes when it was opened.

    Raises:
        MissingFileError: If there is no such file.
        StateError: If it cannot be read, or is no regular file.
    """

    _open_now: ClassVar[int] = 0

    def __init__(self, path: Path) -> None:
        self.path, self._kept = path, -1
        with self._open() as opened:
            about = os.fstat(opened.fileno())
            self.size, self._identity = about.st_size, _identity(about)
            if RawFile._open_now < _OPEN:
                RawFile._open_now += 1
                self._kept = os.dup(opened.fileno())

    def read(self, size: int, offset: int) -> bytes:
        """Return bytes; fewer at the end of the file.

        Raises:
            StateError: If it cannot be read.
        """
        into = memoryview(bytearray(max(0, min(size, self.size - offset))))
        self.read_into(into, offset)
        return bytes(into)

    def read_into(self, into: memoryview, offset: int) -> None:
        """Fill memory with the bytes from an offset on.

        Raises:
            StateError: If the file ends before, has changed or cannot be read.
        """
        try:
            if self._kept >= 0:
                self._fill(self._kept, into, offset)
                return
            with self._open() as again:
                if _identity(os.fstat(again.fileno())) != self._identity:
                    message = f"{str(self.path)!r} was replaced while it was read; start again"
                    raise StateError(message)
                self._fill(again.fileno(), into, offset)
        except OSError as error:
            message = f"{str(self.path)!r} cannot be read: {error.strerror or error}"
            raise StateError(message) from error

    def is_same(self, other: os.stat_result) -> bool:
        """Return whether a path leads to this file."""
        return self._identity[:2] == _identity(other)[:2]

    def close(self) -> None:
        """Close it; idempotent."""
        if self._kept >= 0:
            RawFile._open_now -= 1
            kept, self._kept = self._kept, -1  # Ctrl-C after the close must not let it be closed twice
            os.close(kept)

    def __del__(self) -> None:
        self.close()

    def _fill(self, descriptor: int, into: memoryview, offset: int) -> None:
        done = 0
        while done < len(into):
            read = os.preadv(descriptor, [into[done:]], offset + done)
            if not read:
                message = f"{str(self.path)!r} was cut off while it was read; start again"
                raise StateError(message)
            done += read

    def _open(self) -> IO[bytes]:
        try:
            return open_regular(self.path, buffering=0)
        except FileNotFoundError:
            message = f"there is no file {str(self.path)!r}"
            raise MissingFileError(message) from None
        except OSError as error:
            message = f"{str(self.path)!r} cannot be read: {error.strerror or error}"
            raise StateError(message) from error


class Part(NamedTuple):
    """Values of a tensor that lie in a file one after the other.

    Attributes:
        file: The file.
        offset: Where they begin in it, in bytes.
        begin: The index of the first of them in the flat tensor.
        end: The index behind the last.
    """

    file: RawFile
    offset: int
    begin: int
    end: int


class Box(NamedTuple):
    """Values of a tensor in a file that are no range of the flat tensor: a view with strides, or a rank's columns.

    Attributes:
        file: The file.
        offset: Where the first of them is, in bytes.
        starts: Its index in the tensor.
        shape: The shape of the box.
        stride: The distance in values between neighbours of each dimension, in the file.
    """

    file: RawFile
    offset: int
    starts: tuple[int, ...]
    shape: tuple[int, ...]
    stride: tuple[int, ...]


@dataclass(frozen=True)
class Stored:
    """Where a tensor lies.

    Attributes:
        dtype: Its dtype.
        shape: Its shape.
        parts: Ranges that cover it in order, if it can be read in pieces.
        boxes: What covers it otherwise: it is read whole.
    """

    dtype: torch.dtype
    shape: tuple[int, ...]
    parts: tuple[Part, ...] = ()
    boxes: tuple[Box, ...] = ()

    @property
    def place(self) -> tuple[object, ...]:
        """What two names of one tensor have in common."""
        return self.dtype, self.shape, self.parts, self.boxes

    @property
    def files(self) -> list[RawFile]:
        """The files that it lies in."""
        return [part.file for part in self.parts] + [box.file for box in self.boxes]

    @property
    def begin(self) -> tuple[str, int]:
        """The file in which it begins, and where."""
        for part in self.parts:
            return str(part.file.path), part.offset
        for box in self.boxes:
            return str(box.file.path), box.offset
        return "", 0


def _identity(about: os.stat_result) -> tuple[int, ...]:
    return about.st_dev, about.st_ino, about.st_size, about.st_mtime_ns
