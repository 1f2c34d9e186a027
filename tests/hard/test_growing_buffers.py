"""Buffers that a model fills, drops or gives another shape while it trains: copies follow, averages begin anew."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import nn

import polyak


class Attention(nn.Module):
    """Keeps a bias of distances in a buffer that grows with the sequence."""

    def __init__(self, *, persistent=False):
        super().__init__()
        self.qkv, self.persistent = nn.Linear(4, 12), persistent
        self.register_buffer("bias", None, persistent=persistent)

    def forward(self, x):
        n = x.shape[1]
        if self.bias is None or len(self.bias) < n:
            places = torch.arange(n)
            distances = -(places[None] - places[:, None]).abs().float()
            self.register_buffer("bias", distances, persistent=self.persistent)
        q, k, v = self.qkv(x).chunk(3, -1)
        return torch.softmax(q @ k.mT + self.bias[:n, :n], -1) @ v


class Cache(nn.Module):
    """Holds what a test puts into its buffers, beside a weight."""

    def __init__(self, value=None, *, persistent=True):
        super().__init__()
        self.linear = nn.Linear(1, 1, bias=False)
        self.register_buffer("cache", value, persistent=persistent)


def values(averager):
    return averager.averages["cache"].tolist()


def train(model, averager, value):
    """Add one to the weight, put a value into the buffer, and update."""
    with torch.no_grad():
        model.linear.weight.add_(1.0)
    model.cache = None if value is None else torch.tensor(value)
    averager.update()


@pytest.mark.parametrize("strategy", ["ema", "ema_v3", "lawa", "dema"])
@pytest.mark.parametrize("persistent", [False, True])
@pytest.mark.filterwarnings("ignore:bias changed shape:polyak.PolyakWarning")
def test_a_mask_that_grows_with_the_sequence_trains_evaluates_and_resumes(strategy, persistent):
    torch.manual_seed(0)
    model = Attention(persistent=persistent)
    averager = polyak.average(model, strategy)
    for n, length in enumerate((4, 9, 3), start=1):
        model(torch.randn(1, length, 4))
        averager.update()
        assert averager.n == n
        with averager.applied():
            wanted = model(torch.ones(1, length, 4))
        assert torch.equal(averager(torch.ones(1, length, 4)), wanted)
        assert torch.equal(averager.averages["bias"], model.bias)
    resumed = polyak.average(model, strategy)
    resumed.load_state_dict(averager.state_dict())
    resumed.update()
    averager.update()
    for name, tensor in averager.averages.items():
        assert torch.equal(resumed.averages[name], tensor)


@pytest.mark.parametrize("dtype", ["auto", "float64"])
def test_a_module_that_was_handed_out_follows_a_buffer_that_grows(dtype):
    torch.manual_seed(0)
    model = Attention()
    model(torch.randn(1, 3, 4))
    averager = polyak.average(model, "ema", decay=0.5, dtype=dtype)
    module = averager.module
    for length in (5, 2, 7):
        with torch.no_grad():
            model.qkv.weight.add_(0.1)
        model(torch.randn(1, length, 4))
        averager.update()
        with torch.no_grad(), averager.applied():
            wanted = model(torch.ones(1, length, 4))
        assert torch.equal(module(torch.ones(1, length, 4)), wanted)
        assert averager.module is module


@pytest.mark.parametrize("options", [{"exclude": "bias"}, {"exclude": "*bias"}, {"buffers": {"bias": "skip"}}])
def test_a_buffer_can_be_named_before_it_is_filled(options):
    model = Attention()
    averager = polyak.average(model, "ema", **options)
    model(torch.randn(1, 4, 4))
    averager.update()
    assert "bias" not in averager.averages


@pytest.mark.parametrize("buffers", ["auto", "copy"])
def test_integers_and_copies_follow_whatever_their_shape_and_type(buffers):
    model = Cache(torch.tensor([1, 2]) if buffers == "auto" else torch.tensor([1.0, 2.0]))
    averager = polyak.average(model, "ema", buffers=buffers)
    for value in ([1, 2, 3], [[4], [5]], [], [6], None, [True, False]):
        train(model, averager, value)
        assert ("cache" in averager.averages) == (value is not None)
        if value is not None:
            assert values(averager) == value
            assert averager.averages["cache"].dtype == model.cache.dtype
    assert averager.n == 6


def test_a_copy_that_was_never_registered_comes_and_goes():
    model = Cache(torch.zeros(1))
    averager = polyak.average(model, "ema", buffers="copy")
    model.register_buffer("late", torch.ones(2))
    averager.update()
    assert averager.averages["late"].tolist() == [1.0, 1.0]
    del model.late
    averager.update()
    assert {*averager.averages} == {"linear.weight", "cache"}


@pytest.mark.parametrize("slots", ["ema", "lawa", "dema"])
def test_an_average_begins_with_the_value_of_the_update_that_sees_the_buffer_first(slots):
    seen = []
    for look in (False, True):
        model = Cache()
        averager = polyak.average(model, slots)
        train(model, averager, None)
        model.cache = torch.tensor([1.0, 2.0])
        if look:  # an evaluation in between changes no number
            assert averager.module.cache.tolist() == averager.averaged_state_dict()["cache"].tolist() == [1.0, 2.0]
        train(model, averager, [3.0, 4.0])
        assert values(averager) == [3.0, 4.0]
        train(model, averager, [5.0, 8.0])
        seen.append(values(averager))
    assert seen[0] == seen[1]
    assert seen[0] != [3.0, 4.0]


def test_an_average_whose_buffer_changed_shape_begins_again_and_says_so_once():
    model = Cache(torch.tensor([0.0]))
    averager = polyak.average(model, "ema", decay=0.5)
    train(model, averager, [2.0])
    assert values(averager) == [1.0]
    with pytest.warns(polyak.PolyakWarning, match="cache changed shape: .* begins again") as caught:
        train(model, averager, [4.0, 8.0])
    assert len(caught) == 1
    assert values(averager) == [4.0, 8.0]
    train(model, averager, [6.0, 8.0])
    assert values(averager) == [5.0, 8.0]
    train(model, averager, [1.0, 1.0, 1.0])
    assert values(averager) == [1.0, 1.0, 1.0]
    assert averager.profile().shares.shape == (4,)


def test_a_mask_of_infinities_that_appears_later_is_copied():
    model = Cache(persistent=False)
    averager = polyak.average(model, "ema")
    for size in (2, 3):
        mask = torch.full((size, size), -torch.inf).triu(1)
        train(model, averager, mask.tolist())
        assert torch.equal(averager.averages["cache"], mask)
    assert averager.skipped == 0


def test_an_update_that_is_skipped_leaves_a_new_buffer_for_the_next_one():
    model = Cache()
    averager = polyak.average(model, "ema", decay=0.5, nonfinite="skip")
    with torch.no_grad():
        model.linear.weight.fill_(torch.nan)
    with pytest.warns(polyak.PolyakWarning, match="NaN"):
        train(model, averager, [1.0])
    with torch.no_grad():
        model.linear.weight.fill_(0.0)
    train(model, averager, [3.0])
    assert values(averager) == [3.0]
    assert averager.averages["linear.weight"].isfinite().all()


def test_new_persistent_averages_of_what_was_never_registered_are_refused():
    model = Cache(torch.zeros(1))
    averager = polyak.average(model, "ema")
    model.register_buffer("late", torch.zeros(2))
    with pytest.raises(polyak.MismatchError, match="new: late"):
        averager.update()
    del model.late, model.cache
    with pytest.raises(polyak.MismatchError, match="missing: cache"):
        averager.update()
    assert averager.n == 0


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda averager: pickle.loads(pickle.dumps(averager))])
def test_a_copied_averager_follows_too(copied):
    model = Cache(torch.zeros(1), persistent=False)
    averager = copied(polyak.average(model, "ema"))
    model.cache = torch.ones(3)
    averager.update(model)
    assert values(averager) == [1.0, 1.0, 1.0]


@pytest.mark.parametrize("order", ["name", "order"])
def test_buffers_that_are_registered_again_may_stand_elsewhere(order):
    model = Cache(torch.zeros(1))
    model.register_buffer("other", torch.zeros(1))
    averager = polyak.average(model, "ema", decay=0.5, match=order)
    del model.cache
    model.register_buffer("cache", torch.ones(1))
    averager.update()
    assert values(averager) == [0.5]


def test_a_bank_follows_in_all_of_its_averages():
    model = Cache(persistent=False)
    bank = polyak.bank(model, {"short": {"name": "ema", "decay": 0.5}, "window": "lawa"})
    for value in ([1.0], [2.0, 3.0], None, [4.0]):
        with torch.no_grad():
            model.linear.weight.add_(1.0)
        model.cache = None if value is None else torch.tensor(value)
        bank.update()
        for averager in bank.values():
            assert ("cache" in averager.averages) == (value is not None)
            assert value is None or values(averager) == value


@pytest.mark.parametrize("strategy", ["ema", "lawa"])
def test_states_from_before_and_after_a_buffer_was_filled_load(strategy):
    model = Cache(persistent=False)
    averager = polyak.average(model, strategy)
    before = averager.state_dict()
    train(model, averager, [1.0, 2.0])
    after = averager.state_dict()
    fresh = Cache(persistent=False)
    resumed = polyak.average(fresh, strategy)
    resumed.load_state_dict(after)  # the model has not filled it: it begins with what the model puts there
    assert [*resumed.averages] == ["linear.weight"]
    fresh.load_state_dict(model.state_dict())
    train(fresh, resumed, [1.0, 2.0])
    train(model, averager, [1.0, 2.0])
    assert values(resumed) == values(averager) == [1.0, 2.0]
    averager.load_state_dict(before)
    train(model, averager, [7.0])
    assert values(averager) == [7.0]


def test_a_state_of_a_persistent_average_needs_the_model_first():
    model = Cache()
    averager = polyak.average(model, "ema", decay=0.5)
    train(model, averager, [1.0, 2.0])
    train(model, averager, [3.0, 2.0])
    fresh = Cache()
    resumed = polyak.average(fresh, "ema", decay=0.5)
    with pytest.raises(polyak.StateError, match=r"unknown: cache\n.*load the model"):
        resumed.load_state_dict(averager.state_dict())
    fresh.cache = torch.zeros(2)
    resumed.load_state_dict(averager.state_dict())
    train(fresh, resumed, [4.0, 2.0])
    train(model, averager, [4.0, 2.0])
    assert values(resumed) == values(averager) == [3.0, 2.0]


def test_parameters_that_change_shape_or_appear_are_refused_all_the_same():
    model = Cache()
    model.register_parameter("scale", None)
    averager = polyak.average(model, "ema")
    model.scale = nn.Parameter(torch.ones(1))
    model.cache = torch.ones(2)
    with pytest.raises(polyak.MismatchError, match="new: scale"):
        averager.update()
    assert [*averager.averages] == ["linear.weight"]
    del model.scale
    model.linear.weight = nn.Parameter(torch.zeros(1, 2))
    with pytest.raises(polyak.MismatchError, match=r"reshaped: linear\.weight"):
        averager.update()
    assert averager.n == 0
