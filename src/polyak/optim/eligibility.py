"""What keeps a step and an update from being one pass, in words."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from polyak.engine import Engine
from polyak.engine.nonfinite import looks
from polyak.kernels.cpu.fused import fits_copy
from polyak.kernels.select import compiles
from polyak.optim.fused import works

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from torch import Tensor
    from torch.optim import Optimizer

__all__ = ["alike", "is_open", "of_averager", "of_optimizer"]

_SLOWER = ("amsgrad", "foreach", "capturable", "differentiable")
_FUSED = (torch.float32, torch.float64)


def of_averager(averager: object) -> str:
    """Return the reason why an averager cannot be updated in the optimiser's pass, or ""."""
    if not isinstance(averager, Engine):
        kind = type(averager).__name__
        return (
            "it was given no averager" if averager is None else f"it was given a {kind}, and one pass moves one average"
        )
    options = averager.options
    if looks(options.nonfinite):
        return (
            f"nonfinite={options.nonfinite!r} looks at the new weights before an average moves; an averager built "
            'with nonfinite="hold", the default, moves in the same pass'
        )
    if options.capturable or options.kernel in {"foreach", "loop"}:
        return f"the averager has kernel={options.kernel!r}, capturable={options.capturable}"
    if not (compiles(options.kernel) and works()):
        return "Numba is not installed or does not work here: pip install numba"
    return ""


def of_optimizer(optimizer: Optimizer) -> str:
    """Return the option of an optimiser that one pass does not support, or ""."""
    if getattr(optimizer, "grad_scale", None) is not None or getattr(optimizer, "found_inf", None) is not None:
        return "a GradScaler scales the gradients"
    groups = optimizer.param_groups
    asked = [f"{name}=True" for group in groups for name in _SLOWER if group[name]]
    asked += ["decoupled_weight_decay=False" for group in groups if not group.get("decoupled_weight_decay", True)]
    asked += [f"fused={group['fused']}" for group in groups if not (group["fused"] or is_open(group))]
    return asked[0] if asked else ""


def is_open(group: Mapping[str, Any]) -> bool:
    """Return whether a parameter group leaves it open how its step is made."""
    return group["fused"] is group["foreach"] is None and not (group["capturable"] or group["differentiable"])


def alike(params: Sequence[Tensor], states: Mapping[Tensor, Mapping[str, Tensor]]) -> bool:
    """Return whether parameters are dense floats of the CPU, each laid out as its gradient and its moments."""
    for param in params:
        others = [param.grad, *states.get(param, {}).values()]
        parts = [other for other in others if other is not None and (other is param.grad or other.dim())]
        if not fits_copy(param, param) or param.dtype not in _FUSED:
            return False
        if not all(fits_copy(part, param) for part in parts):
            return False
    return True
