"""What a run would log of an average: numbers of its last update, and how far it is from the weights."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from polyak.kernels.eager.scratch import CHUNK

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from polyak.engine.core import Core

__all__ = ["metrics"]


def metrics(core: Core) -> dict[str, float]:
    """Return the numbers of ``Averager.metrics``."""
    state = core.state
    core.holds.settle()
    distance, cosine = _compared(core)
    begun = state.progress.n > 0
    return {
        "n": state.progress.n,
        "rate": state.progress.rate if begun else math.nan,
        "skipped": state.skipped,
        "held": sum(core.holds.last().values()),
        "half_life": core.profile().half_life if begun else math.nan,
        "distance": distance,
        "cosine": cosine,
    }


def _compared(core: Core) -> tuple[float, float]:
    """Return the distance and the cosine of the model's parameters and their averages."""
    if core.binding.model is None:
        return math.nan, math.nan
    plan = core.current()
    pairs = [
        (stored.average, live)
        for stored, live in zip(plan.stored, plan.live, strict=True)
        if stored.kind == "parameter" and stored.policy == "average"
    ]
    with torch.no_grad():
        sums = [_sums(*chunk) for pair in pairs for chunk in _chunks(*pair)]
    if not sums:
        return math.nan, math.nan
    # Summed on each device first: to ask one for a number is to wait for it.
    devices = {each.device for each in sums}
    totals = [torch.stack([each for each in sums if each.device == device]).sum(0).cpu() for device in devices]
    apart, average, weights, product = torch.stack(totals).sum(0).tolist()
    lengths = math.sqrt(average) * math.sqrt(weights)
    return math.sqrt(apart), product / lengths if lengths else math.nan


def _chunks(average: Tensor, live: Tensor) -> Iterator[Sequence[Tensor]]:
    tensors = [torch.view_as_real(t) if t.is_complex() else t for t in (average.detach(), live.detach().resolve_conj())]
    return zip(*(torch.split(t.reshape(-1), CHUNK) for t in tensors), strict=True)


def _sums(average: Tensor, live: Tensor) -> Tensor:
    """Return the squares of the difference, of both, and their product, summed up in float32 and kept in float64."""
    wide = torch.promote_types(average.dtype, torch.float32)
    a, w = average.to(wide), live.to(average.device, wide)
    apart = w - a
    each = [torch.dot(apart, apart), torch.dot(a, a), torch.dot(w, w), torch.dot(a, w)]
    return torch.stack(each).to(torch.float32 if a.device.type == "mps" else torch.float64)
