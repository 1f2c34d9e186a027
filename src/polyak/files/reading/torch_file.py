"""What ``torch.save`` wrote, as a zip archive or in the older format: the dictionary, and where each storage lies."""

from __future__ import annotations

import io
import math
import struct
import zipfile
from typing import IO, TYPE_CHECKING, cast

from polyak.errors import StateError
from polyak.errors.formatting import shown
from polyak.files.reading.machine import interpret
from polyak.files.reading.meanings import Memory, Opaque, View, dtype_of_storage
from polyak.files.reading.raw import Box, Part, Stored
from polyak.files.reading.streams import Bounded, Window

if TYPE_CHECKING:
    from collections.abc import Mapping

    from polyak.files.reading.meanings import Saved
    from polyak.files.reading.raw import RawFile

__all__ = ["MAGIC", "Archive", "is_zip", "read_archive", "read_legacy"]

MAGIC = 0x1950A86A20F9469CFC6C  # the first pickle of a file of the older format
_STRANGE = "it is neither a safetensors file nor one of torch.save"
_PROTOCOL = 1001
_HEAD = struct.Struct("<4s22x2H")  # of a local file header: its signature, the lengths of name and extra field
_LARGEST = 1 << 28  # bytes of the pickle
_EXPANDED = 1 << 28  # bytes of a tensor whose values are repeated by a stride of 0
_LONGEST = 1 << 16  # bytes of the pickles before the dictionary, in the older format


class Archive:
    """A dictionary, and the offset of each storage.

    Attributes:
        value: What was saved, its tensors as views of storages.
        texts: The metadata that polyak wrote next to it.
        foreign: The classes that it names and that were not loaded.
    """

    def __init__(
        self,
        file: RawFile,
        value: Saved,
        offsets: Mapping[str, int],
        texts: Mapping[str, str],
        foreign: set[str],
    ) -> None:
        self._file, self._offsets = file, offsets
        self.value, self.texts, self.foreign = value, texts, foreign

    def stored(self, view: View) -> Stored:
        """Return where a tensor lies.

        Raises:
            ValueError: If its storage is not in the file.
        """
        begin = self._offsets.get(view.memory.key)
        if begin is None:
            message = f"its storage {shown(view.memory.key)} is missing"
            raise ValueError(message)
        offset = begin + view.offset * view.dtype.itemsize
        if _is_contiguous(view):
            return Stored(view.dtype, view.shape, (Part(self._file, offset, 0, math.prod(view.shape)),))
        if math.prod(view.shape) * view.dtype.itemsize > max(_EXPANDED, view.memory.numel * view.memory.dtype.itemsize):
            message = f"a tensor of shape {shown(view.shape)} repeats the values of a small storage too often"
            raise ValueError(message)
        box = Box(self._file, offset, (0,) * len(view.shape), view.shape, view.stride)
        return Stored(view.dtype, view.shape, boxes=(box,))


def is_zip(file: RawFile) -> bool:
    """Return whether a file begins like a zip archive."""
    return file.read(4, 0) == b"PK\x03\x04"


def read_archive(file: RawFile, begin: int = 0, size: int | None = None) -> Archive:
    """Return the contents of a zip archive of ``torch.save``.

    Args:
        file: The file.
        begin: Where the archive begins in it.
        size: Its bytes. Defaults to the rest of the file.

    Raises:
        StateError: If its pickle is malicious.
        ValueError: If it is no such archive, or damaged.
    """
    window = Window(file, begin, file.size - begin if size is None else size)
    try:
        with zipfile.ZipFile(window) as archive:
            records = {record.filename: record for record in archive.infolist()}
    except (zipfile.BadZipFile, NotImplementedError, struct.error, UnicodeError, OverflowError) as error:
        message = f"it is no whole zip archive ({error})"
        raise ValueError(message) from error
    root = _root(records)
    if any(record.compress_type != zipfile.ZIP_STORED for record in records.values()):
        message = "its records are compressed, which torch.save never does; unpack it, or save it again by torch.save"
        raise ValueError(message)
    at = {name: _data(window, record) for name, record in records.items()}
    if (order := _record(window, records, at, f"{root}byteorder", 16)) not in {b"", b"little"}:
        message = f"its byte order is {shown(order)}; expected little-endian values. Load and save it on such a machine"
        raise ValueError(message)
    sizes: dict[str, int] = {}

    def storage(saved: Saved) -> Memory | Opaque:
        memory = _memory(saved, 5)
        record = records.get(f"{root}data/{memory.key}")
        if record is None or record.file_size < memory.numel * memory.dtype.itemsize:
            message = f"its storage {shown(memory.key)} is missing or cut off"
            raise ValueError(message)
        sizes[memory.key] = record.file_size
        return memory

    pickled = _record(window, records, at, f"{root}data.pkl", _LARGEST)
    foreign: set[str] = set()
    value = interpret(Bounded(io.BytesIO(pickled)), storage, foreign)
    offsets = {key: begin + at[f"{root}data/{key}"] for key in sizes}
    texts = _record(window, records, at, f"{root}polyak.json", _LARGEST)
    return Archive(file, value, offsets, {"polyak": texts.decode("utf-8", "replace")} if texts else {}, foreign)


def read_legacy(file: RawFile) -> Archive:
    """Return the contents of a file of the older format; its storages follow the pickles, each behind its length.

    Raises:
        StateError: If its pickle is malicious.
        ValueError: If it is no such file, or damaged.
    """
    stream = cast("IO[bytes]", io.BufferedReader(Window(file, 0, file.size)))
    try:
        first = _few(stream, _LONGEST)
    except ValueError as error:
        if isinstance(error, StateError):  # it is malicious
            raise
        first = None
    if first != MAGIC:
        message = "it is a pickle, but torch.save did not write it" if first is not None else _STRANGE
        raise ValueError(message)
    protocol, about = _few(stream, _LONGEST), _few(stream, _LONGEST)
    if protocol != _PROTOCOL or not isinstance(about, dict) or about.get("little_endian") is not True:
        message = f"its protocol is {shown(protocol)} on {shown(about)}; expected little-endian values of protocol 1001"
        raise ValueError(message)
    memories: dict[str, Memory] = {}

    def storage(saved: Saved) -> Memory | Opaque:
        if isinstance(saved, tuple) and saved[:1] == ("module",):
            return Opaque("a module with its source")
        memory = _memory(saved, 6)
        memories[memory.key] = memory._replace(part=0)
        return memory

    foreign: set[str] = set()
    value = interpret(Bounded(stream, _LARGEST), storage, foreign)
    keys = interpret(Bounded(stream, _LARGEST), _no_storage)
    return Archive(file, value, _legacy_offsets(file, stream.tell(), keys, memories), {}, foreign)


def _legacy_offsets(file: RawFile, begin: int, keys: Saved, memories: Mapping[str, Memory]) -> dict[str, int]:
    offsets = {}
    if not isinstance(keys, list):
        message = "it does not name its storages"
        raise ValueError(message)  # noqa: TRY004 - a damaged file
    for key in keys:
        memory = memories.get(key) if isinstance(key, str) else None
        numel = int.from_bytes(file.read(8, begin), "little")
        if memory is None or numel < memory.numel:
            message = f"its storage {shown(key)} is unknown or cut off"
            raise ValueError(message)
        offsets[memory.key] = begin + 8
        begin += 8 + numel * memory.dtype.itemsize
        if begin > file.size:
            message = f"it is cut off: its last {begin - file.size} bytes are missing"
            raise ValueError(message)
    return offsets


def _memory(saved: Saved, parts: int) -> Memory:
    if not isinstance(saved, tuple) or len(saved) != parts or saved[0] != "storage":
        message = f"its pickle names {shown(saved)} as a storage"
        raise ValueError(message)
    _, kind, key, _, numel, *view = saved
    part = view[0][1] if view and isinstance(view[0], tuple) and len(view[0]) == 3 else 0  # noqa: PLR2004 - key, offset, size
    if not isinstance(key, (str, int)) or type(numel) is not int or type(part) is not int or min(numel, part) < 0:
        message = f"its pickle names {shown(saved)} as a storage"
        raise ValueError(message)
    return Memory(str(key), dtype_of_storage(kind), numel, part)


def _no_storage(saved: Saved) -> Memory:
    message = f"its pickle names {shown(saved)} where no storage is expected"
    raise ValueError(message)


def _few(stream: IO[bytes], most: int) -> Saved:
    return interpret(Bounded(stream, most), _no_storage)


def _root(records: Mapping[str, zipfile.ZipInfo]) -> str:
    pickles = [name for name in records if name.endswith("/data.pkl") and name.count("/") == 1]
    if any(name.endswith(("/constants.pkl", "/extern_modules")) for name in records):
        message = (
            "it is TorchScript or a package, a program with weights: load it by torch.jit.load on a machine that "
            "trusts it, and save its state_dict()"
        )
        raise ValueError(message)
    if len(pickles) != 1:
        message = f"it is a zip archive, but none of torch.save (it holds {shown(sorted(records)[:4])})"
        raise ValueError(message)
    return pickles[0].removesuffix("data.pkl")


def _record(
    window: Window, records: Mapping[str, zipfile.ZipInfo], at: Mapping[str, int], name: str, most: int
) -> bytes:
    record = records.get(name)
    if record is None:
        return b""
    if record.file_size > most:
        message = f"its record {shown(name)} has {record.file_size} bytes, more than a dictionary without values has"
        raise ValueError(message)
    window.seek(at[name])
    return window.read(record.file_size)


def _data(window: Window, record: zipfile.ZipInfo) -> int:
    window.seek(record.header_offset)
    head = window.read(_HEAD.size)
    if len(head) < _HEAD.size or head[:4] != b"PK\x03\x04":
        message = f"its record {shown(record.filename)} is not where its directory says"
        raise ValueError(message)
    _, name, extra = _HEAD.unpack(head)
    begin: int = record.header_offset + _HEAD.size + name + extra
    if begin + record.file_size > window.size:
        message = f"its record {shown(record.filename)} is cut off"
        raise ValueError(message)
    return begin


def _is_contiguous(view: View) -> bool:
    wanted = 1
    for size, step in zip(reversed(view.shape), reversed(view.stride), strict=True):
        if size > 1 and step != wanted:  # the stride of a dimension of one value may be anything
            return 0 in view.shape
        wanted *= size
    return True
