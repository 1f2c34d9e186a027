"""Offloaded averages: staged beside the training, averaged on another thread, exact all the same.

There is no accelerator here: what would be staged from one is staged from the CPU, by the same code.
"""

from __future__ import annotations

import copy
import os
import threading

import pytest
import torch

import polyak
from models import ZOO, average_bits, drifting, mlp
from polyak.engine.plan import moves, plan, tensor_update


@pytest.fixture
def offloaded(monkeypatch):
    """Averages are offloaded although the model is on the CPU."""
    monkeypatch.setattr(plan, "crosses", lambda average, live: True)


@pytest.fixture
def held(monkeypatch):
    """The other thread waits before it moves anything, until this event is set."""
    event = threading.Event()
    move = moves.Moves.update

    def late(self, *args, **kwargs):
        if threading.current_thread() is not threading.main_thread():
            assert event.wait(60)
        return move(self, *args, **kwargs)

    monkeypatch.setattr(moves.Moves, "update", late)
    return event


def test_only_averages_on_the_cpu_of_models_elsewhere_are_offloaded():
    here, there = torch.zeros(1), torch.zeros(1, device="meta")
    assert not plan.crosses(here, here)
    assert not plan.crosses(there, here)
    model = mlp()
    assert polyak.average(model, device="cpu").core.binding.plan.offload is None


EQUAL = [(kind, options) for kind in ZOO.values() for options in ({}, {"dtype": "float64"}, {"every": 2})]


# Rounding draws other numbers where tensors lie in memory in another order.
@pytest.mark.parametrize(("kind", "options"), [*EQUAL, (ZOO["mlp"], {"dtype": "bfloat16"})], ids=str)
def test_an_offloaded_average_equals_one_beside_the_model_bit_for_bit(kind, options, monkeypatch):
    model = kind.build()
    beside = polyak.average(model, "ema", decay=0.7, **options)
    with monkeypatch.context() as patch:
        patch.setattr(plan, "crosses", lambda average, live: True)
        away = polyak.average(model, "ema", decay=0.7, **options)
    assert away.core.binding.plan.offload is not None
    for _ in drifting(model, 12):
        beside.update()
        away.update()
    away.synchronize()
    assert average_bits(away) == average_bits(beside)
    assert (away.n, away.rate, [*away.profile().shares]) == (beside.n, beside.rate, [*beside.profile().shares])


def test_weights_that_change_while_the_average_is_moved_are_not_seen(offloaded, held):
    model = mlp()
    averager = polyak.average(model, "ema", decay=0.5)
    start = averager.averages["0.weight"].clone()
    with torch.no_grad():
        model[0].weight.fill_(1.0)
    averager.update()
    with torch.no_grad():
        model[0].weight.fill_(100.0)
    held.set()
    assert torch.equal(averager.averages["0.weight"], start.lerp(torch.ones(5, 3), 0.5))


def test_update_does_not_wait_and_whatever_reads_the_average_does(offloaded, held):
    model = mlp()
    reads = {
        "n": lambda a: a.n,
        "averages": lambda a: a.averages,
        "state_dict": lambda a: a.state_dict()["n"],
        "applied": lambda a: a.applied().__enter__(),
        "copy": lambda a: copy.deepcopy(a).n,
        "module": lambda a: a.module,
        "update": lambda a: a.update(),
        "synchronize": lambda a: a.synchronize(),
    }
    for name, read in reads.items():
        held.clear()
        averager = polyak.average(model, "ema", decay=0.5)
        averager.update()
        assert averager.core.pending is not None, name
        assert averager.core._settled.progress.n == 0, name
        threading.Timer(0.05, held.set).start()
        read(averager)
        assert averager.core._settled.progress.n == 1, name


@pytest.mark.filterwarnings("ignore:the weights hold NaN:polyak.PolyakWarning")
def test_weights_that_are_not_finite_are_skipped_when_that_is_known(offloaded):
    model = mlp()
    averager = polyak.average(model, "ema", decay=0.5, nonfinite="skip")
    averager.update()
    before = average_bits(averager)
    kept = model[0].weight.detach().clone()
    model[0].weight.data[0, 0] = torch.inf
    averager.update()
    model[0].weight.data.copy_(kept)
    assert (averager.n, averager.skipped) == (1, 1)
    assert average_bits(averager) == before
    averager.update()
    assert (averager.n, averager.skipped) == (2, 1)


def test_weights_that_are_not_finite_raise_at_the_next_call(offloaded):
    model = mlp()
    averager = polyak.average(model, "ema", nonfinite="raise")
    model[0].weight.data[0, 0] = torch.nan
    averager.update()
    with pytest.raises(polyak.NonFiniteError):
        averager.synchronize()
    assert averager.n == 0


def test_an_error_on_the_other_thread_is_raised_where_it_is_waited_for_and_once(offloaded, monkeypatch):
    model = mlp()
    averager = polyak.average(model, "ema", decay=0.5)
    before = average_bits(averager)

    def fail(*_, **__):
        message = "no memory"
        raise MemoryError(message)

    with monkeypatch.context() as patch:
        patch.setattr(tensor_update.TensorUpdate, "_move", fail)
        averager.update()
        with pytest.raises(MemoryError, match="no memory"):
            averager.synchronize()
    assert (averager.n, average_bits(averager)) == (0, before)
    averager.update()
    assert averager.n == 1


def test_the_tensors_that_were_not_finite_are_named(offloaded):
    model = mlp()
    averager = polyak.average(model, "ema")
    kept = model[0].weight.detach().clone()
    model[0].weight.data[0, 0] = torch.inf
    averager.update()
    model[0].weight.data.copy_(kept)
    with pytest.warns(polyak.PolyakWarning, match=r"1 of 0\.weight"):
        averager.synchronize()


def test_what_is_described_is_what_runs(offloaded):
    assert "fused" in polyak.average(mlp(), "ema", dtype="float64").describe()


def test_a_process_forked_during_an_update_says_so_and_does_not_hang(offloaded, held):
    averager = polyak.average(mlp(), "ema")
    averager.update()
    child = os.fork()
    if not child:
        code = 1
        try:
            averager.synchronize()
        except polyak.StateError:
            code = 0
        os._exit(code)
    assert os.waitpid(child, 0)[1] == 0
    held.set()
    assert averager.n == 1


def test_listeners_hear_of_an_update_when_it_is_done_and_in_the_calling_thread(offloaded):
    model, heard = mlp(), []
    averager = polyak.average(model, "ema")
    averager.updater.listeners.append(lambda _, clock: heard.append((clock.n, threading.current_thread())))
    averager.update()
    averager.synchronize()
    assert heard == [(1, threading.main_thread())]


def test_one_of_the_threads_that_wait_calls_the_listeners(offloaded, held):
    averager, heard = polyak.average(mlp(), "ema"), []
    averager.updater.listeners.append(lambda _, clock: heard.append(clock.n))
    averager.update()
    waiting = [threading.Thread(target=averager.synchronize) for _ in range(8)]
    for thread in waiting:
        thread.start()
    held.set()
    for thread in waiting:
        thread.join(60)
    assert heard == [1]


def test_a_replaced_parameter_is_followed(offloaded):
    model = mlp()
    averager = polyak.average(model, "ema", decay=0.5)
    averager.update()
    before = averager.averages["0.weight"].clone()
    model[0].weight = torch.nn.Parameter(torch.full((5, 3), 8.0))
    averager.update()
    assert torch.equal(averager.averages["0.weight"], before.lerp(torch.full((5, 3), 8.0), 0.5))


def test_averages_of_a_bank_may_be_offloaded(offloaded):
    model = mlp()
    bank = polyak.bank(model, {"a": {"name": "ema", "decay": 0.5}, "b": "swa"})
    for _ in drifting(model, 3):
        bank.update()
    bank.synchronize()
    assert [averager.n for averager in bank.values()] == [3, 3]


@pytest.mark.gpu
@pytest.mark.parametrize("options", [{}, {"dtype": "float64"}], ids=str)
def test_a_model_on_a_gpu_is_averaged_on_the_cpu_exactly(options):
    model = mlp().cuda()
    beside = polyak.average(model, "ema", decay=0.7, **options)
    away = polyak.average(model, "ema", decay=0.7, device="cpu", **options)
    for _ in drifting(model, 30):
        beside.update()
        away.update()
    for name, tensor in beside.averages.items():
        assert torch.equal(tensor.cpu(), away.averages[name])
