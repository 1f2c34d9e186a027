"""An attachment ends when it is removed, and copies and states have none."""

from __future__ import annotations

import copy
import gc
import io
import pickle
import weakref

import pytest
import torch
from torch.optim import SGD, AdamW

import polyak
from attaching import OPTIMIZERS, train
from models import mlp
from polyak.optim.attach import Attachment

# The handle


def test_remove_ends_it_and_twice_is_once(model, optimizer, averager):
    handle = polyak.attach(optimizer, averager)
    train(model, optimizer, steps=2)
    handle.remove()
    handle.remove()
    train(model, optimizer, steps=2)
    assert averager.n == 2
    assert not optimizer._optimizer_step_post_hooks
    assert not optimizer._optimizer_step_pre_hooks


def test_leaving_the_context_ends_it_after_an_exception_too(model, optimizer, averager):
    def run():
        with polyak.attach(optimizer, averager) as handle:
            assert isinstance(handle, Attachment)
            train(model, optimizer, steps=1)
            raise KeyError

    with pytest.raises(KeyError):
        run()
    train(model, optimizer, steps=1)
    assert averager.n == 1


def test_neither_the_optimiser_nor_the_handle_keeps_a_removed_averager_alive(model, optimizer):
    averager = polyak.average(model, "ema")
    handle = polyak.attach(optimizer, averager)
    held = weakref.ref(averager)
    handle.remove()
    del averager
    gc.collect()
    assert held() is None


def test_the_handle_does_not_keep_the_optimiser_alive(model, averager):
    optimizer = SGD(model.parameters(), lr=0.1)
    handle = polyak.attach(optimizer, averager)
    held = weakref.ref(optimizer)
    del optimizer
    gc.collect()
    assert held() is None
    handle.remove()


# Copies and states of the optimiser


@pytest.mark.parametrize("build", OPTIMIZERS.values(), ids=OPTIMIZERS)
@pytest.mark.parametrize("how", ["deepcopy", "pickle", "save"])
def test_a_copied_optimiser_steps_without_the_averager(model, averager, build, how):
    optimizer = build(model.parameters())
    polyak.attach(optimizer, averager)
    train(model, optimizer, steps=1)
    if how == "deepcopy":
        other = copy.deepcopy(optimizer)
    elif how == "pickle":
        other = pickle.loads(pickle.dumps(optimizer))
    else:
        file = io.BytesIO()
        torch.save(optimizer, file)
        other = torch.load(io.BytesIO(file.getvalue()), weights_only=False)
    other.step()
    assert averager.n == 1
    train(model, optimizer, steps=1)
    assert averager.n == 2


def test_the_hooks_are_no_part_of_an_optimisers_state_and_survive_loading_one(model, averager):
    optimizer, plain = AdamW(model.parameters(), lr=0.1), AdamW(mlp().parameters(), lr=0.1)
    polyak.attach(optimizer, averager)
    train(model, optimizer, steps=1)
    state = optimizer.state_dict()
    assert state.keys() == plain.state_dict().keys()
    optimizer.load_state_dict(state)
    train(model, optimizer, steps=1)
    assert averager.n == 2


def test_an_optimiser_copied_together_with_its_model_and_averager_can_be_attached_again(model, optimizer, averager):
    polyak.attach(optimizer, averager)
    new, other, own = copy.deepcopy((model, optimizer, averager))
    polyak.attach(other, own)
    train(new, other, steps=2)
    assert (averager.n, own.n) == (0, 2)


def test_the_step_by_which_torch_makes_a_state_to_load_into_is_no_update():
    from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict

    model = mlp()
    optimizer = torch.optim.Adam(model.parameters())
    averager = polyak.average(model, "ema")
    with polyak.attach(optimizer, averager):
        get_optimizer_state_dict(model, optimizer)
        assert optimizer.state
        assert averager.n == 0
        optimizer.param_groups[0]["lr"] = 0.0  # as the first step of a warm-up
        for parameter in model.parameters():
            parameter.grad = torch.ones_like(parameter)
        optimizer.step()
    assert averager.n == 1
