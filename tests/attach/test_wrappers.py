"""Optimisers that hold others, wrap them or do not step are attached where they step, or refused."""

from __future__ import annotations

import copy

import pytest
import torch
from torch.optim import SGD, Optimizer

import polyak
from attaching import SAM, backward, train
from models import average_bits, mlp, model_bits


class Lookahead(Optimizer):
    """Moves the weights behind the step of another optimiser."""

    def __init__(self, base):
        super().__init__(base.param_groups, {})
        self.base, self.param_groups = base, base.param_groups

    @torch.no_grad()
    def step(self, closure=None):
        self.base.step(closure)
        for group in self.param_groups:
            for param in group["params"]:
                param.mul_(0.5)


def two_steps(model, optimizer, steps=3):
    for _ in range(steps):
        optimizer.zero_grad()
        backward(model)
        optimizer.first_step()
        optimizer.zero_grad()
        backward(model)
        optimizer.second_step()


@pytest.mark.parametrize("which", ["the wrapper", "its base"])
def test_a_pair_of_first_and_second_step_counts_once(model, averager, which):
    sam, twin = SAM(model.parameters(), lr=0.1), copy.deepcopy(model)
    by_hand, other = polyak.average(twin, "ema", decay=0.5), SAM(twin.parameters(), lr=0.1)
    with polyak.attach(sam if which == "the wrapper" else sam.base_optimizer, averager):
        for _ in range(3):
            two_steps(model, sam, 1)
            two_steps(twin, other, 1)
            by_hand.update()
        assert averager.n == 3
        assert average_bits(averager) == average_bits(by_hand)
    two_steps(model, sam)
    assert averager.n == 3


def test_a_step_of_the_wrapper_counts_once_however_it_is_made(model, averager):
    sam = SAM(model.parameters(), lr=0.1)
    polyak.attach(sam, averager)
    backward(model)
    sam.step(lambda: backward(model))
    two_steps(model, sam, 1)
    sam.step(lambda: backward(model))
    assert averager.n == 3


def test_what_a_wrapper_does_behind_the_inner_step_is_averaged(model):
    averager = polyak.average(model, "ema", decay=0.0)
    optimizer = Lookahead(SGD(model.parameters(), lr=0.1))
    polyak.attach(optimizer, averager)
    train(model, optimizer)
    assert averager.n == 3
    assert average_bits(averager) == model_bits(model)


def test_attached_to_a_wrapper_and_to_its_base_is_refused(model, averager):
    sam = SAM(model.parameters(), lr=0.1)
    polyak.attach(sam, averager)
    with pytest.raises(polyak.ConfigError, match="attached to this optimiser already"):
        polyak.attach(sam.base_optimizer, averager)


@pytest.mark.usefixtures("_process_group")
def test_an_optimiser_that_holds_one_for_its_shard_counts_once(model, averager):
    from torch.distributed.optim import ZeroRedundancyOptimizer

    optimizer = ZeroRedundancyOptimizer(model.parameters(), SGD, lr=0.1)
    polyak.attach(optimizer, averager)
    train(model, optimizer)
    assert averager.n == 3


@pytest.mark.usefixtures("_process_group")
@pytest.mark.parametrize("how", ["attached", "made"])
def test_the_optimiser_of_one_rank_inside_another_is_refused_before_its_first_step(model, how):
    from torch.distributed.optim import ZeroRedundancyOptimizer

    averager = polyak.average(model, "ema", nonfinite="propagate")
    if how == "attached":
        optimizer = ZeroRedundancyOptimizer(model.parameters(), SGD, lr=0.1)
        polyak.attach(optimizer.optim, averager)
    else:
        optimizer = ZeroRedundancyOptimizer(model.parameters(), polyak.optim.AdamW, lr=0.1, averager=averager)
    before = model_bits(model)
    with pytest.raises(polyak.ConfigError, match=r"polyak\.attach\(zero, averager\)"):
        train(model, optimizer, 1)
    assert (averager.n, model_bits(model)) == (0, before)


def test_an_optimiser_whose_step_runs_no_hooks_is_refused(model, averager):
    class Bare(Optimizer):
        def __init__(self, base):
            self._optimizer_step_pre_hooks, self._optimizer_step_post_hooks = {}, {}
            self.base, self.param_groups = base, base.param_groups

        def step(self, closure=None):
            self.base.step(closure)

    optimizer = Bare(SGD(model.parameters(), lr=0.1))
    with pytest.raises(polyak.ConfigError, match=r"Bare\.step\(\) runs no hooks.*averager\.update\(\) yourself"):
        polyak.attach(optimizer, averager)
    assert not optimizer._optimizer_step_post_hooks


class Sole(Optimizer):
    """Steps by itself, by methods that run no hooks."""

    def __init__(self, params):
        super().__init__(params, {"lr": 0.1})

    @torch.no_grad()
    def second_step(self):
        for group in self.param_groups:
            for param in group["params"]:
                param.sub_(param.grad, alpha=group["lr"])


@pytest.mark.parametrize("how", ["applied", "module", "averaged_state_dict"])
def test_an_optimiser_that_trains_without_its_step_is_told_when_the_average_is_evaluated(model, averager, how):
    def evaluate():
        if how == "applied":
            with averager.applied():
                model(torch.ones(2, 3))
        else:
            getattr(averager, how)

    optimizer = Sole(model.parameters())
    polyak.attach(optimizer, averager)
    model.load_state_dict(mlp().state_dict())
    for _ in range(20):
        evaluate()
    for _ in range(10):
        backward(model)
        optimizer.second_step()
    with pytest.warns(polyak.PolyakWarning, match=r"attached to Sole, whose step\(\) has never run"):
        averager.averaged_state_dict() if how == "averaged_state_dict" else evaluate()
    evaluate()


@pytest.mark.parametrize("how", ["applied", "averaged_state_dict"])
def test_an_average_that_is_in_the_model_before_the_first_step_is_no_training(model, optimizer, averager, how):
    polyak.attach(optimizer, averager)
    other = polyak.average(model, "swa")
    for outer in (averager, other):
        with outer.applied():
            if how == "applied":
                with averager.applied():
                    model(torch.ones(2, 3))
            else:
                averager.averaged_state_dict()


# What is refused


class Wrapper(Optimizer):
    """As accelerate's: inherits every method of an optimiser, and is none."""

    def __init__(self, optimizer):
        self.optimizer = optimizer
        self.param_groups = optimizer.param_groups

    def step(self, closure=None):
        self.optimizer.step(closure)


@pytest.mark.parametrize("wrong", [Wrapper, lambda optimizer: [Wrapper(optimizer)], lambda optimizer: None])
def test_an_optimiser_without_step_hooks_is_refused_with_the_way_out(optimizer, averager, wrong):
    with pytest.raises(polyak.ConfigError, match=r"has no step hooks.*\.optimizer.*averager\.update\(\) yourself"):
        polyak.attach(wrong(optimizer), averager)


def test_the_optimiser_inside_a_wrapper_is_attached(model, optimizer, averager):
    wrapper = Wrapper(optimizer)
    polyak.attach(wrapper.optimizer, averager)
    backward(model)
    wrapper.step()
    assert averager.n == 1
