"""Whether a model's weights are all finite: one pass over them and one synchronisation per device."""

from __future__ import annotations

import math
from contextlib import ExitStack
from functools import cached_property
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor
from torch._utils import _flatten_dense_tensors

from polyak.kernels.base import SHORT

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

__all__ = ["FiniteCheck"]

_SMALL = 1 << 14
_AUTOCAST = {"cpu", "cuda"}


class _Group(NamedTuple):
    """Tensors of one device and dtype; small ones are joined, since a call each costs more than reading them."""

    large: list[Tensor]
    small: list[Tensor]


class FiniteCheck:
    """Tells whether any of some tensors holds a NaN or an infinity, each time it is called.

    It sums, since a sum is finite only where every term is; only where a sum is not, it looks at each value, since
    finite terms may overflow.
    """

    def __init__(self, tensors: Sequence[Tensor]) -> None:
        self._tensors = tensors

    @cached_property
    def _groups(self) -> Mapping[torch.device, Mapping[torch.dtype, _Group]]:
        groups: dict[torch.device, dict[torch.dtype, _Group]] = {}
        for tensor in self._tensors:
            group = groups.setdefault(tensor.device, {}).setdefault(tensor.dtype, _Group([], []))
            # Joining reads each tensor's memory in its own order, which only plain tensors have.
            joins = tensor.numel() < _SMALL and tensor.layout == torch.strided and not tensor.is_conj()
            (group.small if joins else group.large).append(tensor)
        return groups

    def __call__(self) -> bool:
        """Return whether all values are finite now."""
        if not self._tensors:
            return True
        with ExitStack() as modes:
            modes.enter_context(torch.no_grad())
            for kind in {device.type for device in self._groups} & _AUTOCAST:
                if torch.is_autocast_enabled(kind):  # which joins no halves on CPUs
                    modes.enter_context(torch.autocast(kind, enabled=False))
            totals = [_sum([_total(*pair) for pair in groups.items()]).item() for groups in self._groups.values()]
            return all(map(math.isfinite, totals)) or all(bool(_readable(t).isfinite().all()) for t in self._tensors)


def _total(dtype: torch.dtype, group: _Group) -> Tensor:
    if dtype.itemsize == 1 or dtype == torch.complex32:
        group = _Group([_readable(tensor) for tensor in (*group.large, *group.small)], [])
    wide = torch.float32 if dtype in SHORT else None
    totals = [tensor.sum(dtype=wide) for tensor in group.large]
    if group.small:
        joined: Tensor = _flatten_dense_tensors(group.small)  # type: ignore[no-untyped-call]  # torch's own
        totals.append(joined.sum(dtype=wide))
    total = _sum(totals)
    # float32, which every device has; what overflows in it is looked at value by value.
    return (total.real + total.imag if total.is_complex() else total).to(torch.float32)


def _sum(totals: list[Tensor]) -> Tensor:
    return totals[0] if len(totals) == 1 else torch.stack(totals).sum()


def _readable(tensor: Tensor) -> Tensor:
    # float8 has neither a sum nor isfinite, and complex halves have no sum.
    if tensor.dtype == torch.complex32:
        return tensor.to(torch.complex64)
    return tensor.float() if tensor.dtype.itemsize == 1 else tensor
