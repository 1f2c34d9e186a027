"""`polyak.attach`: the update as a step hook, once per real step of an optimiser."""

from __future__ import annotations

import copy
import gc
import io
import math
import pickle
import warnings
import weakref

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.optim import SGD, AdamW, Optimizer

import polyak
from models import average_bits, bits, mlp, model_bits
from polyak.optim.attach import Attachment

OPTIMIZERS = {
    "SGD": lambda parameters: SGD(parameters, lr=0.1),
    "SGD fused": lambda parameters: SGD(parameters, lr=0.1, fused=True),
    "AdamW loop": lambda parameters: AdamW(parameters, lr=0.1, foreach=False),
    "AdamW foreach": lambda parameters: AdamW(parameters, lr=0.1, foreach=True),
    "AdamW fused": lambda parameters: AdamW(parameters, lr=0.1, fused=True),
}


def backward(model):
    model(torch.ones(2, 3)).square().sum().backward()


def train(model, optimizer, steps=3):
    for _ in range(steps):
        optimizer.zero_grad()
        backward(model)
        optimizer.step()


@pytest.fixture
def model():
    return mlp()


@pytest.fixture
def optimizer(model):
    return SGD(model.parameters(), lr=0.1)


@pytest.fixture
def averager(model):
    return polyak.average(model, "ema", decay=0.5)


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


# Wrappers around the optimiser that steps


class SAM(Optimizer):
    """As davda54/sam: perturbs the weights, then lets another optimiser step."""

    def __init__(self, params, base=SGD, own_step=True, **settings):
        super().__init__(params, settings)
        self.base_optimizer = base(self.param_groups, **settings)
        self.param_groups = self.base_optimizer.param_groups
        self.own_step = own_step

    @torch.no_grad()
    def first_step(self):
        for group in self.param_groups:
            for param in group["params"]:
                self.state[param]["moved"] = 0.05 * param.grad / (param.grad.norm() + 1e-12)
                param.add_(self.state[param]["moved"])

    @torch.no_grad()
    def second_step(self):
        for group in self.param_groups:
            for param in group["params"]:
                param.sub_(self.state[param]["moved"])
        self.base_optimizer.step()

    def step(self, closure=None):
        self.first_step()
        with torch.enable_grad():
            closure()
        self.second_step()


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


# Two that update one averager


def in_turns(times, *acts):
    for _ in range(times):
        for act in acts:
            act()


def step(model, optimizer):
    return lambda: train(model, optimizer, steps=1)


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


@pytest.mark.parametrize(
    "wrong",
    [
        None,
        "ema",
        {},
        nn.Linear(2, 2),
        polyak.EMA(),
        torch.optim.swa_utils.AveragedModel(nn.Linear(2, 2)),
    ],
    ids=lambda wrong: type(wrong).__name__,
)
def test_what_is_no_averager_is_refused(optimizer, wrong):
    with pytest.raises(polyak.ConfigError, match=f"got {type(wrong).__name__} as the averager"):
        polyak.attach(optimizer, wrong)
    assert not optimizer._optimizer_step_post_hooks


def test_the_same_averager_twice_on_one_optimiser_is_refused_until_the_first_is_removed(model, optimizer, averager):
    first = polyak.attach(optimizer, averager)
    with pytest.raises(polyak.ConfigError, match="attached to this optimiser already"):
        polyak.attach(optimizer, averager)
    train(model, optimizer, steps=1)
    assert averager.n == 1
    first.remove()
    polyak.attach(optimizer, averager)
    train(model, optimizer, steps=1)
    assert averager.n == 2


def test_an_optimiser_of_another_model_is_refused(averager):
    other = SGD(mlp().parameters(), lr=0.1)
    with pytest.raises(polyak.MismatchError, match="none of the optimiser's 4 tensors belongs"):
        polyak.attach(other, averager)
    assert not other._optimizer_step_post_hooks
    assert not other._optimizer_step_pre_hooks


def test_an_optimiser_that_steps_copies_of_the_weights_is_refused(model, averager):
    copies = [nn.Parameter(parameter.detach().clone()) for parameter in model.parameters()]
    with pytest.raises(polyak.MismatchError, match="steps copies of the weights"):
        polyak.attach(SGD(copies, lr=0.1), averager)


def test_an_averager_without_a_model_is_refused(optimizer, averager):
    with pytest.raises(polyak.UnboundError, match="unpickled"):
        polyak.attach(optimizer, pickle.loads(pickle.dumps(averager)))


@pytest.fixture(scope="module")
def _process_group(tmp_path_factory):
    store = dist.FileStore(str(tmp_path_factory.mktemp("gloo") / "store"), 1)
    dist.init_process_group("gloo", store=store, rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def fsdp1(model):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # FSDP1 is deprecated and says so; models are still wrapped in it
        return FullyShardedDataParallel(model, device_id=torch.device("cpu"), use_orig_params=True)


WRAPPERS = {
    "DataParallel": nn.DataParallel,
    "DDP": nn.parallel.DistributedDataParallel,
    "compile": lambda model: torch.compile(model, backend="eager"),
    "FSDP1": fsdp1,
}


@pytest.mark.usefixtures("_process_group")
@pytest.mark.parametrize("wrap", WRAPPERS.values(), ids=WRAPPERS)
def test_an_optimiser_of_a_wrapped_model_belongs_to_it_before_and_during_training(model, wrap):
    wrapped = wrap(model)
    before, during = polyak.average(wrapped, "ema"), polyak.average(model, "ema")
    optimizer = SGD(wrapped.parameters(), lr=0.1)
    polyak.attach(optimizer, before)
    train(wrapped, optimizer)
    polyak.attach(optimizer, during)
    train(wrapped, optimizer)
    assert (before.n, during.n) == (6, 3)


def test_an_optimiser_of_a_part_of_the_model_belongs_to_it(model, averager):
    optimizer = SGD(model[2].parameters(), lr=0.1)
    polyak.attach(optimizer, averager)
    train(model, optimizer)
    assert averager.n == 3


def test_a_mapping_of_tensors_is_a_model_too():
    weight = nn.Parameter(torch.ones(2))
    averager = polyak.average({"weight": weight}, "ema", decay=0.5)
    optimizer = SGD([weight], lr=0.5)
    polyak.attach(optimizer, averager)
    weight.sum().backward()
    optimizer.step()
    assert averager.averages["weight"].tolist() == [0.75, 0.75]


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
