"""`polyak.optim.AdamW` behaves as torch's: hooks, closures, states, copies, interruptions."""

from __future__ import annotations

import copy
import gc
import pickle
import sys
import weakref

import pytest
import torch
from torch import nn

import polyak
from interrupts import at_line
from models import average_bits, bits, mlp, model_bits
from polyak.engine.plan import tensor_update
from polyak.kernels import compiler, threads
from polyak.optim import AdamW, adamw, fused as kernels, one_pass
from twins import COMPILED, READY, Twins, everything, needs_loops

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
