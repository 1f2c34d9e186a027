"""Autograd's graphs and cached parametrisations around an evaluation."""

from __future__ import annotations

from contextlib import ExitStack

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrize
from torch.nn.utils.parametrizations import weight_norm

import polyak
from holding import enter, loss_of, moved, now
from interrupts import AtOperation
from models import ZOO, Conv, Shapes, Tied, bits, drifting


def versions(model):
    return [tensor._version for tensor in (*model.parameters(), *model.buffers())]


@pytest.mark.parametrize("kind", ZOO.values(), ids=str)
def test_autograd_counts_after_a_context_as_before_it(kind):
    model, averager, _ = moved(kind.build)
    before = versions(model)
    with averager.applied():
        pass
    assert versions(model) == before


def test_a_graph_recorded_inside_is_refused_afterwards_however_many_steps_later():
    model, averager, before = moved()
    with averager.applied():
        loss = loss_of(model)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward(retain_graph=True)
    with averager.applied(), pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward(retain_graph=True)
    assert now(model, averager) == before
    for _ in drifting(model, 3):
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            loss.backward(retain_graph=True)


def test_a_graph_recorded_before_is_refused_inside_and_valid_afterwards():
    model, averager, _ = moved()
    expected = torch.autograd.grad(loss_of(model), list(model.parameters()))
    loss = loss_of(model)
    with averager.applied():
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            loss.backward(retain_graph=True)
        loss_of(model).backward()
    model.zero_grad()
    loss.backward()
    assert [bits(p.grad) for p in model.parameters()] == [bits(grad) for grad in expected]


def test_graphs_of_two_averagers_belong_to_their_own_values():
    model, averager, _ = moved()
    other = polyak.average(model, "ema", decay=0.9)
    first, second = averager.applied(), other.applied()
    first.__enter__()
    of_first = loss_of(model)
    second.__enter__()
    of_second = loss_of(model)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        of_first.backward(retain_graph=True)
    first.__exit__(None, None, None)
    of_second.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        of_first.backward(retain_graph=True)
    second.__exit__(None, None, None)
    for loss in (of_first, of_second):
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            loss.backward(retain_graph=True)


@pytest.mark.parametrize("build", [Tied, Shapes, Conv])
def test_ctrl_c_in_a_swap_leaves_autograds_counts_alone(build):
    model, averager, _ = moved(build)
    before = versions(model)
    enter(averager)  # plans
    with AtOperation() as counter:
        enter(averager)
    for k in range(0, counter.seen, 7):
        with pytest.raises(KeyboardInterrupt), AtOperation(k):
            enter(averager)
        assert versions(model) == before


# Weights that parametrizations keep computed


def normed():
    return nn.Sequential(weight_norm(nn.Linear(3, 4)), nn.Linear(4, 2))


@torch.no_grad()
def test_cached_parametrizations_are_those_of_the_values_that_the_model_has():
    model, averager, before = moved(normed)
    other = polyak.average(model, "ema", decay=0.9)
    x = torch.ones(1, 3)
    own = model(x)
    with averager.applied():
        averaged = model(x)
    with parametrize.cached():
        assert torch.equal(model(x), own)
        with averager.applied():
            assert torch.equal(model(x), averaged)
            with other.applied():
                assert torch.equal(model(x), own)
            assert torch.equal(model(x), averaged)
        assert torch.equal(model(x), own)
        averager.copy_to()
        assert torch.equal(model(x), averaged)
    assert now(model, averager)[1] == before[1]
    assert not parametrize._cache


@torch.no_grad()
def test_a_cache_that_begins_or_ends_inside_of_a_context_stays_of_its_values():
    model, averager, _ = moved(normed)
    x = torch.ones(1, 3)
    own = model(x)
    with averager.applied():
        averaged = model(x)
    context = averager.applied()
    context.__enter__()
    with parametrize.cached():
        assert torch.equal(model(x), averaged)
        context.__exit__(None, None, None)
        assert torch.equal(model(x), own)
    context = averager.applied()
    with parametrize.cached():
        model(x)
        context.__enter__()
        model(x)
    context.__exit__(None, None, None)
    with parametrize.cached():
        assert torch.equal(model(x), own)


def test_gradients_through_a_cached_weight_do_not_notice_an_evaluation():
    def gradients(*, evaluate):
        torch.manual_seed(0)
        model = normed()
        averager = polyak.average(model, "ema", decay=0.5)
        with parametrize.cached():
            loss = loss_of(model)
            if evaluate:
                with torch.no_grad(), averager.applied():
                    model(torch.ones(1, 3))
            (loss + model(torch.full((2, 3), 0.3)).square().sum()).backward()
        return [bits(p.grad) for p in model.parameters()]

    assert gradients(evaluate=True) == gradients(evaluate=False)


def test_two_averagers_and_a_cache_are_left_in_any_order():
    model, averager, before = moved(normed)
    other = polyak.average(model, "ema", decay=0.9)
    x = torch.ones(1, 3)
    with torch.no_grad(), ExitStack() as stack:
        with other.applied():
            of_other = model(x)
        stack.enter_context(parametrize.cached())
        model(x)
        first, second = averager.applied(), other.applied()
        first.__enter__()
        model(x)
        second.__enter__()
        first.__exit__(None, None, None)
        assert torch.equal(model(x), of_other)
        second.__exit__(None, None, None)
    assert now(model, averager) == before
