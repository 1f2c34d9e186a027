"""Updates inside a captured CUDA graph or a compiled step: tensor work only, with the rate in a tensor."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from polyak.errors import ConfigError
from polyak.tensors.kernels.cuda import FusedCUDA
from polyak.tensors.kernels.kernel import SHORT

if TYPE_CHECKING:
    from polyak.options import Options
    from polyak.tensors.plan import Plan

__all__ = ["Captured"]


class _Pair(NamedTuple):
    average: Tensor
    live: Tensor
    rate: Tensor | None  # None: it is copied

    def move(self) -> None:
        if self.rate is None:
            self.average.copy_(self.live)
        else:
            self.average.lerp_(self.live.detach().to(self.average.dtype), self.rate[0])


class Captured:
    """What a graph records of an update. The host's part, the rate among it, is put in place before each replay.

    A replay adds nothing to the memory of an update: a few numbers for the rates.

    Attributes:
        plan: The plan whose tensors are moved.

    Raises:
        ConfigError: The averager's options or tensors need work that no graph records.
    """

    def __init__(self, plan: Plan, options: Options) -> None:
        _refuse(plan, options)
        self.plan = plan
        self._rates: dict[tuple[torch.device, torch.dtype], Tensor] = {}
        self._pairs: list[_Pair] = []
        self._others: list[_Pair] = []
        self._fused: list[tuple[FusedCUDA, Tensor]] = []
        for group in plan.mover.groups:
            rate = None if group.policy == "copy" else self._rate(group.averages[0][0])
            pairs = [_Pair(a, w, rate) for a, w in zip(group.averages[0], group.weights, strict=True)]
            self._pairs += pairs
            if isinstance(group.kernel, FusedCUDA) and rate is not None:
                self._fused.append((group.kernel, rate))
            else:
                self._others += pairs

    def put(self, rate: float) -> None:
        """Let the replays that follow move the average by ``rate``; 0 leaves it where it is."""
        for tensor in self._rates.values():
            tensor.fill_(rate)

    def move(self) -> None:
        """Move every average by the rate that was put, by operations that a graph can record."""
        with torch.no_grad():
            compiled = torch.compiler.is_compiling()  # a compiler joins the single operations by itself
            for pair in self._pairs if compiled else self._others:
                pair.move()
            if not compiled:
                for kernel, rate in self._fused:
                    kernel(rate, [], 0)

    def _rate(self, average: Tensor) -> Tensor:
        dtype = average.dtype.to_real()
        if (key := (average.device, dtype)) not in self._rates:
            self._rates[key] = torch.zeros(1, dtype=dtype, device=average.device)
        return self._rates[key]


def recording() -> bool:
    """Return whether what is called now is recorded, to be run later."""
    return torch.compiler.is_compiling() or (torch.cuda.is_available() and torch.cuda.is_current_stream_capturing())


def _refuse(plan: Plan, options: Options) -> None:
    short = [s.name for s in plan.stored if s.policy == "average" and s.average.dtype in SHORT]
    problem = (
        f"nonfinite={options.nonfinite!r}, which asks the device and waits; set nonfinite='propagate'"
        if options.nonfinite != "propagate"
        else f"an average in a short dtype ({short[0]}), which is rounded at random; set dtype='float32'"
        if short
        else f"device={options.device!r}, while the model is elsewhere; leave device= out"
        if plan.offload is not None
        else ""
    )
    if problem:
        message = f"capturable=True does not go with {problem}"
        raise ConfigError(message)
