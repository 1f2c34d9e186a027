"""Updates with wrong steps, learning rates or at the wrong moment are refused before anything moves."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

import polyak
from models import ZOO, drifting, mlp
from refusals import averager_of, refused, used

# Calls that need the model's own weights


def test_nothing_that_needs_the_models_own_weights_runs_inside_applied():
    model = mlp()
    averager = used(model)
    state = averager.state_dict()
    with averager.applied():
        with refused(averager, polyak.AppliedError, "update() while the model holds the average", "leave applied()"):
            averager.update()
        with refused(averager, polyak.AppliedError, "update()"):
            averager.update(mlp())
        with refused(averager, polyak.AppliedError, "copy_to() while the model holds the average"):
            averager.copy_to()
        with refused(averager, polyak.AppliedError, "load_state_dict()"):
            averager.load_state_dict(state)
        with refused(averager, polyak.AppliedError, "no weights to start from", "leave applied()"):
            polyak.average(model)
    averager.update()


def test_an_averager_without_a_model_says_so():
    import pickle

    model = mlp()
    averager = pickle.loads(pickle.dumps(used(model)))
    for call in (averager.update, averager.copy_to, averager.averaged_state_dict, lambda: averager.module):
        with refused(averager, polyak.UnboundError, "no model", "averager.update(model)"):
            call()
    averager.update(model)
    assert averager.averaged_state_dict().keys() == model.state_dict().keys()


STEPS = [
    1.5,
    3.0,
    "3",
    -1,
    True,
    np.bool_(1),
    torch.tensor(True),
    torch.tensor(1.5),
    torch.tensor([1, 2]),
    2**63,
    2**64,
]


@pytest.mark.parametrize("step", STEPS, ids=repr)
def test_a_step_that_is_no_count_is_refused_before_anything_moves(step):
    model = mlp()
    averager = used(model)
    bank = polyak.bank(model, {"one": "swa", "other": {"name": "ema", "decay": 0.5}})
    bank.update()
    for _ in drifting(model, 1):
        with refused(averager, polyak.ConfigError, "step: got", "expected the count of optimiser steps so far"):
            averager.update(step=step)
        for member in bank.values():
            with refused(member, polyak.ConfigError, "step: got"):
                bank.update(step=step)


@pytest.mark.parametrize(
    "step", [7, np.int32(7), np.uint64(7), np.array(7), torch.tensor(7), torch.tensor([7])], ids=repr
)
def test_a_step_of_numpy_or_torch_is_an_integer_and_is_saved_as_one(step):
    averager = used(mlp())
    averager.update(step=step)
    assert averager.state_dict()["step"] == 7
    assert type(averager.state_dict()["step"]) is int


def test_steps_that_add_up_to_more_than_the_history_holds_are_refused():
    averager = polyak.average(mlp(), "ema", decay=0.5)
    averager.update(step=1)
    averager.update(step=2**62)
    assert averager.profile().steps.tolist() == [1, 2**62]
    with pytest.warns(polyak.PolyakWarning, match="went back"):
        averager.update(step=5)
    with refused(averager, polyak.ConfigError, "averaged steps in all"):
        averager.update(step=2**63 - 1)
    for option in ("every", "start"):
        with pytest.raises(polyak.ConfigError, match=rf"{option}: Input should be less than .*\(got 1844"):
            polyak.average(mlp(), "ema", **{option: 2**64})


def test_a_step_that_is_counted_past_the_largest_is_refused():
    averager = polyak.average(mlp(), "ema", decay=0.5)
    averager.update(step=2**63 - 1)
    with refused(averager, polyak.ConfigError, "step: got 9223372036854775808"):
        averager.update()


@pytest.mark.parametrize("lr", [float("nan"), float("inf"), "0.1", True, torch.tensor([0.1, 0.2]), [0.1], 1j], ids=repr)
def test_a_learning_rate_that_is_no_finite_number_is_refused_before_anything_moves(lr):
    averager = used(mlp())
    with refused(averager, polyak.ConfigError, "lr: got", "expected the learning rate of this step, a finite number"):
        averager.update(lr=lr)


@pytest.mark.parametrize("lr", [0.25, np.float32(0.25), np.array(0.25), torch.tensor(0.25), torch.tensor([0.25]), 1, 0])
def test_a_learning_rate_of_numpy_or_torch_is_a_float(lr):
    seen = []

    class Looking(polyak.SWA):
        def weight(self, clock):
            seen.append(clock.lr)
            return 1.0

    averager = polyak.average(mlp(), Looking())
    averager.update(lr=lr)
    assert seen == [float(lr)]
    assert type(seen[0]) is float


# Weights


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("kind", ["mlp", "conv", "complex", "mixed_dtypes"])
def test_nonfinite_weights_are_refused_where_asked(value, kind):
    model = ZOO[kind].build()
    averager = used(model, nonfinite="raise")
    name, parameter = [*model.named_parameters()][-1]
    parameter.data.view(-1)[0] = value
    with refused(averager, polyak.NonFiniteError, name, "step 3", "nonfinite='skip'"):
        averager.update()
    parameter.data.view(-1)[0] = 0
    averager.update()
    assert (averager.n, averager.skipped) == (3, 0)


def test_a_step_that_restarts_each_epoch_is_named_first():
    averager = averager_of()
    averager.update(step=5)
    with pytest.warns(polyak.PolyakWarning, match="count over the whole run, not per epoch"):
        averager.update(step=1)


def test_copy_to_another_model_speaks_of_no_update():
    with pytest.raises(polyak.MismatchError, match=r"Give the model the averager was built from"):
        averager_of().copy_to(nn.Linear(3, 3))
