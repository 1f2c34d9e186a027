"""`polyak.optim.AdamW`: torch's fused AdamW with an average, number for number."""

from __future__ import annotations

import copy
import subprocess
import sys

import numpy as np
import pytest
import torch
from hypothesis import given, strategies as st
from torch import nn

import polyak
from models import ZOO, Tied, average_bits, mlp
from polyak.optim import AdamW
from twins import COMPILED, READY, Twins, needs_loops

# The same numbers

FLOATS = {"allow_nan": False, "allow_infinity": False}


SHAPES = st.lists(st.lists(st.integers(0, 9), max_size=3).map(tuple), min_size=1, max_size=5)


BETAS = st.tuples(st.sampled_from([0.0, 0.3, 0.5, 0.9, 0.999]), st.sampled_from([0.0, 0.5, 0.95, 0.999]))


@pytest.mark.property
@given(
    shapes=SHAPES,
    lr=st.floats(1e-9, 1, **FLOATS),
    betas=BETAS,
    eps=st.sampled_from([0.0, 1e-8, 1e-3]),
    weight_decay=st.sampled_from([0.0, 0.01, 0.5]),
    maximize=st.booleans(),
    decay=st.sampled_from([0.0, 0.3, 0.9999]),
    every=st.integers(1, 3),
    scale=st.sampled_from([1e-12, 1.0, 1e6]),
)
def test_weights_states_and_average_are_those_of_fused_adamw_and_attach(shapes, decay, every, scale, **settings):
    def build():
        return nn.ParameterList([nn.Parameter(torch.randn(shape)) for shape in shapes])

    twins = Twins(build, strategy={"strategy": "ema", "decay": decay}, options={"every": every}, **settings)
    twins.train(4, scale=scale)
    assert twins.one.one_pass is COMPILED
    twins.assert_equal()


@pytest.mark.parametrize("size", [1, 7, 8, 15, 16, 17, 100, 1001])
def test_work_that_is_cut_and_shared_among_threads_gives_the_same_numbers(many_slices, size):
    twins = Twins(lambda: nn.Linear(size, 3))
    twins.train()
    assert twins.one.one_pass is COMPILED
    twins.assert_equal()


@pytest.mark.parametrize("strategy", ["ema", "ema_debiased", "ema_v3", "swa", "ema_halflife", "power", "tail"])
@pytest.mark.parametrize("cadence", [{}, {"every": 3}, {"start": 4}], ids=str)
def test_every_strategy_of_one_move_keeps_its_clock(strategy, cadence):
    settings = {"halflife": 3} if strategy == "ema_halflife" else {}
    twins = Twins(mlp, strategy={"strategy": strategy, **settings}, options=cadence)
    twins.train(8)
    assert twins.one.one_pass is COMPILED
    twins.assert_equal()


@pytest.mark.parametrize("kind", [name for name in ZOO if name != "complex"])
def test_every_architecture_trains_as_with_torch(kind):
    twins = Twins(ZOO[kind].build, fused=True)
    twins.train()
    twins.assert_equal()


def test_the_step_is_that_of_the_equation_in_double_precision():
    torch.manual_seed(0)
    param, settings = nn.Parameter(torch.randn(1000)), {"lr": 0.01, "betas": (0.9, 0.99), "weight_decay": 0.1}
    averager = polyak.average({"w": param}, "ema", decay=0.75, **READY)
    optimizer = AdamW([param], averager=averager, **settings)
    weight, mean, square = param.detach().double().numpy(), np.zeros(1000), np.zeros(1000)
    average = weight.copy()
    for step in range(1, 21):
        param.grad = torch.randn(1000)
        gradient = param.grad.double().numpy()
        mean, square = mean + 0.1 * (gradient - mean), 0.99 * square + 0.01 * gradient**2
        scaled = (mean / (1 - 0.9**step)) / (np.sqrt(square / (1 - 0.99**step)) + 1e-8)
        weight = weight * (1 - 0.01 * 0.1) - 0.01 * scaled
        average += 0.25 * (weight - average)
        optimizer.step()
        assert optimizer.one_pass is COMPILED
    np.testing.assert_allclose(param.detach().numpy(), weight, rtol=0, atol=2e-6)
    np.testing.assert_allclose(averager.averages["w"].numpy(), average, rtol=0, atol=2e-6)


@needs_loops
def test_it_is_nearer_to_torchs_fused_kernel_than_torchs_own_loop_is():
    twins = Twins(lambda: nn.Linear(300, 30), lr=0.1)
    third = copy.deepcopy(twins.theirs)
    loop = torch.optim.AdamW(third.parameters(), lr=0.1, foreach=True)
    for seed in range(10):
        twins.give_gradients(seed)
        for ours, theirs in zip(third.parameters(), twins.theirs.parameters(), strict=True):
            ours.grad = theirs.grad.clone()
        for optimizer in (twins.one, twins.two, loop):
            optimizer.step()
    ours, apart = ((twins.theirs.weight - model.weight).abs().max().item() for model in (twins.ours, third))
    assert 0 < apart < 1e-5
    assert ours < apart


# Which tensors


def test_tied_weights_move_once():
    twins = Twins(Tied)
    twins.train()
    assert twins.one.one_pass is COMPILED
    twins.assert_equal()


def test_frozen_parameters_buffers_and_those_without_a_gradient_are_averaged_all_the_same():
    def build():
        model = nn.Sequential(nn.Linear(5, 20), nn.BatchNorm1d(20), nn.Linear(20, 3), nn.Linear(3, 2))
        model[0].requires_grad_(requires_grad=False)
        return model

    twins = Twins(build)
    for number in range(4):
        for model in (twins.ours, twins.theirs):
            model[0].weight.data.add_(1.0)
            model[1].running_mean.add_(0.5)
            model[1].num_batches_tracked.add_(1)
        twins.train(1, without={"2.bias", "3.weight"} if number % 2 else ())
        assert twins.one.one_pass is COMPILED
        twins.assert_equal()


def test_each_group_has_its_own_settings():
    def groups(model):
        first, *rest = model.parameters()
        return [{"params": [first], "lr": 0.5, "weight_decay": 0.0}, {"params": rest, "betas": (0.3, 0.9), "eps": 1e-3}]

    twins = Twins(mlp, groups=groups, weight_decay=0.1)
    twins.train()
    assert twins.one.one_pass is COMPILED
    twins.assert_equal()


def test_a_group_that_is_added_later_takes_part():
    twins = Twins(mlp, groups=lambda model: model[0].parameters())
    twins.train(2)
    for optimizer, model in ((twins.one, twins.ours), (twins.two, twins.theirs)):
        optimizer.add_param_group({"params": [*model[2].parameters()], "lr": 0.1})
    twins.train(2)
    assert twins.one.one_pass is COMPILED
    twins.assert_equal()


def test_parameters_that_are_not_averaged_are_trained_and_averages_of_other_dtypes_follow():
    for options in ({"exclude": "0.*"}, {"dtype": "float64"}):
        twins = Twins(mlp, options=options)
        twins.train()
        assert twins.one.one_pass is COMPILED
        twins.assert_equal()


def test_memory_that_moves_is_followed():
    twins = Twins(mlp)
    twins.train(2)
    for model, averager in ((twins.ours, twins.averager), (twins.theirs, twins.other)):
        model[0].weight.data = model[0].weight.data.clone()
        averager.averages["2.weight"].share_memory_()
    twins.train(2)
    assert twins.one.one_pass is COMPILED
    twins.assert_equal()


# What does not fit


class Holes(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(6, 8)[:, ::2])


class Overlapping(nn.Module):
    def __init__(self):
        super().__init__()
        whole = torch.randn(30)
        self.first, self.second = nn.Parameter(whole[:20]), nn.Parameter(whole[10:])


UNFIT = {
    "nonfinite='skip'": (mlp, {"options": {"nonfinite": "skip"}}),
    "nonfinite='raise'": (mlp, {"options": {"nonfinite": "raise"}}),
    "kernel='foreach'": (mlp, {"options": {"kernel": "foreach"}}),
    "amsgrad=True": (mlp, {"amsgrad": True}),
    "foreach=True": (mlp, {"foreach": True, "torchs": {"fused": None}}),
    "fused=None": (mlp, {"foreach": False, "torchs": {"fused": None}}),
    "fused=False": (mlp, {"fused": False, "foreach": False}),
    "moves more than the average": (mlp, {"strategy": {"strategy": "lawa", "window": 3}}),
    "capturable": (mlp, {"options": {"capturable": True}}),
    "decoupled_weight_decay=False": (
        mlp,
        {
            "groups": lambda model: [{"params": [*model.parameters()], "decoupled_weight_decay": False}],
            "weight_decay": 0.5,
        },
    ),
    "plain float32": (lambda: mlp().double(), {}),
    "without holes": (Holes, {"torchs": {"fused": None}}),
    "share memory": (Overlapping, {}),
}


@needs_loops
@pytest.mark.parametrize("why", UNFIT)
def test_what_does_not_fit_is_made_by_torch_and_the_averager(why):
    build, settings = UNFIT[why]
    twins = Twins(build, **settings)
    assert twins.one.describe() == "torch's AdamW, then averager.update(): no step was made yet"
    twins.train()
    assert not twins.one.one_pass
    assert why in twins.one.describe()
    twins.assert_equal()


@needs_loops
@pytest.mark.parametrize("fused", [None, True])
def test_gradients_that_lie_otherwise_are_left_to_torch_for_that_step(fused):
    # Torch's fused kernel reads such gradients in the wrong order: it is not chosen where nobody asked for it.
    twins = Twins(lambda: nn.Linear(4, 4), fused=fused)
    for number in range(3):
        twins.give_gradients(number)
        if number == 1:
            for model in (twins.ours, twins.theirs):
                model.weight.grad = model.weight.grad.t().contiguous().t()
            twins.two.param_groups[0]["fused"] = fused
        twins.one.step()
        twins.two.step()
        assert twins.one.one_pass == (number != 1)
        assert twins.one.param_groups[0]["fused"] is fused
        twins.assert_equal()
        twins.two.param_groups[0]["fused"] = True


@needs_loops
def test_gradients_in_the_memory_of_a_parameter_are_left_to_torch():
    twins = Twins(lambda: nn.Linear(4, 4))
    twins.give_gradients()
    twins.ours.bias.grad = twins.ours.weight.detach()[0]
    twins.one.step()
    assert "share memory" in twins.one.describe()


def test_sparse_gradients_are_refused_as_torch_does():
    model = nn.Embedding(5, 3, sparse=True)
    averager = polyak.average(model, **READY)
    optimizer = AdamW(model.parameters(), averager=averager)
    model(torch.tensor([1])).sum().backward()
    with pytest.raises(RuntimeError, match="does not support sparse gradients"):
        optimizer.step()
    assert averager.n == 0


@needs_loops
def test_without_gradients_the_average_moves_and_nothing_else():
    twins = Twins(mlp)
    twins.one.step()
    twins.two.step()
    assert "no parameter has a gradient" in twins.one.describe()
    assert average_bits(twins.averager) == average_bits(twins.other)
    assert twins.averager.n == twins.other.n == 1


def test_a_bank_is_updated_behind_each_step():
    model = mlp()
    bank = polyak.bank(model, {"short": {"name": "ema", "decay": 0.5}, "mean": "swa"}, **READY)
    optimizer = AdamW(model.parameters(), averager=bank)
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    optimizer.step()
    assert {averager.n for averager in bank.values()} == {2}
    assert "Bank" in optimizer.describe()


def test_without_an_averager_it_is_torchs():
    model = mlp()
    optimizer = AdamW(model.parameters())
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    assert "given no averager" in optimizer.describe()


@pytest.mark.slow
def test_without_numba_it_is_imported_and_works():
    code = """
import sys
sys.modules["numba"] = None
import torch, polyak, polyak.optim
model = torch.nn.Linear(2, 1)
averager = polyak.average(model, "ema", decay=0.5, nonfinite="propagate")
optimizer = polyak.optim.AdamW(model.parameters(), averager=averager)
model(torch.ones(1, 2)).sum().backward()
optimizer.step()
assert averager.n == 1 and "Numba" in optimizer.describe(), optimizer.describe()
"""
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)
