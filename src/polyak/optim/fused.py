"""AdamW and an average that follows it, in one pass over float32 tensors of a CPU; needs Numba."""

from __future__ import annotations

from functools import cache
from operator import attrgetter
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.autograd.graph import increment_version

from polyak.kernels.compiler import CompilerError, compiling
from polyak.kernels.cpu import fused as cpu
from polyak.kernels.cpu.intervals import Intervals, freed
from polyak.kernels.cpu.work_list import Cut
from polyak.kernels.layout import dense
from polyak.kernels.threads import Slices
from polyak.tensors.entries import PLAIN, STRIDED
from polyak.tensors.located import Located, plain

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

__all__ = ["AdamWCPU", "Hyper", "pairs", "works"]

_KIND = attrgetter("dtype", "layout", "is_cpu")
_FITS = {(torch.float32, STRIDED, True)}
_BYTES = 4


class Hyper(NamedTuple):
    """What a parameter group asks for.

    Attributes:
        parameters: How many of its parameters take part.
        lr: The learning rate.
        betas: How much of the moments is kept.
        eps: What is added to the root of the second one.
        decay: The weight decay.
        maximize: Whether the step goes uphill.
    """

    parameters: int
    lr: float
    betas: tuple[float, float]
    eps: float
    decay: float
    maximize: bool

    def row(self, step: float) -> list[float]:
        """Return the coefficients of its step of that number, in double precision as torch makes them."""
        first, second = self.betas
        size, root = self.lr / (1 - first**step), (1 - second**step) ** 0.5
        kept = 1 - self.lr * self.decay
        return [-1.0 if self.maximize else 1.0, kept, 1 - first, second, 1 - second, root, self.eps, -size]


class AdamWCPU:
    """Makes a step of AdamW and moves averages on the way; equal to torch's fused AdamW, then ``fused``.

    Bound to what every step changes; gradients and averages are given to each.

    Args:
        params: The parameters.
        firsts: Their first moments.
        seconds: Their second moments.
        steps: How many steps each has made: tensors of one number.

    Attributes:
        params: The parameters.
        firsts: Their first moments.
        seconds: Their second moments.
        steps: How many steps each has made.
        obstacle: Why they cannot be moved here; empty if they can.
    """

    def __init__(
        self, params: Sequence[Tensor], firsts: Sequence[Tensor], seconds: Sequence[Tensor], steps: Sequence[Tensor]
    ) -> None:
        from polyak.kernels.cpu import adamw_loops

        self.params, self.firsts, self.seconds, self.steps = params, firsts, seconds, steps
        self._compiled, self._threads = adamw_loops, torch.get_num_threads()
        if found := _obstacle(params, firsts, seconds, steps):
            self.obstacle, self._located = found, None
            return
        self._located = Located(plain([*params, *firsts, *seconds, *steps]))
        self._strides, self._sizes = [*map(Tensor.stride, params)], [*map(Tensor.numel, params)]
        self._starts = np.array([[*map(Tensor.data_ptr, part)] for part in (params, firsts, seconds)], np.uint64)
        self._counters = np.array([*map(Tensor.data_ptr, steps)], np.uint64)
        self._cut = Cut(self._sizes)
        self._hold, self._held = False, np.zeros(len(self._cut.sizes), np.int64)
        self._slices = Slices(len(self._cut.bounds))
        self._written = Intervals(self._starts.ravel(), np.tile(np.array(self._sizes, np.uint64), 3))
        self.obstacle = "some of the tensors share memory" if self._written.overlap() else ""
        if len({*self._counters.tolist()}) < len(steps):
            self.obstacle = "some of the parameters share their count of steps"
        if any(freed(part, self._sizes) for part in (params, firsts, seconds)) or freed(steps, [1] * len(steps)):
            self.obstacle = "some of the tensors have no memory"
        self._like = np.empty(0, np.float32)
        try:
            with compiling("numba"):
                self._compile()
        except CompilerError:
            self.obstacle = "Numba compiles no step of AdamW here"

    def current(self) -> bool:
        """Return whether all tensors lie where they did, in the same layout."""
        located = self._located
        if located is None:
            return True  # what was refused stays so, for as long as it is the same tensors
        unmoved = located.same_layouts() and located.look() == located.addresses
        return unmoved and self._threads == torch.get_num_threads()

    def unfit(self, grads: Sequence[Tensor]) -> str:
        """Return the reason why a step with these gradients cannot be made here, or ""."""
        if self.obstacle:
            return self.obstacle
        if {*map(_KIND, grads)} != _FITS or not PLAIN.issuperset(map(type, grads)):
            return "not all gradients are plain float32 tensors on the CPU"
        alike = [*map(Tensor.stride, grads)] == self._strides and [*map(Tensor.numel, grads)] == self._sizes
        if not alike or any(map(Tensor.is_neg, grads)):
            return "not all gradients lie in memory as their parameters do"
        self._grads = np.array([*map(Tensor.data_ptr, grads)], np.uint64)
        if freed(grads, self._sizes):
            return "some of the gradients have no memory"
        return "some of the tensors share memory" if self._written.meet(self._grads, self._sizes) else ""

    def reset(self) -> None:
        """Begin again: nothing is written yet."""
        self._slices.reset()

    def prepare(self, averages: Sequence[Tensor | None], hypers: Sequence[Hyper], rate: float, *, hold: bool) -> None:
        """Work out a step with the gradients that were found to fit; nothing is written.

        Args:
            averages: The average of each parameter; None where there is none, or none that ``pairs`` with it.
            hypers: What the parameter groups ask for, in the order of the parameters.
            rate: The rate of the averages.
            hold: Whether their elements keep the old value where the new one would not be finite.
        """
        moved = [0 if average is None else average.data_ptr() for average in averages]
        param, first, second = self._starts
        starts = np.stack([param, self._grads, first, second, np.array(moved, np.uint64)])
        places = self._cut.addresses(starts, _BYTES)
        places[-1, starts[-1, self._cut.tensors] == 0] = 0
        self._made = np.empty(len(self._counters), np.float32)
        self._compiled.get(self._counters, self._made)
        self._made += 1
        self._counted = [*self.params, *(average for average in averages if average is not None)]
        self._work = places, self._cut.sizes, self._cut.tensors, self._rows(hypers)
        self._rate, self._hold = np.float32(rate), hold
        self._held.fill(0)

    def held(self) -> NDArray[np.int64]:
        """Return how many elements of each average the step held."""
        each = np.zeros(len(self.params), np.int64)
        np.add.at(each, self._cut.tensors, self._held)
        return each

    def begun(self) -> bool:
        """Return whether any tensor was written since ``reset``; waits for what an interrupted call left running."""
        return bool(self._slices.finished())

    def __call__(self) -> None:
        """Make the step, or what is left of it after an interrupted call; twice is once."""
        self._slices.run(self._run)
        self._compiled.put(self._counters, self._made)
        increment_version(self._counted)

    def _run(self, number: int) -> None:
        self._step(*self._cut.bounds[number], self._slices.done[number : number + 1])

    def _step(self, first: int, last: int, done: NDArray[np.bool_]) -> None:
        self._compiled.step(*self._work, first, last, self._rate, self._like, self._hold, self._held, done)

    def _rows(self, hypers: Sequence[Hyper]) -> NDArray[np.float32]:
        rows = np.empty((len(self._made), len(self._compiled.COLUMNS)), np.float32)
        begin = 0
        for hyper in hypers:
            here = slice(begin, begin + hyper.parameters)
            for step in np.unique(self._made[here]).tolist():
                rows[here][self._made[here] == step] = hyper.row(step)
            begin = here.stop
        return rows

    def _compile(self) -> None:
        # Now, and not in the middle of a step.
        self._compiled.get(self._counters[:0], np.empty(0, np.float32))
        self._compiled.put(self._counters[:0], np.empty(0, np.float32))
        self._made, self._rate = np.empty(0, np.float32), np.float32(0)
        places = self._cut.addresses(np.zeros((5, len(self.params)), np.uint64), _BYTES)
        self._work = places, self._cut.sizes, self._cut.tensors, self._rows([])
        self._step(0, 0, np.zeros(1, np.bool_))


@cache
def works() -> bool:
    """Return whether the loops can be compiled here; where Numba works and they do not, warn once."""
    ones = [[torch.zeros(shape, dtype=torch.float32, device="cpu")] for shape in ((1,), (1,), (1,), ())]
    try:
        with compiling("numba"):
            return not AdamWCPU(*ones).obstacle
    except CompilerError:
        return False


def pairs(average: Tensor, param: Tensor) -> bool:
    """Return whether an average can be moved with its parameter."""
    return average.dtype == param.dtype == torch.float32 and cpu.fits(average, param)


def _obstacle(params: Sequence[Tensor], *others: Sequence[Tensor]) -> str:
    *moments, steps = others
    every = [*params, *(tensor for part in moments for tensor in part)]
    if not params:
        return "no parameter has a gradient"
    if {*map(_KIND, (*every, *steps))} != _FITS or not PLAIN.issuperset(map(type, every)):
        return "not all parameters and moments are plain float32 tensors on the CPU"
    layouts = [[(tensor.stride(), tensor.shape) for tensor in part] for part in (params, *moments)]
    alike = all(layout == layouts[0] for layout in layouts) and all(step.numel() == 1 for step in steps)
    if not alike or not all(map(dense, params)) or any(map(Tensor.is_neg, every)):
        return "not all moments lie in memory as their parameters do, without holes"
    return ""
