"""`polyak.optim.AdamW`: torch's fused AdamW with an attached averager, number for number, in one pass or not."""

from __future__ import annotations

import copy
import gc
import pickle
import platform
import subprocess
import sys
import weakref

import numpy as np
import pytest
import torch
from hypothesis import given, strategies as st
from torch import nn

import polyak
from interrupts import at_line
from models import ZOO, Tied, average_bits, bits, mlp, model_bits
from polyak.engine.plan import tensor_update
from polyak.kernels import compiler, threads
from polyak.kernels.select import compiles
from polyak.optim import AdamW, adamw, fused as kernels, one_pass

READY = {"nonfinite": "propagate"}
COMPILED = compiles("auto")  # else torch makes the steps, and the numbers are its own
# Torch's kernel was seen to round as ours does wherever it is compiled for these; elsewhere they are only near.
EXACT = not COMPILED or platform.machine() in {"x86_64", "AMD64"}
needs_loops = pytest.mark.skipif(not COMPILED, reason="only compiled loops make one pass")


class Twins:
    """Two equal models: one is trained by ours, the other by torch's AdamW with the averager attached."""

    def __init__(self, build, *, groups=None, strategy=None, options=None, torchs=None, **settings):
        torch.manual_seed(0)
        self.ours = build()
        torch.manual_seed(0)
        self.theirs = build()
        groups = groups or (lambda model: model.parameters())
        strategy, options = strategy or {"strategy": "ema", "decay": 0.9}, {**READY, **(options or {})}
        self.averager, self.other = (polyak.average(model, **strategy, **options) for model in (self.ours, self.theirs))
        self.one = AdamW(groups(self.ours), averager=self.averager, **settings)
        self.two = torch.optim.AdamW(groups(self.theirs), **{"fused": True, **settings, **(torchs or {})})
        polyak.attach(self.two, self.other)

    def give_gradients(self, seed=0, *, scale=1.0, without=()):
        generator = torch.Generator().manual_seed(seed)
        pairs = zip(self.ours.named_parameters(), self.theirs.parameters(), strict=True)
        for (name, ours), theirs in pairs:
            ours.grad = theirs.grad = None
            if name not in without and ours.requires_grad:
                gradient = torch.empty_like(ours).copy_(torch.randn(ours.shape, generator=generator) * scale)
                ours.grad, theirs.grad = gradient.clone(), gradient.clone()

    def train(self, steps=3, **gradients):
        for seed in range(steps):
            self.give_gradients(seed, **gradients)
            self.one.step()
            self.two.step()

    def assert_equal(self):
        ours = everything(self.ours, self.one, self.averager)
        theirs = everything(self.theirs, self.two, self.other)
        assert [*ours] == [*theirs]
        for name, tensor in ours.items():
            assert_near(tensor, theirs[name])
            assert not EXACT or bits(tensor) == bits(theirs[name]), name
        assert (self.averager.n, self.averager.rate) == (self.other.n, self.other.rate)
        assert self.averager.profile().shares.tolist() == self.other.profile().shares.tolist()


def everything(model, optimizer, averager):
    """Return copies of the weights, the states and the average."""
    named = [(f"{i} {name}", t) for i, p in enumerate(model.parameters()) for name, t in optimizer.state[p].items()]
    found = {**model.state_dict(), **dict(named), **{f"average {k}": t for k, t in averager.averages.items()}}
    return {name: tensor.detach().clone() for name, tensor in found.items()}


def assert_near(ours, theirs):
    """Hold what a step rounds against each other with a tolerance, everything else bit for bit."""
    if ours.dtype in (torch.float32, torch.float64):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5, equal_nan=True)
    else:
        assert bits(ours) == bits(theirs)


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


# An optimiser of torch's


def test_hooks_run_once_and_in_torchs_order_whatever_optimisers_there_are():
    torch.optim.AdamW([nn.Parameter(torch.zeros(1))]), torch.optim.Adam([nn.Parameter(torch.zeros(1))])
    for settings in ({}, {"options": {"nonfinite": "skip"}}):
        twins = Twins(mlp, **settings)
        heard = []
        twins.one.register_step_pre_hook(lambda *_, heard=heard: heard.append("before"))
        twins.one.register_step_post_hook(lambda *_, heard=heard, twins=twins: heard.append(twins.averager.n))
        twins.give_gradients()
        twins.one.step()
        assert heard == ["before", 1]


def test_a_closure_is_evaluated_once_with_gradients_and_its_loss_returned():
    twins = Twins(mlp)
    calls = []

    def closure():
        calls.append(torch.is_grad_enabled())
        twins.one.zero_grad()
        loss = twins.ours(torch.ones(2, 3)).square().sum()
        loss.backward()
        return loss

    with torch.no_grad():
        loss = twins.one.step(closure)
    assert calls == [True]
    assert loss.item() > 0
    assert twins.one.one_pass is COMPILED
    assert twins.averager.n == 1


def test_schedulers_change_the_rate_of_both():
    twins = Twins(mlp, lr=0.1)
    schedules = [torch.optim.lr_scheduler.StepLR(optimizer, 2, 0.1) for optimizer in (twins.one, twins.two)]
    for seed in range(6):
        twins.give_gradients(seed)
        twins.one.step()
        twins.two.step()
        for schedule in schedules:
            schedule.step()
        twins.assert_equal()
    assert twins.one.one_pass is COMPILED


def test_learning_rates_in_tensors_are_read():
    twins = Twins(mlp, lr=torch.tensor(0.1))
    twins.train()
    assert twins.one.one_pass is COMPILED
    twins.assert_equal()


def test_states_are_loaded_from_torchs_and_by_it():
    twins = Twins(mlp, lr=0.1, weight_decay=0.3)
    twins.train(2)
    ours, theirs = twins.one.state_dict(), twins.two.state_dict()
    assert [*ours] == [*theirs]
    assert ours["param_groups"] == [{**group, "fused": None} for group in theirs["param_groups"]]
    twins.one.load_state_dict(theirs)
    twins.two.load_state_dict(ours)
    twins.two.param_groups[0]["fused"] = True
    twins.train(2)
    assert twins.one.one_pass is COMPILED
    twins.assert_equal()


def test_states_of_torchs_default_adamw_are_loaded_and_go_on_in_one_pass():
    twins = Twins(mlp)
    loop = torch.optim.AdamW(copy.deepcopy(twins.ours).parameters())
    for parameter in loop.param_groups[0]["params"]:
        parameter.grad = torch.ones_like(parameter)
    loop.step()
    for optimizer in (twins.one, twins.two):
        optimizer.load_state_dict(copy.deepcopy(loop.state_dict()))
    assert twins.one.param_groups[0]["fused"] is None
    twins.two.param_groups[0]["fused"] = True
    twins.train(2)
    assert twins.one.one_pass is COMPILED
    twins.assert_equal()


@pytest.mark.parametrize("overflow", [False, True])
@pytest.mark.parametrize("fused", [None, True])
def test_a_scaler_leaves_steps_out_that_overflow(fused, overflow):
    twins = Twins(mlp, fused=fused)
    scalers = [torch.amp.GradScaler("cpu", init_scale=1024.0) for _ in range(2)]
    inputs = torch.full((2, 3), torch.inf if overflow else 1.0)
    pairs = ((twins.ours, twins.one), (twins.theirs, twins.two))
    for scaler, (model, optimizer) in zip(scalers, pairs, strict=True):
        scaler.scale(model(inputs).square().sum()).backward()
        scaler.step(optimizer)
        scaler.update()
    assert twins.averager.n == twins.other.n == (0 if overflow else 1)
    twins.assert_equal()


def test_copies_have_no_averager_and_go_on_as_torchs():
    twins = Twins(mlp)
    twins.train(2)
    for copied in (copy.deepcopy(twins.one), pickle.loads(pickle.dumps(twins.one))):
        for parameter in copied.param_groups[0]["params"]:
            parameter.grad = torch.ones_like(parameter)
        copied.step()
        assert "given no averager" in copied.describe()
    assert twins.averager.n == 2


@needs_loops
def test_autograd_notices_that_weights_were_written():
    twins = Twins(lambda: nn.Linear(3, 1))
    twins.give_gradients()
    loss = twins.ours(torch.ones(1, 3, requires_grad=True)).sum()
    version, stored = twins.ours.weight._version, twins.averager.averages["weight"]._version
    twins.one.step()
    assert twins.one.one_pass is COMPILED
    assert twins.ours.weight._version > version
    assert twins.averager.averages["weight"]._version > stored
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@needs_loops  # what torch makes in that mode cannot be trained afterwards
def test_gradients_are_left_as_they_are_and_modes_too():
    twins = Twins(mlp, maximize=True)
    twins.give_gradients()
    before = [bits(parameter.grad) for parameter in twins.ours.parameters()]
    with torch.inference_mode():
        twins.one.step()
    assert torch.is_grad_enabled()
    assert [bits(parameter.grad) for parameter in twins.ours.parameters()] == before
    twins.two.step()
    twins.train(1)
    twins.assert_equal()


# As attach


@pytest.mark.parametrize(
    ("averager", "error", "says"),
    [
        (lambda _: {}, polyak.ConfigError, "got dict as the averager"),
        (lambda _: polyak.average(mlp(), **READY), polyak.MismatchError, "none of the optimiser's 4 tensors"),
        (lambda model: pickle.loads(pickle.dumps(polyak.average(model))), polyak.UnboundError, "unpickled"),
    ],
)
def test_what_attach_refuses_is_refused(averager, error, says):
    model = mlp()
    with pytest.raises(error, match=says):
        AdamW(model.parameters(), averager=averager(model))


def test_attaching_the_averager_again_is_refused():
    twins = Twins(mlp)
    with pytest.raises(polyak.ConfigError, match="attached to this optimiser already"):
        polyak.attach(twins.one, twins.averager)


@needs_loops
def test_a_rate_of_one_replaces_an_average_that_is_not_finite():
    twins = Twins(mlp, strategy={"strategy": "swa"})
    for averager in (twins.averager, twins.other):
        averager.averages["0.weight"].fill_(torch.nan)
    twins.train(1)
    assert twins.one.one_pass is COMPILED
    twins.assert_equal()
    assert not twins.averager.averages["0.weight"].isnan().any()


def test_listeners_hear_of_each_update():
    twins = Twins(mlp, options={"every": 2})
    heard = []
    twins.averager.updater.listeners.append(lambda averager, clock: heard.append((averager.n, clock.step, clock.lr)))
    twins.train(5)
    assert heard == [(1, 2, 1e-3), (2, 4, 1e-3)]


def test_weights_that_are_not_finite_reach_the_average_where_that_is_wanted():
    twins = Twins(mlp)
    twins.give_gradients()
    for model in (twins.ours, twins.theirs):
        model[0].weight.grad[0, 0] = torch.nan
    twins.one.step()
    twins.two.step()
    assert twins.averager.averages["0.weight"].isnan().sum() == 1
    assert twins.other.averages["0.weight"].isnan().sum() == 1


# Whole or absent


def test_a_step_with_the_average_in_the_model_changes_nothing():
    twins = Twins(mlp)
    twins.train(2)
    twins.give_gradients(5)
    held = everything(twins.ours, twins.one, twins.averager)
    before = {name: bits(tensor) for name, tensor in held.items()}
    with twins.averager.applied():
        applied = model_bits(twins.ours)
        with pytest.raises(polyak.AppliedError):
            twins.one.step()
        assert model_bits(twins.ours) == applied
    after = everything(twins.ours, twins.one, twins.averager)
    assert {name: bits(tensor) for name, tensor in after.items()} == before
    twins.one.step()
    twins.give_gradients(5)
    twins.two.step()
    twins.assert_equal()


@needs_loops
@pytest.mark.parametrize(
    ("steps", "options"), [(0, {}), (1, {"every": 3}), (2, {"every": 3}), (2, {"dtype": "float64"})]
)
def test_ctrl_c_at_any_line_leaves_step_and_update_made_or_not(many_slices, steps, options):
    made = [sys.modules["torch.optim.adam"]] if not steps else []  # makes the states
    modules = (one_pass, adamw, kernels, threads, tensor_update, *made)
    twins = Twins(lambda: nn.Sequential(nn.Linear(5, 10, bias=False), nn.BatchNorm1d(10)), options=options)
    twins.train(steps)
    parts = twins.ours, twins.one, twins.averager
    states = copy.deepcopy([part.state_dict() for part in parts])

    def begin():
        for part, state in zip(parts, copy.deepcopy(states), strict=True):
            part.load_state_dict(state)
        twins.give_gradients(9)

    def now():
        made = [bits(t) for s in twins.one.state.values() if s.get("step", 0) > 0 for t in s.values()]
        averager = twins.averager
        return model_bits(twins.ours), made, average_bits(averager), averager.n, averager.progress.calls

    begin()
    twins.one.step()  # what is compiled once is not counted
    begin()
    old = now()
    with at_line(modules) as lines:
        twins.one.step()
    assert twins.one.one_pass is COMPILED
    new, wrong, struck = now(), [], 0
    first_and_last = {*map(lines.index, lines), *{line: k for k, line in enumerate(lines)}.values()}
    for k in sorted(first_and_last):
        begin()
        try:  # how many lines this thread runs depends on how many slices the others take
            with at_line(modules, k):
                twins.one.step()
        except KeyboardInterrupt:
            struck += 1
        # A tracer raises between a block and its __exit__, too, where no signal is handled.
        torch.set_grad_enabled(True)
        found = now()
        if found == old:
            twins.one.step()
        if found not in (old, new) or now() != new:
            wrong.append(lines[k])
    assert not wrong
    assert struck > 0.9 * len(first_and_last)


# What it must not do


@needs_loops
@pytest.mark.parametrize("what", ["param", "grad", "exp_avg"])
def test_memory_that_was_freed_is_not_touched_and_torch_says_so(what):
    model, other = mlp(), nn.Parameter(torch.ones(5000))
    optimizer = AdamW([*model.parameters(), other], averager=polyak.average(model, "ema", **READY), fused=True)
    for param in optimizer.param_groups[0]["params"]:
        param.grad = torch.ones_like(param)
    optimizer.step()
    assert optimizer.one_pass is COMPILED
    freed = {"param": other.data, "grad": other.grad, "exp_avg": optimizer.state[other]["exp_avg"]}[what]
    freed.untyped_storage().resize_(0)
    with pytest.raises(RuntimeError, match="not allocated"):
        optimizer.step()
    assert "have no memory" in optimizer.describe()


@needs_loops
def test_steps_that_are_counted_together_are_left_to_torch():
    twins = Twins(mlp)
    twins.train(1)
    for optimizer in (twins.one, twins.two):
        shared = next(iter(optimizer.state.values()))["step"]
        for state in optimizer.state.values():
            state["step"] = shared
    twins.train(2)
    assert "share their count" in twins.one.describe()
    twins.assert_equal()


def test_the_step_by_which_torch_makes_a_state_to_load_into_is_no_update():
    from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_optimizer_state_dict

    twins = Twins(mlp)
    twins.train(3)
    saved = get_optimizer_state_dict(twins.ours, twins.one)
    model, averager = mlp(), None
    averager = polyak.average(model, "ema", decay=0.9, **READY)
    averager.load_state_dict(twins.averager.state_dict())
    optimizer = AdamW(model.parameters(), averager=averager)
    set_optimizer_state_dict(model, optimizer, saved)
    assert averager.n == 3
    assert average_bits(averager) == average_bits(twins.averager)


@needs_loops
def test_old_moments_are_gone_once_others_are_loaded_and_used():
    twins = Twins(mlp)
    twins.train(2)
    state = copy.deepcopy(twins.one.state_dict())
    old = weakref.ref(next(iter(twins.one.state.values()))["exp_avg"])
    gc.disable()
    try:
        twins.one.load_state_dict(state)
        twins.give_gradients(7)
        twins.one.step()
        assert twins.one.one_pass is COMPILED
        assert old() is None
    finally:
        gc.enable()


@needs_loops
def test_loops_that_cannot_be_compiled_leave_the_step_to_torch_and_warn_once(monkeypatch):
    monkeypatch.setitem(sys.modules, "polyak.kernels.cpu.adamw_loops", None)
    monkeypatch.delattr("polyak.kernels.cpu.adamw_loops", raising=False)
    monkeypatch.setattr(compiler, "_BROKEN", set())
    kernels.works.cache_clear()
    twins = Twins(mlp)
    try:
        with pytest.warns(polyak.PolyakWarning, match="numba is installed but compiles no kernel"):
            twins.train(1)
        twins.train(2)
    finally:
        kernels.works.cache_clear()
    assert "Numba" in twins.one.describe()
    twins.assert_equal()


def test_a_call_of_update_between_the_steps_is_left_out_with_one_warning():
    twins = Twins(mlp)
    twins.train(2)
    with pytest.warns(polyak.PolyakWarning, match=r"polyak\.optim\.AdamW already updated this averager in its step"):
        twins.averager.update()
    twins.train(2)
    twins.averager.update()
    assert twins.averager.n == 4
    twins.assert_equal()
    twins.averager.load_state_dict(twins.other.state_dict())
    twins.train(1)
    assert twins.averager.n == 5


def test_it_tells_its_averager_which_cannot_be_exchanged():
    twins = Twins(mlp)
    assert twins.one.averager is twins.averager
    with pytest.raises(AttributeError):
        twins.one.averager = twins.other


def test_an_averager_in_the_place_of_the_learning_rate_is_refused():
    model = mlp()
    with pytest.raises(polyak.ConfigError, match="by its name: averager="):
        AdamW(model.parameters(), polyak.average(model, "ema"))
