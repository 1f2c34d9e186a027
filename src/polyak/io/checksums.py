"""Checksums in safetensors files, by which a flipped bit is found."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any
from zlib import crc32

import torch

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable, Mapping

    from torch import Tensor

__all__ = ["bytes_of", "checksum", "first_sum", "read_checksums", "with_checksums"]

_CHECKSUMS = "polyak_crc32"


def bytes_of(tensor: Tensor) -> memoryview:
    """Return the memory of a contiguous tensor on the CPU."""
    flat = tensor.reshape(-1)
    if flat.stride() != (1,):  # numpy's empty arrays have another one
        flat = flat.clone(memory_format=torch.contiguous_format)
    data: Any = flat.view(torch.uint8).numpy()
    return memoryview(data)


def checksum(tensor: Tensor) -> int:
    """Return the checksum of a contiguous tensor on the CPU."""
    return crc32(bytes_of(tensor), first_sum(tensor.dtype, tensor.shape))


def first_sum(dtype: torch.dtype, shape: Iterable[int]) -> int:
    """Return the prefix of a checksum: the dtype and shape, which make the same bytes another tensor."""
    return crc32(f"{dtype} {[*shape]}".encode())


def _texts_sum(texts: Mapping[str, str]) -> int:
    return crc32(json.dumps({key: text for key, text in texts.items() if key != _CHECKSUMS}, sort_keys=True).encode())


def with_checksums(
    texts: Mapping[str, str], tensors: Mapping[str, Tensor], known: Mapping[str, int] | None = None
) -> dict[str, str]:
    """Return the texts of a file with the checksums of texts and tensors among them.

    Args:
        texts: The texts.
        tensors: The tensors.
        known: The checksums of some of the tensors. Defaults to none.
    """
    known = known or {}
    sums = {name: known[name] if name in known else checksum(tensor) for name, tensor in tensors.items()}
    return {**texts, _CHECKSUMS: json.dumps({"texts": _texts_sum(texts), "tensors": sums})}


def read_checksums(texts: Mapping[str, str], names: Collection[str]) -> Mapping[str, int] | None:
    """Return the checksum of each tensor; None: the file has none.

    Raises:
        ValueError: If the texts are not what was written, or the names of the tensors.
    """
    if _CHECKSUMS not in texts:
        return None
    found = json.loads(texts[_CHECKSUMS])
    if found["texts"] != _texts_sum(texts) or {*found["tensors"]} != {*names}:
        message = "its metadata are not what was written; their checksum differs"
        raise ValueError(message)
    sums: Mapping[str, int] = found["tensors"]
    return sums
