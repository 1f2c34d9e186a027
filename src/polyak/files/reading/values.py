"""The values of a tensor, read from where they lie."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import torch

from polyak.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Iterator

    from torch import Tensor

    from polyak.files.reading.raw import Box, RawFile, Stored

__all__ = ["bytes_of", "fill", "read_values", "spans", "whole"]


def read_values(stored: Stored, begin: int, end: int) -> Tensor:
    """Return values of the flat tensor.

    Raises:
        ConfigError: If the range is not inside the tensor.
        StateError: If the file has changed or cannot be read.
    """
    count = math.prod(stored.shape)
    if not 0 <= begin <= end <= count:
        message = f"got the values {begin} to {end} of a tensor with {count}"
        raise ConfigError(message)
    into = torch.empty(end - begin, dtype=stored.dtype, device="cpu")
    fill(stored, begin, into)
    return into


def fill(stored: Stored, begin: int, into: Tensor) -> None:
    """Fill a flat contiguous tensor with the values from ``begin`` on.

    Args:
        stored: Where the tensor lies.
        begin: The index of the first value.
        into: What is filled.
    """
    end = begin + into.numel()
    if stored.boxes:
        into.copy_(whole(stored).reshape(-1)[begin:end])
        return
    data = bytes_of(into)
    for file, offset, first, last in spans(stored, begin, end):
        file.read_into(data[first:last], offset)


def spans(stored: Stored, begin: int, end: int) -> Iterator[tuple[RawFile, int, int, int]]:
    """Yield where values lie: file, offset there, and the range of bytes that they are of all these values."""
    size = stored.dtype.itemsize
    for part in stored.parts:
        first, last = max(begin, part.begin), min(end, part.end)
        if first < last:
            yield part.file, part.offset + (first - part.begin) * size, (first - begin) * size, (last - begin) * size


def bytes_of(tensor: Tensor) -> memoryview:
    """Return the memory of a flat contiguous tensor."""
    data: Any = tensor.view(torch.uint8).numpy()
    return memoryview(data) if tensor.numel() else memoryview(b"")


def whole(stored: Stored) -> Tensor:
    """Return a whole tensor that lies in boxes."""
    made = torch.empty(stored.shape, dtype=stored.dtype, device="cpu")
    for box in stored.boxes:
        made[tuple(slice(start, start + size) for start, size in zip(box.starts, box.shape, strict=True))] = _of_box(
            box, stored.dtype
        )
    return made


def _of_box(box: Box, dtype: torch.dtype) -> Tensor:
    extent = sum((size - 1) * step for size, step in zip(box.shape, box.stride, strict=True)) + 1
    flat = torch.empty(extent, dtype=dtype, device="cpu")
    box.file.read_into(bytes_of(flat), box.offset)
    return flat.as_strided(box.shape, box.stride)
