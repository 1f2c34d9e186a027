"""What the caller of an update gives: a rate, tensors in order, another model, a seed, a way of rounding."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

import polyak
from models import average_bits, drifting, mlp


def test_an_update_moves_by_a_rate_that_is_given():
    model = mlp()
    averager, plain = polyak.average(model, "swa"), polyak.average(model, "ema", decay=0.75)
    for _ in drifting(model, 4):
        averager.update(rate=0.25)
        plain.update()
    assert average_bits(averager) == average_bits(plain)
    assert averager.rate == 0.25
    assert averager.profile().shares.tolist() == plain.profile().shares.tolist()


def test_given_rates_and_those_of_the_strategy_may_alternate_and_are_resumed():
    model = mlp()
    averager = polyak.average(model, "swa")
    averager.update(rate=1)
    averager.update(rate=np.float32(0.5))
    averager.update()
    other = polyak.average(model, "swa")
    other.load_state_dict(averager.state_dict())
    assert other.profile().shares.tolist() == pytest.approx([1 / 3, 1 / 3, 1 / 3])
    other.update(rate=0.0)
    assert (other.n, other.rate) == (4, 0.0)


@pytest.mark.parametrize("rate", [-0.1, 1.1, math.nan, math.inf, "0.5", True, None.__class__])
def test_a_rate_that_is_none_is_refused(rate):
    averager = polyak.average(mlp(), "ema")
    with pytest.raises(polyak.ConfigError, match=r"rate: got .*; expected a number from 0"):
        averager.update(rate=rate)
    assert averager.n == 0


def test_strategies_of_several_tensors_take_no_rate():
    averager = polyak.average(mlp(), "dema")
    with pytest.raises(polyak.ConfigError, match="moves several tensors by rates of its own"):
        averager.update(rate=0.5)


@pytest.mark.parametrize("given", [lambda m: m.parameters(), lambda m: [*m.parameters()], lambda m: (*m.parameters(),)])
def test_tensors_in_order_are_a_model(given):
    model = mlp()
    averager, plain = polyak.average(given(model), "ema", decay=0.9), polyak.average(model, "ema", decay=0.9)
    for _ in drifting(model, 3):
        averager.update(given(model))
        plain.update()
    assert [*average_bits(averager).values()] == [*average_bits(plain).values()]
    plan = averager.plan
    averager.update(given(model))
    assert averager.plan is plan  # a new list of the same tensors is no other model
    other = mlp()
    averager.copy_to(given(other))
    assert torch.equal(other[0].weight, averager.averages["0"])


def test_a_bank_takes_tensors_in_order():
    model = mlp()
    bank = polyak.bank(model.parameters(), {"a": "ema", "b": "swa"})
    bank.update(model.parameters())
    assert [averager.n for averager in bank.values()] == [1, 1]


def test_another_list_is_another_model():
    averager = polyak.average([torch.zeros(2), torch.zeros(3)])
    with pytest.raises(polyak.MismatchError):
        averager.update([torch.zeros(2)])


def test_another_model_computes_with_the_average_in_a_context():
    model, other = mlp(), mlp()
    averager = polyak.average(model, "ema", decay=0.5)
    for _ in drifting(model, 2):
        averager.update()
    own, theirs = model[0].weight.clone(), other[0].weight.clone()
    average = averager.averages["0.weight"].clone()
    with averager.applied(other):
        assert torch.equal(other[0].weight, average)
        assert torch.equal(model[0].weight, own)
        assert torch.equal(averager.averages["0.weight"], average)
        with averager.applied(other), pytest.raises(polyak.AppliedError, match="another model"):
            averager.applied(model).__enter__()
        with pytest.raises(polyak.AppliedError):
            averager.update()
    assert torch.equal(other[0].weight, theirs)
    assert torch.equal(averager.averages["0.weight"], average)
    averager.update()
    with averager.applied(model), averager.applied():
        assert not torch.equal(model[0].weight, own)


def test_a_bank_applies_one_of_its_averages_to_another_model():
    model, other = mlp(), mlp()
    bank = polyak.bank(model, {"a": "ema", "b": "swa"})
    bank.update()
    with bank.applied("b", other):
        assert torch.equal(other[0].weight, model[0].weight)


def test_an_average_may_be_stored_as_the_model_is():
    model = torch.nn.Sequential(torch.nn.Linear(2, 2).bfloat16(), torch.nn.Linear(2, 2).double())
    kinds = {name: average.dtype for name, average in polyak.average(model, dtype="model").averages.items()}
    assert kinds == {name: parameter.dtype for name, parameter in model.named_parameters()}
    assert polyak.AveragerConfig(dtype="model").dtype == "model"


def short(**options):
    torch.manual_seed(0)
    model = mlp().bfloat16()
    averager = polyak.average(model, "ema", decay=0.99, dtype="model", **options)
    for _ in drifting(model, 6):
        averager.update()
    return averager


def test_a_seed_changes_what_is_drawn_and_nothing_else():
    assert average_bits(short(seed=0)) == average_bits(short())
    assert average_bits(short(seed=3)) == average_bits(short(seed=3))
    assert average_bits(short(seed=3)) != average_bits(short())


def test_rounding_to_the_nearest_loses_small_steps_and_random_rounding_keeps_them_in_the_mean():
    weights = {"w": torch.zeros(10_000, dtype=torch.bfloat16)}
    moved = {}
    for rounding in ("stochastic", "nearest"):
        weights["w"].fill_(1.0)
        averager = polyak.average(weights, "ema", decay=0.999, dtype="model", rounding=rounding)
        weights["w"].fill_(2.0)
        averager.update()
        moved[rounding] = float(averager.averages["w"].double().mean() - 1)
    assert moved["nearest"] == 0.0
    assert moved["stochastic"] == pytest.approx(0.001, rel=0.2)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("live", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_the_nearest_value_is_that_of_float32_rounded_once(dtype, live):
    torch.manual_seed(0)
    weights = {"w": torch.randn(5000).to(live)}
    averager = polyak.average(weights, "ema", decay=0.7, dtype=dtype, rounding="nearest")
    expected = averager.averages["w"].clone()
    for _ in range(3):
        weights["w"].copy_(torch.randn(5000))
        expected = expected.float().lerp(weights["w"].float(), 1 - 0.7).to(dtype)
        averager.update()
    assert torch.equal(averager.averages["w"], expected)


@pytest.mark.parametrize("option", [{"rounding": "up"}, {"seed": -1}, {"seed": 1.5}, {"dtype": "modle"}], ids=str)
def test_other_ways_are_refused(option):
    with pytest.raises(polyak.ConfigError, match=next(iter(option))):
        polyak.average(mlp(), **option)


@pytest.mark.parametrize("make", [lambda: polyak.average(mlp()), lambda: polyak.bank(mlp(), {"a": "ema"})])
def test_other_arguments_of_an_update_are_refused_in_words(make):
    made = make()
    for arguments, named in (((None, 3), {}), ((), {"decay": 0.5})):
        with pytest.raises(polyak.ArgumentError, match=r"update\(\) takes the model, step=.*configure\(decay=0.5\)"):
            made.update(*arguments, **named)


def test_a_bank_takes_no_rate():
    bank = polyak.bank(mlp(), {"a": "ema"})
    with pytest.raises(polyak.ArgumentError, match=r"got rate=0.1\. Each average has settings"):
        bank.update(rate=0.1)
    assert bank["a"].n == 0
