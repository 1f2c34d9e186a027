"""Updates inside a captured CUDA graph or a compiled step: tensor work only, with the rate in a tensor."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple, Protocol

import torch
from torch import Tensor

from polyak.engine.nonfinite import Held, looks
from polyak.errors import ConfigError
from polyak.kernels.base import SHORT
from polyak.kernels.cuda.fused import FusedCUDA

if TYPE_CHECKING:
    from polyak.engine.core import Core
    from polyak.engine.options import Options
    from polyak.engine.plan.plan import Plan
    from polyak.tensors.entries import Given

__all__ = ["Captured", "recording", "refuse_recording"]


class _Pair(NamedTuple):
    average: Tensor
    live: Tensor
    rate: Tensor | None  # None: it is copied
    due: Tensor | None  # None: always
    held: Tensor | None  # how many elements were; None: it holds none

    def move(self) -> None:
        average, weight = self.average, self.live.detach().to(self.average.dtype)
        if self.due is not None:
            weight = torch.where(self.due, weight, average)
        if self.rate is None:
            average.copy_(weight)
        elif self.held is None:
            average.lerp_(weight, self.rate[0])
        else:
            moved = torch.where(average.isfinite(), torch.lerp(average, weight, self.rate[0]), weight)
            finite = moved.isfinite()
            self.held.copy_((~finite).sum())
            average.copy_(torch.where(finite, moved, average))


class Captured:
    """What a graph records of an update. The host's part, the rate among it, is put in place before each replay.

    A replay adds nothing to the memory of an update: a few numbers for the rates.

    Attributes:
        announced: Whether ``advance`` has put a rate that no update has used up.
        by_host: Makes an update that is compiled and that nobody announced, with a warning.
        recorded: Whether a CUDA graph has recorded it.

    Raises:
        ConfigError: If the averager's options or tensors need work that no graph records.
    """

    def __init__(self, plan: Plan, options: Options) -> None:
        _refuse(plan, options)
        self.announced, self.recorded = False, False
        # A compiler leaves the graph for it.
        self.by_host = torch.compiler.disable(_by_host)  # type: ignore[no-untyped-call]  # torch's own
        self._memory = _memory(plan)
        self._sometimes = options.every > 1 or options.start > 0
        self._due: dict[torch.device, Tensor] = {}
        self._rates: dict[tuple[torch.device, torch.dtype], Tensor] = {}
        self._pairs: list[_Pair] = []
        self._others: list[_Pair] = []
        self._fused: list[tuple[FusedCUDA, Tensor]] = []
        self._holding: list[tuple[list[Tensor], Tensor, FusedCUDA | None]] = []
        hold = options.nonfinite == "hold"
        for group in plan.moves.groups:
            averages, device = group.averages[0], group.averages[0][0].device
            rate = None if group.policy == "copy" else self._rate(averages[0])
            due = self._due_on(device) if self._sometimes else None
            each = torch.zeros(len(averages), dtype=torch.int64, device=device)
            held = each if hold and rate is not None else [None] * len(averages)
            pairs = [_Pair(a, w, rate, due, n) for a, w, n in zip(averages, group.weights, held, strict=True)]
            self._pairs += pairs
            if isinstance(group.kernel, FusedCUDA) and rate is not None:
                group.kernel.prepare(moved=True, hold=hold)
                group.kernel.guard = torch.zeros(1, dtype=torch.int32, device=device)
                self._fused.append((group.kernel, rate))
            else:
                self._others += pairs
            if rate is not None:
                self._holding.append((averages, each, group.kernel if isinstance(group.kernel, FusedCUDA) else None))
        self._names = {id(stored.average): stored.name for stored in plan.stored}

    def held(self) -> Held:
        """Return what the last replay held."""
        counts = [
            count for _, each, kernel in self._holding for count in (each.sum(), *([kernel.held[0]] if kernel else []))
        ]
        elements = sum(average.numel() for averages, _, _ in self._holding for average in averages)
        return Held([counts], elements, self._held_names)

    def _held_names(self) -> dict[str, int]:
        found = {}
        for averages, each, kernel in self._holding:
            counts = each if kernel is None else each + kernel.held_each()[0]
            found.update({self._names[id(a)]: n for a, n in zip(averages, counts.tolist(), strict=True) if n})
        return found

    def follows(self, plan: Plan) -> bool:
        """Return whether these are the tensors of a plan, in the memory that a graph would have recorded."""
        return self._memory == _memory(plan)

    def put(self, rate: float | None) -> None:
        """Let the replays that follow move the average by ``rate``, or leave it as it is where that is None."""
        for tensor in self._rates.values():
            tensor.fill_(rate or 0.0)
        for due in self._due.values():
            due.fill_(rate is not None)
        for kernel, _ in self._fused:
            if kernel.guard is not None:
                kernel.guard.fill_(rate is None)
        self.announced = True

    def move(self) -> None:
        """Move every average by the rate that was put, by operations that a graph can record."""
        with torch.no_grad():
            compiled = torch.compiler.is_compiling()  # a compiler joins the single operations by itself
            for pair in self._pairs if compiled else self._others:
                pair.move()
            if not compiled:
                for kernel, rate in self._fused:
                    kernel(rate, [], 0)
        if compiled or not _capturing():
            self.announced = False
            return
        # A replay runs no Python: the graph itself uses the rate up.
        self.recorded = True
        for rate in self._rates.values():
            rate.zero_()

    def _due_on(self, device: torch.device) -> Tensor:
        if device not in self._due:
            self._due[device] = torch.ones((), dtype=torch.bool, device=device)
        return self._due[device]

    def _rate(self, average: Tensor) -> Tensor:
        dtype = average.dtype
        if (key := (average.device, dtype)) not in self._rates:
            self._rates[key] = torch.zeros(1, dtype=dtype, device=average.device)
        return self._rates[key]


class _Updater(Protocol):
    @property
    def core(self) -> Core: ...

    def update(self, model: Given | None, step: int | None, lr: float | None, rate: float | None) -> None: ...


def _by_host(updater: _Updater, model: Given | None, step: int | None, lr: float | None, rate: float | None) -> None:
    message = (
        "a compiled step calls averager.update(), but averager.advance() was not called before the step; the update "
        "was made outside of the graph. Call averager.advance() before each compiled step."
    )
    updater.core.warn("unannounced", message)
    updater.update(model, step, lr, rate)


def _memory(plan: Plan) -> list[int]:
    return [t.data_ptr() for s, live in zip(plan.stored, plan.live, strict=True) for t in (s.average, live)]


def recording() -> bool:
    """Return whether what is called now is recorded, to be run later."""
    return torch.compiler.is_compiling() or _capturing()


def _capturing() -> bool:
    # Whether there is a device would be asked of the driver, each time.
    return torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing()  # type: ignore[no-untyped-call]  # torch's own


def refuse_recording() -> None:
    """Refuse an update with its rate as a number inside of a CUDA graph.

    Raises:
        ConfigError: If a CUDA graph is being captured.
    """
    if _capturing():
        message = (
            "a CUDA graph is being captured, which would repeat this update's rate for ever; build the averager with "
            "capturable=True, and call advance() before each replay"
        )
        raise ConfigError(message)


def _refuse(plan: Plan, options: Options) -> None:
    short = [s.name for s in plan.stored if s.policy == "average" and s.average.dtype in SHORT]
    problem = (
        f"nonfinite={options.nonfinite!r}, which counts an update after a look at its weights; leave nonfinite= out"
        if looks(options.nonfinite)
        else f"an average in a short dtype ({short[0]}), which is rounded at random; set dtype='float32'"
        if short
        else "a strategy of several tensors, whose moves are not those of a graph; use one without slots"
        if any(s.slots for s in plan.stored)
        else f"device={options.device!r}, while the model is elsewhere; leave device= out"
        if plan.offload is not None
        else ""
    )
    if problem:
        message = f"capturable=True does not go with {problem}"
        raise ConfigError(message)
