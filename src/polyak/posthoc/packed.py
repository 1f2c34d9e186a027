"""The tensors of a snapshot's file, and the digest that identifies them."""

from __future__ import annotations

import hashlib
import json
from typing import TYPE_CHECKING, NamedTuple, Self

import torch

from polyak.io.checksums import checksum

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from torch import Tensor

    from polyak.posthoc.snapshot import Layout

__all__ = ["Packed", "digest_of"]

_DIGEST = 16  # digits


class Packed(NamedTuple):
    """Tensors as a file has them.

    Attributes:
        tensors: The tensors by their names in the file, on the CPU.
        complex: The canonical names of those that are complex, which no file has.
        sums: The checksums of the tensors that identify an average.
        kept: The canonical names of the tensors that kept a longer dtype, since their values do not fit the wanted one.
    """

    tensors: dict[str, Tensor]
    complex: list[str]
    sums: dict[str, int]
    kept: list[str]

    @classmethod
    def of(
        cls, weights: Mapping[str, Tensor], layout: Layout, digested: Iterable[str], dtype: torch.dtype | None
    ) -> Self:
        """Return tensors as a file has them.

        Args:
            weights: The tensors, by canonical name.
            layout: The model.
            digested: The canonical names of the tensors that identify an average.
            dtype: The dtype of averaged tensors. Defaults to their own, but float32 at the least.
        """
        tensors, is_complex, kept = _packed(weights, {*layout.averaged}, dtype)
        sums = {key: checksum(tensors[key]) for key in (f"weights/{name}" for name in digested)}
        return cls(tensors, is_complex, sums, kept)

    @property
    def digest(self) -> str:
        """The digest that identifies their values."""
        return _joined(self.sums)


def digest_of(weights: Mapping[str, Tensor], digested: Iterable[str]) -> str:
    """Return a digest of values that does not depend on the dtype they are stored in.

    Args:
        weights: The tensors, by canonical name.
        digested: The canonical names of those that count.
    """
    sums: dict[str, int] = {}
    for name in digested:  # one by one: all in float64 may be more than the memory
        packed, *_ = _packed({name: weights[name]}, {name}, torch.float64)
        sums |= {key: checksum(tensor) for key, tensor in packed.items()}
    return _joined(sums)


def _joined(sums: Mapping[str, int]) -> str:
    return hashlib.sha256(json.dumps(sums, sort_keys=True).encode()).hexdigest()[:_DIGEST]


def _packed(
    weights: Mapping[str, Tensor], averaged: set[str], dtype: torch.dtype | None
) -> tuple[dict[str, Tensor], list[str], list[str]]:
    packed: dict[str, Tensor] = {}
    is_complex, kept = [], []
    for name, tensor in weights.items():
        here = tensor.detach().cpu().resolve_conj().resolve_neg()
        if here.is_complex():
            is_complex.append(name)
            here = torch.view_as_real(here)
        if name in averaged:
            wide = here.to(torch.promote_types(here.dtype, torch.float32))
            here = wide if dtype is None else wide.to(dtype)
            if here.dtype.itemsize < wide.dtype.itemsize and not _holds(here, wide):
                kept.append(name)
                here = wide
        packed[f"weights/{name}"] = here.contiguous()
    return packed, is_complex, kept


def _holds(short: Tensor, wide: Tensor) -> bool:
    """Return whether a shorter dtype only rounds finite values, and makes no infinities or zeros of them."""
    size = torch.linalg.vector_norm(wide, dtype=torch.float64)
    apart = torch.linalg.vector_norm(short.to(wide.dtype).sub_(wide), dtype=torch.float64)
    return bool(apart <= torch.finfo(short.dtype).eps * size) or not bool(torch.isfinite(size))
