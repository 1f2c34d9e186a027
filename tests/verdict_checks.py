"""Checks of updates on a GPU that look at the weights: the host neither waits for the answer nor moves on a bad one.

A check is a function of a device. On the CPU the kernels are those of the GPU, in Triton's interpreter, and a stream
that never ends its work stands for the device's.
"""

from __future__ import annotations

import copy
import warnings
from contextlib import contextmanager
from unittest.mock import patch

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import polyak
from interpreted import Checks
from models import average_bits
from polyak.engine.plan import verdict
from polyak.errors import NonFiniteError, PolyakWarning
from polyak.kernels.cuda.fused import FusedCUDA
from polyak.kernels.eager.foreach import Copy
from polyak.kernels.select import KERNELS
from polyak.tensors import arrival

CHECKS = Checks()
STRATEGIES = [("ema",), ("swa",), ("dema",), ("lawa",)]
BAD = float("nan")
SKIPPED = "the weights (hold|that the averager was built from hold) NaN"


def _model(on):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 5), nn.BatchNorm1d(5), nn.Linear(5, 2)).to(on)


@contextmanager
def _on(device):
    """Let averagers use the kernels of the GPU."""
    if device == "cpu":
        with (
            patch("polyak.kernels.select._numba", lambda: True),
            patch.dict(KERNELS, {"fused": FusedCUDA, "fastest": FusedCUDA, "copy": Copy, "compiled copy": Copy}),
        ):
            yield
    else:
        yield


def _average(model, strategy="ema", **options):
    return polyak.average(model, strategy, **({"nonfinite": "skip", "kernel": "fused"} | options))


def _train(model, steps, bad=()):
    """Change the weights in each step, to NaN in bad ones only."""
    generator = torch.Generator().manual_seed(1)
    for step in range(1, steps + 1):
        with torch.no_grad():
            for tensor in (*model.parameters(), *model.buffers()):
                noise = torch.randn(tensor.shape, generator=generator).to(tensor.device)
                tensor.add_(noise.to(tensor.dtype))
            before = model[2].weight[0, 0].clone()
            if step in bad:
                model[2].weight[0, 0] = BAD
            yield step
            model[2].weight[0, 0] = before


class _Stream:
    """Stands for a device's: what is sent arrives when it is waited for, and not before."""

    def __init__(self):
        self.sent, self.waits = 0, 0

    def send(self, values):
        self.sent += 1
        return arrival.Arrival([value.clone() for value in values], [self])

    def query(self):
        return False

    def synchronize(self):
        self.waits += 1


class _Launches(TorchDispatchMode):
    """Counts what is launched, and what makes the host wait."""

    META = ("detach", "alias", "view", "select", "slice", "as_strided", "unbind", "empty", "expand", "t.default")

    def __init__(self):
        super().__init__()
        self.launched, self.waited = [], []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = str(function).removeprefix("aten.")
        if name.startswith(("_local_scalar_dense", "item", "is_nonzero", "equal", "nonzero")):
            self.waited.append(name)
        elif not name.startswith(self.META):
            self.launched.append(name)
        return function(*args, **(kwargs or {}))


@contextmanager
def _counted():
    """Count the launches and the waits of what is called."""
    stream, mode, launch = _Stream(), _Launches(), FusedCUDA._launch

    def counting(self, loop, *arguments, **constants):
        mode.launched.append(loop.__name__ if hasattr(loop, "__name__") else "triton")
        with torch.utils._python_dispatch._disable_current_modes():  # the interpreter's own work
            launch(self, loop, *arguments, **constants)

    with (
        patch.object(FusedCUDA, "_launch", counting),
        patch.object(verdict, "send", stream.send),
        patch("polyak.engine.holds.send", stream.send),
        mode,
    ):
        yield mode, stream


# Nothing waits


@CHECKS.collect(("hold", 5), ("propagate", 5), ("skip", 10), ("raise", 10))
def an_update_waits_for_nothing(on, nonfinite, most):
    model = _model(on)
    with _on(on):
        averager = _average(model, nonfinite=nonfinite)
        for step in _train(model, 4):
            if step < 4:
                averager.update()
                assert averager.n == step
                continue
            with _counted() as (launches, stream):
                averager.update()
            assert launches.waited == []
            assert stream.waits == 0
            assert 1 <= len(launches.launched) <= most, launches.launched
            assert stream.sent == (nonfinite != "propagate")


@CHECKS.collect()
def the_verdict_of_an_update_is_read_by_the_next_one(on):
    model = _model(on)
    with _on(on), patch.object(verdict, "send", (stream := _Stream()).send):
        averager, heard = _average(model), []
        averager.updater.listeners.append(lambda _, clock: heard.append((clock.n, clock.step, _stored(averager))))
        moved = {}
        for step in _train(model, 4, bad={3}):
            averager.update()
            assert stream.waits == step - 1
            moved[step] = _stored(averager)
        assert (averager.n, averager.skipped, stream.waits) == (3, 1, 4)
        assert [(n, step) for n, step, _ in heard] == [(1, 1), (2, 2), (3, 4)]
        for _, step, then in heard:  # what a listener sees is what its update has made
            assert all(torch.equal(tensor, then[name]) for name, tensor in moved[step].items())


def _stored(averager):
    """Return the averages as they are; averager.averages would settle the update first."""
    return {stored.name: stored.average.clone() for stored in averager.core._settled.stored}


# What it decides is what a look at once decides


@CHECKS.collect(*STRATEGIES)
def updates_with_nan_are_left_out_as_by_the_plain_loop(on, strategy):
    model = _model(on)
    with _on(on):
        averager = _average(model, strategy)
        assert averager.core.current().moves.verdict(averager.strategy.moves(1, 0.5)) is not None
    plain = _average(model, strategy, kernel="loop")
    for step in _train(model, 9, bad={1, 4, 5, 9}):
        with _on(on):
            averager.update()
        plain.update()
        if step % 2:  # read after some updates only
            assert (averager.n, averager.rate, averager.skipped) == (plain.n, plain.rate, plain.skipped)
    assert plain.skipped >= 3
    assert average_bits(averager) == average_bits(plain)
    assert averager.profile().shares.tolist() == plain.profile().shares.tolist()


@CHECKS.collect()
def short_averages_draw_as_if_skipped_updates_had_not_been(on):
    def run(bad, called):
        model = _model(on)
        with _on(on):
            averager = _average(model, dtype="bfloat16")
            for step in _train(model, 6, bad):
                if step in called:
                    averager.update(step=step)
            return average_bits(averager)

    assert run({3}, range(7)) == run({}, {1, 2, 4, 5, 6})


@CHECKS.collect()
def a_bank_leaves_out_what_each_of_its_averages_would(on):
    model = _model(on)
    with _on(on):
        bank = polyak.bank(
            model, {"ema": {"name": "ema", "decay": 0.9}, "mean": "swa"}, nonfinite="skip", kernel="fused"
        )
    alone = {"ema": _average(model, "ema", decay=0.9, kernel="loop"), "mean": _average(model, "swa", kernel="loop")}
    for _ in _train(model, 5, bad={2, 5}):
        with _on(on):
            bank.update()
        for averager in alone.values():
            averager.update()
    assert bank["mean"].skipped == bank["ema"].skipped == 2
    assert bank["mean"].core.pending is None
    for name, averager in alone.items():
        assert average_bits(bank[name]) == average_bits(averager)


@CHECKS.collect()
def raise_comes_with_the_next_update_and_names_the_step(on):
    model, raised = _model(on), {}
    with _on(on):
        averager = _average(model, nonfinite="raise")
        for step in _train(model, 5, bad={3}):
            before = _stored(averager)
            try:
                averager.update()
            except NonFiniteError as error:
                raised[step] = str(error)
            if step in {3, 4}:
                assert all(map(torch.equal, before.values(), _stored(averager).values()))
        assert (averager.n, averager.skipped) == (3, 0)
    assert [*raised] == [4]
    assert "at step 3 " in raised[4]
    assert "weights that are finite again" in raised[4]


@CHECKS.collect()
def reading_the_average_settles_it(on):
    model = _model(on)
    with _on(on):
        for read in (
            lambda averager: averager.n,
            lambda averager: averager.skipped,
            lambda averager: averager.averages,
            lambda averager: averager.module,
            lambda averager: averager.state_dict(),
            lambda averager: averager.averaged_state_dict(),
            lambda averager: averager.profile(),
            lambda averager: averager.describe(),
            lambda averager: averager.synchronize(),
            lambda averager: copy.deepcopy(averager),
        ):
            averager = _average(model)
            averager.update()
            assert averager.core.pending is not None
            read(averager)
            assert averager.core.pending is None


@CHECKS.collect()
def a_module_that_is_held_is_in_step(on):
    model = _model(on)
    with _on(on):
        averager = _average(model)
        module = averager.module
        for _ in _train(model, 2):
            averager.update()
            assert averager.core.pending is None
            assert torch.equal(module[2].weight, _stored(averager)["2.weight"])


@CHECKS.collect()
def what_takes_no_guard_is_looked_at_first(on):
    model = _model(on)
    with _on(on):
        averager = _average(model, kernel="foreach")
        for _ in _train(model, 3, bad={2}):
            averager.update()
            assert averager.core.pending is None
        assert (averager.n, averager.skipped) == (2, 1)


@CHECKS.collect()
def a_guard_is_lifted_by_an_update_that_does_not_look(on):
    model = _model(on)
    with _on(on):
        averager = _average(model, decay=0.5)
        for _ in _train(model, 1, bad={1}):
            averager.update()
        assert averager.skipped == 1
        before, moves = _stored(averager), averager.core.current().moves
        assert moves.prepare(averager.strategy.moves(1, 0.5), "propagate")
        moves.move(averager.core.state.generators)
        assert not torch.equal(before["0.weight"], _stored(averager)["0.weight"])


if __name__ == "__main__":
    warnings.filterwarnings("ignore", SKIPPED, PolyakWarning)
    CHECKS.run()
