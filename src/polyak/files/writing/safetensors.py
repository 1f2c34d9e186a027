"""A safetensors file that is written in any order, its metadata last."""

from __future__ import annotations

import json
import math
import os
from typing import TYPE_CHECKING, Any

from polyak.errors import ConfigError
from polyak.errors.formatting import shown
from polyak.files.reading.safetensors import CODES, LENGTH

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

    import torch

__all__ = ["SafetensorsOutput", "check_codes"]

_ALIGNMENT = 8


def check_codes(tensors: Sequence[tuple[str, torch.dtype, tuple[int, ...]]]) -> None:
    """Refuse dtypes that the format does not have.

    Raises:
        ConfigError: If there is one.
    """
    if strange := [(name, dtype) for name, dtype, _ in tensors if dtype not in CODES]:
        name, dtype = strange[0]
        message = f"{shown(name)} is of {dtype}, which no .safetensors file holds; write a .pt file"
        raise ConfigError(message)


class SafetensorsOutput:
    """A file with room for its tensors.

    Args:
        file: The file, which is new.
        tensors: Name, dtype and shape of each tensor, in the order in which they are written.
        texts: Metadata as long as those that ``finish`` gets.
    """

    ordered = False

    def __init__(
        self, file: Path, tensors: Sequence[tuple[str, torch.dtype, tuple[int, ...]]], texts: Mapping[str, str]
    ) -> None:
        self._table: dict[str, Any] = {}
        self._offsets: dict[str, int] = {}
        end = 0
        # Long dtypes first, so that each tensor begins at a multiple of its values' size.
        for name, dtype, shape in sorted(tensors, key=lambda tensor: -tensor[1].itemsize):
            begin, end = end, end + math.prod(shape) * dtype.itemsize
            self._table[name] = {"dtype": CODES[dtype], "shape": [*shape], "data_offsets": [begin, end]}
            self._offsets[name] = begin
        self._begin = LENGTH + len(self._header(texts))
        self._file = os.open(file, os.O_RDWR | os.O_CREAT | os.O_TRUNC | getattr(os, "O_BINARY", 0), 0o666)
        os.ftruncate(self._file, self._begin + end)

    def write(self, name: str, offset: int, data: memoryview) -> None:
        """Write bytes of a tensor."""
        write_at(self._file, data, self._begin + self._offsets[name] + offset)

    def finish(self, texts: Mapping[str, str]) -> None:
        """Write the header; the metadata are as long as those that room was made for."""
        header = self._header(texts).ljust(self._begin - LENGTH)
        write_at(self._file, memoryview(len(header).to_bytes(LENGTH, "little") + header), 0)

    def close(self) -> None:
        """Close the file; idempotent."""
        if self._file >= 0:
            os.close(self._file)
            self._file = -1

    def _header(self, texts: Mapping[str, str]) -> bytes:
        text = json.dumps({"__metadata__": {**texts}, **self._table}, separators=(",", ":")).encode()
        return text + b" " * (-len(text) % _ALIGNMENT)


def write_at(file: int, data: memoryview, offset: int) -> None:
    """Write all bytes at an offset; one call may take a part only."""
    done = 0
    while done < len(data):
        done += os.pwrite(file, data[done:], offset + done)
