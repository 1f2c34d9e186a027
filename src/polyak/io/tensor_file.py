"""Safetensors files: written with checksums, and read one tensor at a time into memory of its own."""

from __future__ import annotations

import json
import math
import os
from contextlib import nullcontext
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, NamedTuple, NoReturn
from zlib import crc32

import torch

from polyak.errors import MissingFileError, StateError
from polyak.errors.formatting import shown
from polyak.io.atomic import open_regular, write_whole
from polyak.io.checksums import bytes_of, first_sum, read_checksums, with_checksums

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping
    from contextlib import AbstractContextManager

    from torch import Tensor

__all__ = ["Scratch", "TensorFile", "write_tensors"]

_LENGTH = 8  # bytes at the beginning: the length of the header, little-endian
_LARGEST = 100_000_000  # bytes of a header, by the format's own definition
_HUGE = 2**63  # no tensor has so many values
_PIECE = 1 << 20  # bytes that are read and summed at a time: they stay in the processor's cache
_DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool,
    "U64": torch.uint64, "U32": torch.uint32, "U16": torch.uint16, "C64": torch.complex64,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E4M3FNUZ": torch.float8_e4m3fnuz,
    "F8_E5M2": torch.float8_e5m2, "F8_E5M2FNUZ": torch.float8_e5m2fnuz,
}  # fmt: skip
_CODES = {dtype: code for code, dtype in _DTYPES.items()}


class _About(NamedTuple):
    """What the header says of a tensor: its bytes are those from ``begin`` to ``end`` after it."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    begin: int
    end: int


class Scratch:
    """Memory for one tensor after the other: allocated again each time, memory gets fragmented and grows."""

    def __init__(self) -> None:
        self._bytes = torch.empty(0, dtype=torch.uint8, device="cpu")

    def tensor(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """Return a tensor with any values, valid until the next one is asked for."""
        size = math.prod(shape) * dtype.itemsize
        if size > len(self._bytes):
            self._bytes = torch.empty(size, dtype=torch.uint8, device="cpu")
        return self._bytes[:size].view(dtype).reshape(shape)


class TensorFile:
    """Reads tensors from a safetensors file by plain reads.

    The package safetensors maps files into memory: reading one tensor of each of many files then holds all of
    them, as every tool that watches memory sees it. Here a tensor costs its own size. It is compared with its checksum
    the first time that it is read; files without checksums are read as they are.

    Attributes:
        path: The file.
        metadata: Its texts.
        names: What it holds.

    Args:
        path: The file.
        opened: The open file, where others may replace it while it is read.

    Raises:
        StateError: If it is missing, damaged or cut off.
    """

    def __init__(self, path: str | os.PathLike[str], opened: IO[bytes] | None = None) -> None:
        self.path, self._opened = Path(path), opened
        self._checked: set[str] = set()
        try:
            with self._file() as file:
                length = int.from_bytes(file.read(_LENGTH), "little")
                header: dict[str, Any] = json.loads(file.read(min(length, _LARGEST)))
                size = os.fstat(file.fileno()).st_size
            self.metadata: Mapping[str, str] = _texts(header.pop("__metadata__", {}))
            self._about = {name: _about(raw) for name, raw in header.items()}
            self._checksums = read_checksums(self.metadata, self._about)
            self._begin = _LENGTH + length
            missing = self._begin + _end(self._about.values()) - size
        except FileNotFoundError:
            message = f"there is no file {str(path)!r}"
            raise MissingFileError(message) from None
        except OSError as error:
            message = f"{str(path)!r} cannot be read: {error.strerror or error}"
            raise StateError(message) from error
        except (ValueError, AttributeError, KeyError, TypeError, RecursionError) as error:
            self._refuse("its header cannot be read", error)
        if missing > 0:
            message = f"{str(path)!r} is cut off: its last {missing} bytes are missing. Use an earlier file."
            raise StateError(message)
        if missing < 0:
            self._refuse(f"it has {-missing} bytes more than its tensors")

    @property
    def names(self) -> list[str]:
        """The names of its tensors."""
        return [*self._about]

    def shape(self, name: str) -> tuple[int, ...]:
        """Return the shape of a tensor, which is not read."""
        return self._about[name].shape

    def dtype(self, name: str) -> torch.dtype:
        """Return the dtype of a tensor, which is not read."""
        return self._about[name].dtype

    def read(self, name: str, scratch: Scratch | None = None) -> Tensor:
        """Return a tensor; in the scratch memory where that is given.

        Raises:
            StateError: If the file is cut off or gone, or the tensor is not what was written.
        """
        about = self._about[name]
        tensor = (scratch or Scratch()).tensor(about.shape, about.dtype)
        checks = self._checksums is not None and name not in self._checked
        found = first_sum(about.dtype, about.shape)
        into, done = bytes_of(tensor), 0
        try:
            with self._file() as file:
                file.seek(self._begin + about.begin)
                while done < len(into):
                    piece = into[done : done + _PIECE]
                    if not (read := file.readinto(piece)):  # type: ignore[attr-defined]  # an unbuffered file has it
                        message = f"{str(self.path)!r} was cut off while it was read"
                        raise StateError(message)
                    found, done = crc32(piece[:read], found) if checks else 0, done + read
        except OSError as error:
            message = f"{str(self.path)!r} cannot be read: {error}"
            raise StateError(message) from error
        if self._checksums is not None and checks:
            if found != self._checksums[name]:
                self._refuse(f"the tensor {shown(name)} is not what was written; its checksum differs")
            self._checked.add(name)
        return tensor

    def _file(self) -> AbstractContextManager[IO[bytes]]:
        if self._opened is None:
            return open_regular(self.path, buffering=0)
        self._opened.seek(0)
        return nullcontext(self._opened)

    def _refuse(self, reason: str, cause: BaseException | None = None) -> NoReturn:
        message = f"{str(self.path)!r} is damaged, incomplete or no safetensors file: {reason}. Use an earlier file."
        raise StateError(message) from cause


def write_tensors(
    file: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str], sums: Mapping[str, int] | None = None
) -> None:
    """Write a safetensors file with the checksums of its tensors and texts; it is whole or absent.

    Args:
        file: The file.
        tensors: The tensors, of which no two share memory.
        metadata: The texts.
        sums: The checksums of some of the tensors. Defaults to none.

    Raises:
        WriteError: If it cannot be written, as on a full disk.
    """
    packed = {name: tensor.detach().cpu().resolve_neg().contiguous() for name, tensor in tensors.items()}
    texts = with_checksums(metadata, packed, sums)
    write_whole(file, lambda scratch: _write(scratch, packed, texts))


def _write(file: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """Write a file; unlike the package's, it is the same bytes each time, and its errors come from the disk."""
    header: dict[str, Any] = {"__metadata__": metadata}
    # Long dtypes first, so that each tensor begins at a multiple of its values' size.
    names, end = sorted(tensors, key=lambda name: (-tensors[name].dtype.itemsize, name)), 0
    for name in names:
        tensor, begin = tensors[name], end
        end += tensor.nbytes
        header[name] = {"dtype": _CODES[tensor.dtype], "shape": [*tensor.shape], "data_offsets": [begin, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % _LENGTH)
    parts: list[bytes | memoryview] = [len(text).to_bytes(_LENGTH, "little"), text]
    parts += [bytes_of(tensors[name]) for name in names]
    with file.open("wb", buffering=0) as written:
        for part in parts:
            rest = memoryview(part)
            while rest:  # a plain write may take a part only
                rest = rest[written.write(rest) :]


def _texts(raw: Any) -> Mapping[str, str]:  # noqa: ANN401 - a part of a header
    texts = dict(raw)
    if not all(type(text) is str for text in texts.values()):
        message = "a text in the metadata is none"
        raise TypeError(message)
    return texts


def _about(raw: Mapping[str, Any]) -> _About:
    dtype, shape, (begin, end) = _DTYPES[raw["dtype"]], tuple(raw["shape"]), raw["data_offsets"]
    sizes = (begin, end, *shape)
    whole = all(type(size) is int and size >= 0 for size in sizes) and math.prod(max(1, n) for n in shape) < _HUGE
    if not whole or end - begin != math.prod(shape) * dtype.itemsize:
        message = f"bytes {shown(begin)} to {shown(end)} are no tensor of {dtype} and shape {shown(shape)}"
        raise ValueError(message)
    return _About(dtype, shape, begin, end)


def _end(abouts: Iterable[_About]) -> int:
    """Return the end of the last tensor.

    Raises:
        ValueError: If two tensors overlap, which would take more memory than the file, or leave a hole.
    """
    end = 0
    for about in sorted(abouts, key=lambda about: (about.begin, about.end)):
        if about.begin != end:
            message = f"a tensor begins at byte {about.begin}, and the one before it ends at byte {end}"
            raise ValueError(message)
        end = about.end
    return end
