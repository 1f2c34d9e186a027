"""A file as ``torch.save`` writes it, of a dictionary of tensors, in pieces."""

from __future__ import annotations

import io
import json
import math
import os
import pickle
import struct
import zlib
from collections import OrderedDict
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from polyak.files.writing.safetensors import write_at

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

__all__ = ["TorchOutput"]

_ROOT = "archive"
_ALIGNMENT = 64
_LOCAL = struct.Struct("<4s5H3I2H")
_CENTRAL = struct.Struct("<4s6H3I5H2I")
_END = struct.Struct("<4s4H2IH")
_END64 = struct.Struct("<4sQ2H2I4Q")
_LOCATOR = struct.Struct("<4sIQI")
_ZIP64 = struct.Struct("<2H2Q")
_DATE = 0x21  # the first of January 1980: the same bytes each time
_FULL = 0xFFFFFFFF


class _Record(NamedTuple):
    name: bytes
    header: int
    data: int
    size: int


class TorchOutput:
    """A zip archive with room for its tensors, which ``torch.load(weights_only=True)`` reads.

    Args:
        file: The file, which is new.
        tensors: Name, dtype and shape of each tensor, in the order in which they are written.
        tied: Names that share the memory of another: each name, and that other one.
        texts: Metadata as long as those that ``finish`` gets.
    """

    ordered = True  # a checksum of each tensor

    def __init__(
        self,
        file: Path,
        tensors: Sequence[tuple[str, torch.dtype, tuple[int, ...]]],
        tied: Mapping[str, str],
        texts: Mapping[str, str],
    ) -> None:
        self._records: list[_Record] = []
        self._sums: dict[int, int] = {}
        self._of: dict[str, int] = {}
        self._end = 0
        small = {
            "data.pkl": _pickled(tensors, tied),
            "byteorder": b"little",
            "version": b"3\n",
            "polyak.json": _told(texts),
        }
        places = {name: self._room(name, len(data)) for name, data in small.items()}
        for name, dtype, shape in tensors:
            if name not in tied:
                size = math.prod(shape) * dtype.itemsize
                self._of[name] = self._room(f"data/{len(self._of)}", size)
        self._told = places["polyak.json"]
        self._file = os.open(file, os.O_RDWR | os.O_CREAT | os.O_TRUNC | getattr(os, "O_BINARY", 0), 0o666)
        for name, number in places.items():
            self._write(number, 0, memoryview(small[name]))

    def write(self, name: str, offset: int, data: memoryview) -> None:
        """Write bytes of a tensor, those before them written; those of a tied name are written once."""
        if name in self._of:
            self._write(self._of[name], offset, data)

    def finish(self, texts: Mapping[str, str]) -> None:
        """Write the metadata and the directory."""
        self._sums[self._told] = 0
        self._write(self._told, 0, memoryview(_told(texts)))
        directory = bytearray()
        for number, record in enumerate(self._records):
            total = self._sums.get(number, 0)
            local = _LOCAL.pack(
                b"PK\x03\x04", 45, 1 << 11, 0, 0, _DATE, total, _FULL, _FULL, len(record.name), _extra_length(record)
            )
            extra = _ZIP64.pack(1, 16, record.size, record.size)
            padding = _extra_length(record) - len(extra) - 4
            extra += struct.pack("<2H", 0x4246, padding) + b"Z" * padding
            write_at(self._file, memoryview(local + record.name + extra), record.header)
            far = struct.pack("<2H3Q", 1, 24, record.size, record.size, record.header)
            directory += _CENTRAL.pack(
                b"PK\x01\x02", 45, 45, 1 << 11, 0, 0, _DATE, total, _FULL, _FULL, len(record.name), len(far),
                0, 0, 0, 0, _FULL,
            ) + record.name + far  # fmt: skip
        count, at = len(self._records), self._end
        tail = _END64.pack(b"PK\x06\x06", 44, 45, 45, 0, 0, count, count, len(directory), at)
        tail += _LOCATOR.pack(b"PK\x06\x07", 0, at + len(directory), 1)
        short = min(count, 0xFFFF)
        tail += _END.pack(b"PK\x05\x06", 0, 0, short, short, min(len(directory), _FULL), min(at, _FULL), 0)
        write_at(self._file, memoryview(bytes(directory) + tail), at)

    def close(self) -> None:
        """Close the file; idempotent."""
        if self._file >= 0:
            os.close(self._file)
            self._file = -1

    def _room(self, name: str, size: int) -> int:
        full = f"{_ROOT}/{name}".encode()
        header = self._end
        least = header + _LOCAL.size + len(full) + _ZIP64.size + 4
        data = -(-least // _ALIGNMENT) * _ALIGNMENT
        self._records.append(_Record(full, header, data, size))
        self._end = data + size
        return len(self._records) - 1

    def _write(self, number: int, offset: int, data: memoryview) -> None:
        self._sums[number] = zlib.crc32(data, self._sums.get(number, 0))
        write_at(self._file, data, self._records[number].data + offset)


def _told(texts: Mapping[str, str]) -> bytes:
    return json.dumps({**texts}).encode()


def _extra_length(record: _Record) -> int:
    return record.data - record.header - _LOCAL.size - len(record.name)


class _Storage(NamedTuple):
    """Stands for a storage in the pickle."""

    saved: tuple[Any, ...]


class _Tensor:
    """Stands for a tensor in the pickle."""

    def __init__(self, storage: _Storage, shape: tuple[int, ...]) -> None:
        self._storage, self._shape = storage, shape

    def __reduce__(self) -> tuple[Any, ...]:
        stride = torch.empty(self._shape, device="meta").stride()
        return torch._utils._rebuild_tensor_v2, (self._storage, 0, self._shape, stride, False, OrderedDict())  # noqa: SLF001 - what torch.save writes


class _Pickler(pickle.Pickler):
    def persistent_id(self, value: Any) -> Any:  # noqa: ANN401 - any plain value
        return value.saved if isinstance(value, _Storage) else None


def _pickled(tensors: Sequence[tuple[str, torch.dtype, tuple[int, ...]]], tied: Mapping[str, str]) -> bytes:
    made: OrderedDict[str, Any] = OrderedDict()
    shared = 0
    for name, dtype, shape in tensors:
        if name in tied:
            made[name], shared = made[tied[name]], shared + 1
            continue
        made[name] = _stand_in(dtype, shape, str(len(made) - shared))
    file = io.BytesIO()
    pickler = _Pickler(file, protocol=2)
    pickler.dump(made)
    return file.getvalue()


def _stand_in(dtype: torch.dtype, shape: tuple[int, ...], key: str) -> Any:  # noqa: ANN401 - any plain value
    kinds = torch.storage._dtype_to_storage_type_map()  # noqa: SLF001 - what torch.save writes
    if dtype in kinds:
        kind = getattr(torch, kinds[dtype])
        return _Tensor(_Storage(("storage", kind, key, "cpu", math.prod(shape))), shape)
    return _OfType(
        _Storage(("storage", torch.UntypedStorage, key, "cpu", math.prod(shape) * dtype.itemsize)), shape, dtype
    )


class _OfType:
    """Stands for a tensor whose dtype has no class of storages."""

    def __init__(self, storage: _Storage, shape: tuple[int, ...], dtype: torch.dtype) -> None:
        self._storage, self._shape, self._dtype = storage, shape, dtype

    def __reduce__(self) -> tuple[Any, ...]:
        stride = torch.empty(self._shape, device="meta").stride()
        made: tuple[Any, ...] = (self._storage, 0, self._shape, stride, False, OrderedDict(), self._dtype)
        return torch._utils._rebuild_tensor_v3, made  # noqa: SLF001 - what torch.save writes
