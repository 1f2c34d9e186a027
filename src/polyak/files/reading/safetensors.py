"""Safetensors files: the header, and where each tensor lies."""

from __future__ import annotations

import json
import math
from typing import TYPE_CHECKING, Any

import torch

from polyak.errors.formatting import shown
from polyak.files.reading.found import Found
from polyak.files.reading.raw import Part, Stored

if TYPE_CHECKING:
    from collections.abc import Mapping

    from polyak.files.reading.raw import RawFile

__all__ = ["CODES", "LENGTH", "is_safetensors", "read_safetensors"]

LENGTH = 8  # bytes at the beginning: the length of the header, little-endian
_LARGEST = 100_000_000  # bytes of a header, by the format's own definition
_HUGE = 2**62
_DIMENSIONS = 64
CODES = {
    torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16",
    torch.int64: "I64", torch.int32: "I32", torch.int16: "I16", torch.int8: "I8", torch.uint8: "U8", torch.bool: "BOOL",
    torch.uint64: "U64", torch.uint32: "U32", torch.uint16: "U16", torch.complex64: "C64",
    torch.float8_e4m3fn: "F8_E4M3", torch.float8_e4m3fnuz: "F8_E4M3FNUZ",
    torch.float8_e5m2: "F8_E5M2", torch.float8_e5m2fnuz: "F8_E5M2FNUZ",
}  # fmt: skip
_DTYPES = {code: dtype for dtype, code in CODES.items()}


def is_safetensors(file: RawFile) -> bool:
    """Return whether a file begins like one."""
    start = file.read(LENGTH + 1, 0)
    return start[LENGTH:] == b"{" and 0 < int.from_bytes(start[:LENGTH], "little") <= _LARGEST


def read_safetensors(file: RawFile) -> Found:
    """Return the contents of a file.

    Raises:
        ValueError: If it is damaged.
    """
    length = int.from_bytes(file.read(LENGTH, 0), "little")
    if length > file.size - LENGTH:
        message = f"it is cut off: its header has {length} bytes, and the file {file.size}"
        raise ValueError(message)
    header: Any = json.loads(file.read(length, LENGTH), object_pairs_hook=_once)
    if not isinstance(header, dict):
        message = "its header is no table"
        raise ValueError(message)  # noqa: TRY004 - a damaged file
    texts = _texts(header.pop("__metadata__", None))
    begin = LENGTH + length
    abouts = {name: _about(name, raw) for name, raw in header.items()}
    _check_ranges(abouts, file.size - begin)
    tensors = {
        name: Stored(dtype, shape, (Part(file, begin + start, 0, math.prod(shape)),))
        for name, (dtype, shape, start, _) in abouts.items()
    }
    return Found("safetensors", tensors, texts=texts)


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    table = dict(pairs)
    if len(table) != len(pairs):
        message = "its header names a tensor twice"
        raise ValueError(message)
    return table


def _texts(raw: Any) -> Mapping[str, str]:  # noqa: ANN401 - any plain value
    texts = raw or {}
    if not isinstance(texts, dict) or not all(type(text) is str for text in texts.values()):
        message = "its metadata are no texts"
        raise ValueError(message)
    return texts


def _about(name: str, raw: Any) -> tuple[torch.dtype, tuple[int, ...], int, int]:  # noqa: ANN401 - any plain value
    if not isinstance(raw, dict) or not {"dtype", "shape", "data_offsets"} <= raw.keys():
        message = f"what its header says of {shown(name)} is incomplete"
        raise ValueError(message)
    code, shape, offsets = raw["dtype"], raw["shape"], raw["data_offsets"]
    if not isinstance(code, str) or code not in _DTYPES:
        message = f"the tensor {shown(name)} has the dtype {shown(code)}, which is of quantised or future files"
        raise ValueError(message)
    lists = isinstance(shape, list) and isinstance(offsets, list) and len(offsets) == 2 and len(shape) <= _DIMENSIONS  # noqa: PLR2004 - begin and end
    if not lists or not all(type(n) is int and 0 <= n < _HUGE for n in (*shape, *offsets)):
        message = f"the tensor {shown(name)} has the shape {shown(shape)} and the bytes {shown(offsets)}"
        raise ValueError(message)
    begin, end = offsets
    dtype = _DTYPES[code]
    if math.prod(max(1, n) for n in shape) >= _HUGE or end - begin != math.prod(shape) * dtype.itemsize:
        message = f"bytes {begin} to {end} are no tensor {shown(name)} of {dtype} and shape {shown(tuple(shape))}"
        raise ValueError(message)
    return dtype, tuple(shape), begin, end


def _check_ranges(abouts: Mapping[str, tuple[Any, Any, int, int]], size: int) -> None:
    end = 0
    for name, (_, _, begin, stop) in sorted(abouts.items(), key=lambda item: item[1][2:]):
        if begin != end:
            message = f"the tensor {shown(name)} begins at byte {begin}, and the one before it ends at byte {end}"
            raise ValueError(message)
        end = stop
    if end > size:
        message = f"it is cut off: its last {end - size} bytes are missing"
        raise ValueError(message)
    if end < size:
        message = f"it has {size - end} bytes more than its tensors"
        raise ValueError(message)
