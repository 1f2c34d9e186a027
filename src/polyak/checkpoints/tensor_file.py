"""A safetensors file read one tensor at a time, into memory of its own."""

from __future__ import annotations

import json
import math
from operator import index
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from polyak.errors import StateError

if TYPE_CHECKING:
    import os
    from collections.abc import Mapping

    from torch import Tensor

__all__ = ["Scratch", "TensorFile"]

_LENGTH = 8  # bytes at the beginning: the length of the header, little-endian
_LARGEST = 100_000_000  # bytes of a header, by the format's own definition
_DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool,
    "U64": torch.uint64, "U32": torch.uint32, "U16": torch.uint16, "C64": torch.complex64,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E4M3FNUZ": torch.float8_e4m3fnuz,
    "F8_E5M2": torch.float8_e5m2, "F8_E5M2FNUZ": torch.float8_e5m2fnuz,
}  # fmt: skip


class _About(NamedTuple):
    """What the header says of a tensor: its bytes are those from ``begin`` to ``end`` after it."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    begin: int
    end: int


class Scratch:
    """Memory for one tensor after the other: what is freed and allocated anew each time gets scattered, and grows."""

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

    The package safetensors maps files into memory: whoever reads one tensor of each of many files then holds all of
    them, as every tool that watches memory sees it. Here a tensor costs its own size.

    Attributes:
        path: The file.
        metadata: Its texts.
        names: What it holds.

    Raises:
        StateError: It is missing, damaged or cut off.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        try:
            with self.path.open("rb") as file:
                length = int.from_bytes(file.read(_LENGTH), "little")
                header: dict[str, Any] = json.loads(file.read(min(length, _LARGEST)))
            self.metadata: Mapping[str, str] = dict(header.pop("__metadata__", {}))
            self._about = {name: _about(told) for name, told in header.items()}
            self._begin = _LENGTH + length
            end = max((about.end for about in self._about.values()), default=0)
        except FileNotFoundError:
            message = f"there is no file {str(path)!r}"
            raise StateError(message) from None
        except (OSError, ValueError, AttributeError, KeyError, TypeError, RecursionError) as error:
            message = f"{str(path)!r} is no safetensors file, or damaged ({type(error).__name__}: {error})"
            raise StateError(message) from error
        if (missing := self._begin + end - self.path.stat().st_size) > 0:
            message = f"{str(path)!r} is cut off: its last {missing} bytes are missing; make it again"
            raise StateError(message)

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
        """Return a tensor; in the scratch memory where that is given."""
        about = self._about[name]
        tensor = (scratch or Scratch()).tensor(about.shape, about.dtype)
        if about.begin == about.end:
            return tensor
        data: Any = tensor.reshape(-1).view(torch.uint8).numpy()
        into = memoryview(data)
        with self.path.open("rb", buffering=0) as file:
            file.seek(self._begin + about.begin)
            while into:
                read = file.readinto(into)
                if not read:
                    message = f"{str(self.path)!r} was cut off while it was read"
                    raise StateError(message)
                into = into[read:]
        return tensor


def _about(told: Mapping[str, Any]) -> _About:
    dtype, shape = _DTYPES[told["dtype"]], tuple(map(index, told["shape"]))
    begin, end = map(index, told["data_offsets"])
    if min((begin, *shape)) < 0 or end - begin != math.prod(shape) * dtype.itemsize:
        message = f"bytes {begin} to {end} are no tensor of {dtype} and shape {shape}"
        raise ValueError(message)
    return _About(dtype, shape, begin, end)
