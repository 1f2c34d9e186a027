"""A safetensors file read one tensor at a time, into memory of its own."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from polyak.errors import StateError

if TYPE_CHECKING:
    import os
    from collections.abc import Mapping

    from torch import Tensor

__all__ = ["TensorFile"]

_LENGTH = 8  # bytes at the beginning: the length of the header, little-endian
_LARGEST = 100_000_000  # bytes of a header, by the format's own definition
_DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool,
    "C64": torch.complex64, "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2,
}  # fmt: skip


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
            self.metadata: Mapping[str, str] = header.pop("__metadata__", {})
            self._about = header
            self._begin = _LENGTH + length
            end = max((about["data_offsets"][1] for about in header.values()), default=0)
        except FileNotFoundError:
            message = f"there is no file {str(path)!r}"
            raise StateError(message) from None
        except (OSError, ValueError, AttributeError, KeyError, TypeError) as error:
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
        return tuple(self._about[name]["shape"])

    def dtype(self, name: str) -> torch.dtype:
        """Return the dtype of a tensor, which is not read."""
        return _DTYPES[self._about[name]["dtype"]]

    def read(self, name: str) -> Tensor:
        """Return a tensor."""
        begin, end = self._about[name]["data_offsets"]
        tensor = torch.empty(self.shape(name), dtype=self.dtype(name))
        if begin == end:
            return tensor
        data: Any = tensor.reshape(-1).view(torch.uint8).numpy()
        into = memoryview(data)
        with self.path.open("rb", buffering=0) as file:
            file.seek(self._begin + begin)
            while into:
                read = file.readinto(into)
                if not read:
                    message = f"{str(self.path)!r} was cut off while it was read"
                    raise StateError(message)
                into = into[read:]
        return tensor
