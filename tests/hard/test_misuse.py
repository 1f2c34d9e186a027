"""Misuse that would end in wrong averages without a word: no update, the average as the model, another model."""

from __future__ import annotations

import copy
import warnings

import pytest
import torch
from torch import nn

import polyak


def built(dtype=torch.float32):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.ReLU(), nn.Linear(4, 2)).to(dtype)


def train(model, steps, each=lambda: None, optimizer=torch.optim.SGD):
    stepper = optimizer(model.parameters(), lr=0.01)
    dtype = next(model.parameters()).dtype
    for _ in range(steps):
        model(torch.ones(5, 3, dtype=dtype) + torch.randn(5, 3).to(dtype)).square().sum().backward()
        stepper.step()
        stepper.zero_grad()
        each()


def applied(averager):
    with averager.applied():
        pass


READINGS = {
    "applied": applied,
    "module": lambda averager: averager.module,
    "call": lambda averager: averager(torch.ones(5, 3)),
    "averaged_state_dict": lambda averager: averager.averaged_state_dict(),
    "copy_to": lambda averager: averager.copy_to(built()),
}

NEVER = "never been updated although the weights have changed; call averager.update"


@pytest.mark.parametrize("read", READINGS.values(), ids=READINGS)
def test_an_average_that_was_never_updated_warns_once_where_it_is_read(read):
    model = built()
    averager = polyak.average(model, "ema", decay=0.9)
    train(model, 20)
    with pytest.warns(polyak.PolyakWarning, match=NEVER) as caught:
        read(averager)
    assert caught[0].filename == __file__
    read(averager)


@pytest.mark.parametrize("optimizer", [torch.optim.Adam, torch.optim.SGD])
def test_a_member_of_a_bank_that_was_never_updated_warns(optimizer):
    model = built()
    bank = polyak.bank(model, {"a": "ema", "mean": "swa"})
    train(model, 20, optimizer=optimizer)
    with pytest.warns(polyak.PolyakWarning, match=NEVER), bank.applied("mean"):
        pass


def test_an_average_that_waits_for_its_start_is_no_mistake():
    model = built()
    averager = polyak.average(model, "ema", start=100, every=10)
    train(model, 20, averager.update)
    for read in READINGS.values():
        read(averager)
    assert averager.n == 0


def test_weights_that_are_loaded_after_the_averager_was_built_are_no_mistake():
    model, ready = built(), built()
    averager = polyak.average(model, "ema")
    saved = polyak.average(ready, "ema").state_dict()
    for _ in range(3):
        model.load_state_dict(ready.state_dict())
    applied(averager)
    averager.load_state_dict(saved)
    train(model, 20)
    applied(averager)


def test_statistics_that_are_measured_before_the_first_update_are_no_mistake():
    model = built()
    averager = polyak.average(model, "ema")
    for _ in range(20):
        model(torch.randn(5, 3))
    applied(averager)


def test_many_evaluations_before_the_first_step_are_no_mistake():
    averager = polyak.average(built(), "ema")
    for _ in range(30):
        applied(averager)
    averager.averaged_state_dict()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_averaged_module_is_refused_as_the_model(dtype):
    model = built(dtype)
    averager = polyak.average(model, "ema", decay=0.5)
    train(model, 1, averager.update)
    before, teacher = averager.state_dict(), averager.module
    for given in (teacher, nn.DataParallel(teacher), teacher):
        with pytest.raises(polyak.MismatchError, match=r"the model is the average itself.*the model that is trained"):
            averager.update(given)
    after = averager.state_dict()
    assert after["n"] == before["n"] == 1
    assert all(torch.equal(after["slots"]["average"][k], t) for k, t in before["slots"]["average"].items())
    averager.update()
    assert averager.n == 2


def test_tensors_of_the_average_are_refused_as_the_model_wherever_they_lie():
    model = built()
    bank = polyak.bank(model, {"a": "ema", "b": "swa"})
    with pytest.raises(polyak.MismatchError, match=r"the model is the average itself \(0.weight shares its memory\)"):
        bank.update({name: tensor.detach() for name, tensor in bank["b"].averages.items()})
    assert bank["a"].n == bank["b"].n == 0
    averager = polyak.average(model, "ema")
    model[3].weight = nn.Parameter(averager.averages["3.weight"])
    with pytest.raises(polyak.MismatchError, match=r"3.weight shares its memory"):
        averager.update()


def test_an_average_can_be_averaged_by_another_averager_and_copied_models_can_be_given():
    model = built()
    inner = polyak.average(model, "ema", decay=0.5)
    outer = polyak.average(inner.module, "swa")
    train(model, 3, lambda: (inner.update(), outer.update(inner.module)))
    inner.update(copy.deepcopy(model))
    inner.update(copy.deepcopy(inner.module))
    assert (inner.n, outer.n) == (5, 3)


@pytest.mark.parametrize("strategy", ["ema", "swa", "lawa"])
def test_a_model_that_was_built_again_after_the_averager_is_named(strategy):
    model = built()
    averager = polyak.average(model, strategy)
    model = built()
    with pytest.warns(polyak.PolyakWarning, match="have not changed in 127 updates; was the model built again") as told:
        train(model, 140, averager.update)
    assert len(told) == 1
    assert told[0].filename == __file__


def written_through_data(model, averager):
    for _ in range(140):
        for parameter in model.parameters():
            parameter.data.add_(0.01)
        averager.update()


def frozen_but_for_one(model, averager):
    for parameter in [*model.parameters()][:-1]:
        parameter.requires_grad_(False)
    train(model, 140, averager.update, optimizer=torch.optim.Adam)


def frozen_but_run(model, averager):
    model.requires_grad_(False)[0].weight.requires_grad_(True)
    for _ in range(140):
        model(torch.ones(5, 3))
        averager.update()


def not_to_be_trained(model, averager):
    model.requires_grad_(False)
    for _ in range(140):
        averager.update()


def trained_late(model, averager):
    for _ in range(100):
        averager.update()
    train(model, 40, averager.update)


@pytest.mark.parametrize(
    "run", [written_through_data, frozen_but_for_one, frozen_but_run, not_to_be_trained, trained_late]
)
def test_weights_that_change_are_not_doubted(run):
    model = built()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        averager = polyak.average(model, "ema", decay=0.9)
        run(model, averager)
    assert averager.n == 140
