"""`polyak.attach`: the update as a step hook, once for each step of the optimiser and with its learning rate."""

from __future__ import annotations

import copy

import pytest
import torch
from torch.optim import SGD, AdamW, Optimizer

import polyak
from attaching import OPTIMIZERS, SAM, backward, train
from models import average_bits, bits, mlp, model_bits


class Recorder:
    """Updated as an averager is, and remembers how."""

    def __init__(self):
        self.rates = []

    def update(self, model=None, *, step=None, lr=None):
        self.rates.append(lr)


# Once per real step


@pytest.mark.parametrize("build", OPTIMIZERS.values(), ids=OPTIMIZERS)
def test_an_attached_averager_equals_one_that_is_updated_by_hand_after_each_step(model, build):
    twin = copy.deepcopy(model)
    attached, by_hand = polyak.average(model, "ema", decay=0.5), polyak.average(twin, "ema", decay=0.5)
    optimizer, other = build(model.parameters()), build(twin.parameters())
    polyak.attach(optimizer, attached)
    train(model, optimizer)
    for _ in range(3):
        train(twin, other, steps=1)
        by_hand.update()
    assert attached.n == 3
    assert average_bits(attached) == average_bits(by_hand)


def test_a_step_with_a_closure_counts_once_however_often_it_evaluates(model, averager):
    evaluated = []
    optimizer = torch.optim.LBFGS(model.parameters(), lr=0.01, max_iter=4)

    def closure():
        evaluated.append(averager.n)
        optimizer.zero_grad()
        loss = model(torch.ones(2, 3)).square().sum()
        loss.backward()
        return loss

    polyak.attach(optimizer, averager)
    optimizer.step(closure)
    optimizer.step(closure)
    assert len(evaluated) > 4
    assert set(evaluated) == {0, 1}
    assert averager.n == 2


def test_batches_whose_gradients_are_accumulated_are_no_steps(model, optimizer, averager):
    polyak.attach(optimizer, averager)
    for batch in range(12):
        backward(model)
        if batch % 4 == 3:
            optimizer.step()
    assert averager.n == 3


@pytest.mark.parametrize("build", OPTIMIZERS.values(), ids=OPTIMIZERS)
def test_a_step_that_the_grad_scaler_leaves_out_is_not_averaged(model, averager, build):
    optimizer, scaler = build(model.parameters()), torch.amp.GradScaler("cpu")
    polyak.attach(optimizer, averager)
    for overflow in (1.0, float("inf"), 1.0):
        before, n = model_bits(model), averager.n
        optimizer.zero_grad()
        scaler.scale(model(torch.ones(2, 3)).square().sum() * overflow).backward()
        scaler.step(optimizer)
        scaler.update()
        assert (model_bits(model) == before) == (overflow > 1)
        assert averager.n == n + (overflow == 1)
    assert (averager.n, averager.skipped) == (2, 0)


def test_a_step_that_raises_is_not_averaged(model, optimizer, averager):
    polyak.attach(optimizer, averager)

    def closure():
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        optimizer.step(closure)
    assert averager.n == 0


def test_two_optimisers_update_each_its_own_averager():
    generator, judge = mlp(), mlp()
    first, second = SGD(generator.parameters(), lr=0.1), AdamW(judge.parameters(), lr=0.1)
    one, other = polyak.average(generator, "ema"), polyak.average(judge, "ema")
    polyak.attach(first, one)
    polyak.attach(second, other)
    train(generator, first, steps=3)
    train(judge, second, steps=2)
    assert (one.n, other.n) == (3, 2)


def test_two_averagers_of_one_optimiser_are_both_updated(model, optimizer, averager):
    other = polyak.average(model, "swa")
    polyak.attach(optimizer, averager)
    with polyak.attach(optimizer, other):
        train(model, optimizer)
    train(model, optimizer)
    assert (averager.n, other.n) == (6, 3)


@pytest.mark.parametrize("kind", ["averager", "bank", "polyak.optim", "wrapper"])
def test_a_step_inside_applied_is_refused_before_anything_changes(model, kind):
    target = polyak.average(model, "ema", decay=0.5, nonfinite="propagate")
    averager = target
    if kind == "bank":
        target = polyak.bank(model, {"other": "swa", "one": "ema"})
        averager = target["one"]
    if kind == "polyak.optim":
        optimizer = polyak.optim.AdamW(model.parameters(), averager=target)
    else:
        optimizer = SAM(model.parameters(), lr=0.1) if kind == "wrapper" else SGD(model.parameters(), lr=0.1)
        polyak.attach(optimizer, target)
    backward(model)
    before, weights = average_bits(averager), model_bits(model)
    steps = [optimizer.base_optimizer.step, lambda: optimizer.step(int)] if kind == "wrapper" else [optimizer.step]
    with averager.applied():
        for step in steps:
            with pytest.raises(polyak.AppliedError, match="leave applied"):
                step()
    assert (average_bits(averager), model_bits(model), averager.n) == (before, weights, 0)
    steps[0]()
    assert averager.n == 1


# The learning rate


def test_each_update_is_told_the_learning_rate_of_the_step_that_was_made(model, optimizer):
    recorder = Recorder()
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.5)
    polyak.attach(optimizer, recorder)
    for _ in range(3):
        train(model, optimizer, steps=1)
        scheduler.step()
    assert recorder.rates == [0.1, 0.05, 0.025]


def test_the_learning_rate_is_the_first_groups_as_a_float_where_it_is_a_tensor(model):
    recorder = Recorder()
    groups = [{"params": model[0].parameters(), "lr": torch.tensor(0.25)}, {"params": model[2].parameters()}]
    optimizer = SGD(groups, lr=torch.tensor(0.5))
    polyak.attach(optimizer, recorder)
    train(model, optimizer, steps=1)
    assert recorder.rates == [0.25]
    assert type(recorder.rates[0]) is float


def test_an_optimiser_without_a_learning_rate_gives_none(model):
    class Fixed(Optimizer):
        def __init__(self, parameters):
            super().__init__(parameters, {})

        def step(self, closure=None):
            return None

    recorder = Recorder()
    optimizer = Fixed(model.parameters())
    polyak.attach(optimizer, recorder)
    optimizer.step()
    assert recorder.rates == [None]


# Before the step


def test_the_weights_are_released_before_the_optimiser_writes_and_averaged_after_it(model, optimizer):
    weight, seen = model[0].weight, []

    class Background(Recorder):
        guards = 0

        def guard(self, by):
            self.guards += by

        def release(self):
            seen.append(("release", bits(weight)))

        def update(self, model=None, *, step=None, lr=None):
            seen.append(("update", bits(weight)))

    before = bits(weight)
    averager = Background()
    with polyak.attach(optimizer, averager):
        assert averager.guards == 1
        train(model, optimizer, steps=1)
        after = bits(weight)
        assert before != after
        assert seen == [("release", before), ("update", after)]
    # Who is no longer warned of a step waits at once.
    assert (seen.pop(), averager.guards) == (("release", after), 0)
    train(model, optimizer, steps=1)
    assert len(seen) == 2


def test_a_bank_is_attached_like_an_averager(model, optimizer):
    bank = polyak.bank(model, {"a": "ema", "b": "swa"})
    with polyak.attach(optimizer, bank):
        assert [averager.updater.guards for averager in bank.values()] == [1, 1]
        train(model, optimizer, steps=3)
    assert [(averager.n, averager.updater.guards) for averager in bank.values()] == [(3, 0), (3, 0)]
    other = torch.optim.SGD([torch.nn.Parameter(torch.ones(1))], lr=0.1)
    with pytest.raises(polyak.MismatchError, match="belongs to the averager's model"):
        polyak.attach(other, bank)
