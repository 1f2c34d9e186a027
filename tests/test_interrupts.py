"""Ctrl-C at any line of the package: a whole call or none of it, for every member of a bank."""

from __future__ import annotations

import sys
import threading
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from torch import nn

import polyak
from interrupts import at_line
from models import mlp
from polyak.engine.transaction import carry_out
from polyak.tensors.swap import in_force

EVERYTHING = (Path(polyak.__file__).parent,)
BANK = {
    "ema": {"name": "ema", "decay": 0.9},
    "plain": {"name": "ema", "decay": 0.5, "nonfinite": "propagate"},
    "double": {"name": "dema", "decay": 0.9},
    "rare": {"name": "ema", "decay": 0.9, "every": 3},
}


def trained(build, updates=2):
    """Return an averager that was updated, of a model whose weights were changed since."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))
    averager = build(model)
    for number in range(updates + 1):
        if number:
            averager.update()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(1.0)
    return averager


def seen(value):
    """Return all of a state as something that can be compared, random generators excepted."""
    if isinstance(value, torch.Tensor):
        return value.dtype, value.tolist()
    if isinstance(value, dict):
        return {key: seen(one) for key, one in value.items() if key != "generators"}
    return [*map(seen, value)] if isinstance(value, (list, tuple)) else value


def members(averager):
    return [*averager.values()] if isinstance(averager, Mapping) else [averager]


def torn(build, act, updates=2, points=30):
    """Interrupt a call at one line after another; return the lines that left something else than none or all of it."""
    averager = trained(build, updates)
    start = averager.state_dict()

    def again():
        averager.load_state_dict(start)
        for one in members(averager):
            one.averaged_state_dict()  # plans anew, outside of what is interrupted

    act(averager)  # which warns and compiles once
    again()
    none = seen(averager.state_dict())
    with at_line(EVERYTHING) as lines:
        act(averager)
    whole, wrong, outcomes = seen(averager.state_dict()), [], set()
    assert none != whole
    for k in range(0, len(lines), -(-len(lines) // points)):
        again()
        with pytest.raises(KeyboardInterrupt), at_line(EVERYTHING, k) as reached:
            act(averager)
        gradients = torch.is_grad_enabled()
        torch.set_grad_enabled(True)
        now = seen(averager.state_dict())
        if not gradients or now not in (none, whole):
            wrong.append(reached[-1])
        outcomes.add(now == whole)
    assert False in outcomes
    return wrong


def update(averager):
    averager.update()


@pytest.mark.parametrize(
    "settings",
    [
        {"strategy": "ema"},
        {"strategy": "ema", "kernel": "foreach"},
        {"strategy": "ema", "kernel": "loop", "dtype": "float64"},
        {"strategy": "dema", "kernel": "foreach"},
        {"strategy": "ema", "every": 5},
        {"strategy": "ema", "capturable": True, "nonfinite": "propagate"},
    ],
    ids=str,
)
def test_an_update_is_whole_or_absent(settings):
    assert not torn(lambda model: polyak.average(model, **settings), update)


def test_an_update_of_a_bank_is_whole_or_absent_for_every_member():
    assert not torn(lambda model: polyak.bank(model, BANK, kernel="foreach"), update)


@pytest.mark.filterwarnings("ignore:the weights hold NaN:polyak.PolyakWarning")
def test_a_bank_skips_an_update_whole_or_not_at_all():
    def spoilt(bank):
        weight = bank["a"].model[0].weight
        weight.data[0, 0] = torch.nan
        try:
            bank.update()
        finally:
            weight.data[0, 0] = 1.0

    assert not torn(
        lambda model: polyak.bank(model, {"a": "ema", "b": "dema"}, kernel="foreach", nonfinite="skip"), spoilt
    )


def test_a_call_of_a_bank_that_averages_nothing_is_counted_by_all_or_none():
    bank = {"a": {"name": "ema", "every": 7}, "b": {"name": "ema", "every": 5}}
    assert not torn(lambda model: polyak.bank(model, bank), update)


def test_a_bank_advances_whole_or_not_at_all():
    options = {"capturable": True, "nonfinite": "propagate", "kernel": "foreach"}
    assert not torn(lambda model: polyak.bank(model, {"a": "ema", "b": "ema"}, **options), lambda bank: bank.advance())


@pytest.mark.parametrize("names", [["ema"], ["ema", "double", "rare"]])
def test_a_state_is_loaded_whole_or_not_at_all(names):
    def build(model):
        chosen = {name: BANK[name] for name in names}
        return polyak.bank(model, chosen, kernel="foreach")

    state = trained(build, 5).state_dict()
    assert not torn(build, lambda bank: bank.load_state_dict(state))


def test_the_listeners_of_a_whole_update_are_called_once_whatever_interrupts_its_work():
    from polyak.engine.passes import Pass

    def build(model):
        return polyak.bank(model, {"a": "ema", "b": "dema"}, kernel="foreach")

    bank = trained(build)
    with at_line(EVERYTHING) as lines:
        bank.update()
    # Ctrl-C between the work and a listener, or between two listeners, can keep one from being called.
    calling = {f"passes.py:{number}" for *_, number in Pass.announce.__code__.co_lines()}
    worked = next(k for k, line in enumerate(lines) if line in calling) - 1
    for k in range(0, worked, 41):
        bank, heard = trained(build), []
        for averager in bank.values():
            averager.updater.listeners.append(lambda averager, clock, heard=heard: heard.append(clock.n))
        with pytest.raises(KeyboardInterrupt), at_line(EVERYTHING, k):
            bank.update()
        torch.set_grad_enabled(True)
        assert heard == ([3, 3] if bank["a"].n == 3 else [])


def test_what_cannot_be_finished_is_counted_where_it_was_made(monkeypatch):
    from polyak.engine.plan.moves import Moves

    bank = trained(lambda model: polyak.bank(model, {"a": "ema", "b": "dema"}))
    first = bank["a"].averages["0.weight"].clone()

    def full(*_):
        raise torch.OutOfMemoryError

    with monkeypatch.context() as patch:
        patch.setattr(Moves, "move", full)
        with pytest.raises(torch.OutOfMemoryError):
            bank.update()
    assert (bank["a"].n, bank["b"].n) == (3, 2)
    assert not torch.equal(bank["a"].averages["0.weight"], first)
    bank.update()
    assert (bank["a"].n, bank["b"].n) == (4, 3)


# Threads


@pytest.mark.filterwarnings("ignore:the weights have not changed:polyak.PolyakWarning")
@pytest.mark.parametrize("settings", [{}, {"every": 3}, {"kernel": "foreach"}], ids=str)
def test_updates_of_several_threads_are_all_counted(settings):
    averager = polyak.average(mlp(), "swa", **settings)
    with ThreadPoolExecutor(4) as pool:
        for future in [pool.submit(averager.update) for _ in range(300)]:
            future.result(60)
    state = averager.state_dict()
    assert state["progress"]["calls"] == 300
    assert averager.n == len(averager.profile()) == 300 // settings.get("every", 1)


@pytest.mark.filterwarnings("ignore:the weights have not changed:polyak.PolyakWarning")
def test_a_bank_and_one_of_its_averages_are_updated_by_two_threads():
    bank = polyak.bank(mlp(), {"a": "swa", "b": "swa"})
    with ThreadPoolExecutor(2) as pool:
        futures = [pool.submit(one.update) for one in (bank, bank["a"]) for _ in range(100)]
    assert [future.exception() for future in futures] == [None] * 200
    assert (bank["a"].n, bank["b"].n) == (200, 100)


def test_a_state_that_another_thread_takes_is_of_one_moment():
    model = {"w": torch.zeros(4096)}
    averager = polyak.average(model, "ema", decay=0.0)
    stop = threading.Event()

    def train():
        for number in range(1, 400):
            model["w"].fill_(float(number))
            averager.update()
        stop.set()

    with ThreadPoolExecutor(1) as pool:
        training = pool.submit(train)
        while not stop.is_set():
            state = averager.state_dict()
            assert state["slots"]["average"]["w"].unique().tolist() == [float(state["n"])]
        training.result(60)


def test_the_state_of_a_bank_that_another_thread_takes_is_of_one_moment():
    bank = polyak.bank(mlp(), {"a": "swa", "b": "swa"})
    updating = threading.Thread(target=bank.update)
    first = bank["a"].state_dict

    def state_dict():  # another thread updates between the states of two averages
        found = first()
        updating.start()
        updating.join(0.2)
        return found

    object.__setattr__(bank["a"], "state_dict", state_dict)
    state = bank.state_dict()["bank"]
    updating.join(60)
    assert {name: one["n"] for name, one in state.items()} == {"a": 0, "b": 0}
    assert bank["b"].n == 1


def test_a_step_of_the_optimiser_and_a_state_that_another_thread_takes_wait_for_each_other():
    model = mlp()
    averager = polyak.average(model, "ema", nonfinite="propagate")  # one pass, where Numba is
    optimizer = polyak.optim.AdamW(model.parameters(), averager=averager)
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()  # compiles
    before = [parameter.clone() for parameter in model.parameters()]
    stepping = threading.Thread(target=optimizer.step)
    with averager.lock:
        stepping.start()
        stepping.join(0.2)
        assert averager.n == 1
        assert not optimizer.one_pass or all(map(torch.equal, model.parameters(), before))
    stepping.join(60)
    assert averager.n == 2


def test_no_state_is_loaded_while_another_thread_enters_applied():
    model = mlp()
    averager = polyak.average(model, "ema")
    state = averager.state_dict()

    def evaluate():
        with averager.applied():
            model(torch.ones(2, 3))

    evaluating = threading.Thread(target=evaluate)
    with averager.lock:
        evaluating.start()
        evaluating.join(0.2)
        if evaluating.is_alive() and in_force:
            with pytest.raises(polyak.AppliedError, match="leave applied"):
                averager.load_state_dict(state)
    evaluating.join(60)
    averager.load_state_dict(state)


# Signal handlers


@pytest.mark.parametrize("build", [lambda m: polyak.average(m, "dema"), lambda m: polyak.bank(m, BANK)])
def test_a_signal_handler_gets_the_state_before_or_after_an_update_or_an_error(build):
    handled = []

    class Handler:  # at one line after another, as a signal would be handled there
        def __init__(self, k):
            self.k, self.carried_out = k, False

        def __call__(self, frame, event, _):
            if not frame.f_code.co_filename.startswith(str(EVERYTHING[0])):
                return None
            self.carried_out |= frame.f_code is carry_out.__code__
            if event == "line" and self.carried_out:
                self.k -= 1
                if not self.k:
                    sys.settrace(None)
                    try:
                        handled.append(seen(self.averager.state_dict()))
                    except polyak.StateError as error:
                        handled.append(str(error))
                    return None
            return self

    moments = set()
    for k in range(1, 2400, 7):
        averager = trained(build)
        before, count = seen(averager.state_dict()), len(handled)
        handler = Handler(k)
        handler.averager = averager
        sys.settrace(handler)
        averager.update()
        sys.settrace(None)
        if len(handled) == count:
            break
        states = {"before": before, "after": seen(averager.state_dict())}
        if isinstance(handled[-1], str):
            assert "from a signal handler" in handled[-1]
            moments.add("error")
        else:
            moment = [name for name, state in states.items() if state == handled[-1]]
            assert moment
            moments.add(moment[0])
    assert moments >= {"after", "error"}
