"""Several optimisers or updates of one average make one update together, or one warning."""

from __future__ import annotations

import copy
import gc
import math

import pytest
import torch
from torch import nn
from torch.optim import SGD, AdamW

import polyak
from attaching import backward, step, train
from models import average_bits, mlp

# Two that update one averager


def in_turns(times, *acts):
    for _ in range(times):
        for act in acts:
            act()


def test_a_call_of_update_behind_the_hook_is_left_out_with_one_warning(model, optimizer, averager):
    twin = copy.deepcopy(model)
    once, other = polyak.average(twin, "ema", decay=0.5), SGD(twin.parameters(), lr=0.1)
    polyak.attach(optimizer, averager)
    polyak.attach(other, once)
    words = r"SGD already updated this averager in its step, so this averager\.update\(\) was ignored\. .* not both"
    with pytest.warns(polyak.PolyakWarning, match=words) as told:
        in_turns(5, step(model, optimizer), averager.update, step(twin, other))
    assert len(told) == 1
    assert averager.n == 5
    assert average_bits(averager) == average_bits(once)


def test_a_bank_leaves_a_second_update_out_too(model, optimizer):
    bank = polyak.bank(model, {"short": {"name": "ema", "decay": 0.5}, "mean": "swa"})
    polyak.attach(optimizer, bank)
    with pytest.warns(polyak.PolyakWarning, match="SGD already updated this averager"):
        in_turns(3, step(model, optimizer), bank.update)
    assert [averager.n for averager in bank.values()] == [3, 3]


@pytest.mark.parametrize("many", [False, True])
def test_an_update_with_another_model_behind_a_step_is_not_left_out(model, optimizer, averager, many):
    updated = polyak.bank(model, {"a": "swa"}) if many else averager
    polyak.attach(optimizer, updated)
    for _ in range(3):
        train(model, optimizer, 1)
        updated.update(mlp())
    assert (updated["a"] if many else updated).n == 6
    train(model, optimizer, 1)
    with pytest.warns(polyak.PolyakWarning, match="was ignored"):
        updated.update(nn.DataParallel(model))


def test_updates_with_other_weights_are_never_left_out(model, optimizer, averager):
    polyak.attach(optimizer, averager)
    train(model, optimizer, steps=3)
    with torch.no_grad():
        model[0].weight.mul_(2)
    averager.update()
    train(model, optimizer, steps=3)
    model.load_state_dict(mlp().state_dict())
    averager.update()
    assert averager.n == 8


@pytest.mark.parametrize("count", [2, 3])
def test_optimisers_that_update_in_turns_are_told_once_by_their_names(model, averager, count):
    kinds = [SGD, AdamW, torch.optim.Adam][:count]
    optimizers = [kind(model.parameters(), lr=0.1) for kind in kinds]
    for optimizer in optimizers:
        polyak.attach(optimizer, averager)
    last = "AdamW" if count == 2 else "SGD"
    before = "SGD" if count == 2 else "Adam"
    with pytest.warns(
        polyak.PolyakWarning, match=f"in turns by {before} and by {last}: each .* more than once"
    ) as told:
        in_turns(4, *(step(model, optimizer) for optimizer in optimizers))
    assert len(told) == 1
    assert averager.n == 4 * count


def parts(model):
    """Return an optimiser for each layer that has parameters."""
    return SGD(model[0].parameters(), lr=0.1), AdamW(model[2].parameters(), lr=0.01)


def of_each_round(model, averager, rounds):
    """Return the averages by hand after each round: calls that make it up."""
    alike = polyak.average(model, averager.strategy)
    for acts in rounds:
        for act in acts:
            act()
        alike.update()
    return alike


@pytest.mark.parametrize("how", ["list", "one by one"])
def test_optimisers_of_different_parameters_make_one_update_behind_the_last_one(model, averager, how):
    head, body = parts(model)
    for optimizers in [(head, body)] if how == "list" else [[head], [body]]:
        polyak.attach(optimizers, averager)
    acts = step(model, head), step(model, body)
    alike = of_each_round(model, averager, [acts, acts[::-1], acts])
    assert (averager.n, average_bits(averager)) == (3, average_bits(alike))


def test_an_optimiser_per_parameter_counts_once_per_step(model, averager):
    for param in model.parameters():
        optimizer = SGD([param], lr=0.1)
        polyak.attach(optimizer, averager)

        def hook(param, optimizer=optimizer):
            optimizer.step()
            optimizer.zero_grad()

        param.register_post_accumulate_grad_hook(hook)
    alike = of_each_round(model, averager, [[lambda: backward(model)]] * 3)
    assert (averager.n, average_bits(averager)) == (3, average_bits(alike))


def test_two_optimisers_of_polyak_make_one_update_together(model):
    averager = polyak.average(model, "ema", decay=0.5, nonfinite="propagate")
    head = polyak.optim.AdamW(model[0].parameters(), lr=0.1, averager=averager)
    body = polyak.optim.AdamW(model[2].parameters(), lr=0.1, averager=averager)
    alike = of_each_round(model, averager, [(step(model, head), step(model, body))] * 3)
    assert (averager.n, average_bits(averager)) == (3, average_bits(alike))
    assert "other optimisers make the update together with it" in head.describe()


def test_a_round_without_one_of_them_is_averaged_before_the_next_step_and_not_waited_for_again(model, averager):
    head, body = parts(model)
    polyak.attach([head, body], averager)
    alike = polyak.average(model, averager.strategy)
    counts = []
    for optimizers in ([head, body], [head], [head], [head], [body, head], [head, body]):
        for optimizer in optimizers:
            train(model, optimizer, 1)
        alike.update()
        counts.append(averager.n)
    assert counts == [1, 1, 3, 4, 5, 6]
    assert average_bits(averager) == average_bits(alike)


@pytest.mark.parametrize("skips", [0, 1])
def test_a_step_that_the_grad_scaler_leaves_out_for_one_of_them_mixes_no_rounds(model, averager, skips):
    optimizers = SGD(model[0].parameters(), lr=0.1), SGD(model[2].parameters(), lr=0.1)
    polyak.attach(optimizers, averager)
    alike = polyak.average(model, averager.strategy)
    scaler = torch.amp.GradScaler("cpu", init_scale=1.0)
    for turn in range(7):
        scaler.scale(model(torch.ones(1, 3)).sum()).backward()
        if turn in (3, 5):
            optimizers[skips].param_groups[0]["params"][0].grad.fill_(math.inf)
        for optimizer in optimizers:
            scaler.step(optimizer)
            optimizer.zero_grad()
        scaler.update()
        alike.update()
    assert (averager.n, average_bits(averager)) == (alike.n, average_bits(alike))


def test_one_that_is_removed_or_gone_is_not_waited_for(model, averager):
    head, body = parts(model)
    attachment = polyak.attach(body, averager)
    polyak.attach(head, averager)
    attachment.remove()
    train(model, head, 1)
    assert averager.n == 1
    polyak.attach(SGD(model[2].parameters()), averager)
    gc.collect()
    train(model, head, 1)
    assert averager.n == 2


def test_a_part_whose_gradients_overflowed_is_not_waited_for(model, averager):
    head = SGD(model[0].parameters(), lr=0.1, fused=True)
    body = AdamW(model[2].parameters(), lr=0.1, fused=True)
    polyak.attach([head, body], averager)
    backward(model)
    body.found_inf = torch.ones(())
    head.step()
    body.step()
    assert averager.n == 1
    head.found_inf = torch.ones(())
    head.step()
    body.step()
    assert averager.n == 1


def test_several_optimisers_are_told_the_learning_rate_of_the_first(model):
    rates = []
    averager = polyak.average(model, "ema")
    averager.updater.listeners.append(lambda _, clock: rates.append(clock.lr))
    head, body = parts(model)
    polyak.attach([head, body], averager)
    in_turns(2, step(model, body), step(model, head))
    assert rates == [0.1, 0.1]


def test_a_list_is_attached_whole_or_not_at_all_and_removed_whole(model, averager):
    head, body = parts(model)
    with pytest.raises(polyak.ConfigError, match="empty list"):
        polyak.attach([], averager)
    with pytest.raises(polyak.MismatchError):
        polyak.attach([head, SGD(mlp().parameters())], averager)
    with pytest.raises(polyak.ConfigError, match="attached to this optimiser already"):
        polyak.attach([head, head], averager)
    in_turns(2, step(model, head))
    assert averager.n == 0
    with polyak.attach([head, body], averager):
        in_turns(2, step(model, head), step(model, body))
    in_turns(2, step(model, head), step(model, body))
    assert averager.n == 2


def test_hooks_that_change_weights_are_averaged_whenever_they_were_registered(model, optimizer, averager):
    other = polyak.average(model, averager.strategy)
    polyak.attach(optimizer, averager)
    polyak.attach(optimizer, other)
    optimizer.register_step_post_hook(lambda *_: model[0].weight.data.clamp_(-0.05, 0.05))
    alike = of_each_round(model, averager, [[step(model, optimizer)]] * 3)
    assert average_bits(averager) == average_bits(other) == average_bits(alike)


def test_a_hook_and_calls_behind_changes_of_the_weights_are_told(model, optimizer, averager):
    polyak.attach(optimizer, averager)
    with pytest.warns(polyak.PolyakWarning, match=r"in turns by SGD and by averager\.update\(\)"):
        in_turns(3, step(model, optimizer), lambda: model[0].weight.detach().clamp_(-0.1, 0.1), averager.update)


def test_a_call_before_the_attachment_and_evaluations_are_no_second_update(model, optimizer, averager):
    averager.update()
    polyak.attach(optimizer, averager)
    for _ in range(4):
        backward(model)
        backward(model)
        optimizer.step()
        with averager.applied():
            model(torch.ones(2, 3))
        averager.module(torch.ones(2, 3))
    assert averager.n == 5


def test_an_optimiser_in_the_place_of_another_is_no_second_one(model, averager):
    optimizers = [SGD(model.parameters(), lr=0.1) for _ in range(8)]
    for optimizer in optimizers[:4]:  # attached one after the other, the old ones still held
        polyak.attach(optimizer, averager)
        train(model, optimizer, steps=1)
    for optimizer in optimizers[4:]:
        with polyak.attach(optimizer, averager):
            train(model, optimizer, steps=2)
    assert averager.n == 12


def test_phases_with_an_optimiser_each_are_no_turns(model, averager):
    head, body = SGD(model[2].parameters(), lr=0.1), SGD(model[0].parameters(), lr=0.1)
    polyak.attach(head, averager)
    polyak.attach(body, averager)
    for _ in range(3):
        train(model, head, steps=2)
        train(model, body, steps=3)
    assert averager.n == 15


def test_calls_between_many_steps_are_no_turns(model, optimizer, averager):
    polyak.attach(optimizer, averager)
    for _ in range(4):
        train(model, optimizer, steps=2)
        with torch.no_grad():
            model[0].weight.mul_(0.5)
        averager.update()
    assert averager.n == 12


def test_two_models_with_an_optimiser_and_an_averager_each_are_apart():
    generator, judge = mlp(), mlp()
    pairs = []
    for net in (generator, judge):
        optimizer, averager = SGD(net.parameters(), lr=0.1), polyak.average(net, "ema")
        polyak.attach(optimizer, averager)
        pairs.append((net, optimizer, averager))
    for _ in range(5):
        for net, optimizer, _ in pairs:
            train(net, optimizer, steps=1)
    assert [averager.n for *_, averager in pairs] == [5, 5]


def test_a_resumed_averager_takes_the_next_call_as_it_comes(model, optimizer, averager):
    polyak.attach(optimizer, averager)
    train(model, optimizer)
    averager.load_state_dict(averager.state_dict())
    averager.update()
    assert averager.n == 4
    copied = copy.deepcopy(averager)
    copied.update()
    assert copied.n == 5
