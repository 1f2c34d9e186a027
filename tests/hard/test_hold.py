"""``nonfinite="hold"``, the default: an element that would not be finite keeps its old value, all others move."""

from __future__ import annotations

import copy
import math
import warnings

import numpy as np
import pytest
import torch
from torch import nn

import polyak
from models import ZOO, bits, drifting
from oracle import strategies_to_try

KERNELS = ["auto", "foreach", "loop"]


def linear():
    return nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3), nn.Linear(3, 2))


def poison(model, value=math.nan, place=(0, 0)):
    with torch.no_grad():
        model[2].weight[place] = value


def slots(averager):
    return {f"{s.name} {slot}": t for s in averager.stored for slot, t in {"average": s.average, **s.slots}.items()}


def run(strategy, settings, kernel, poisoned):
    """Average 12 steps, of which some have strange elements in one tensor; return the averager."""
    torch.manual_seed(0)
    model = linear()
    averager = polyak.average(model, strategy, kernel=kernel, **settings)
    for step, _ in enumerate(drifting(model, 12)):
        healthy = model[2].weight.detach().clone()
        if poisoned and step in {0, 3, 4, 8}:
            poison(model, [math.nan, math.inf, -math.inf][step % 3])
            poison(model, math.nan, (1, 2))
        averager.update(lr=0.1 if strategy == "lr_weighted" else None)
        with torch.no_grad():
            model[2].weight.copy_(healthy)
    return averager


@pytest.mark.filterwarnings("ignore:.*kept the old value:polyak.PolyakWarning")
@pytest.mark.filterwarnings("ignore:.*moves again:polyak.PolyakWarning")
@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize(("strategy", "settings"), strategies_to_try(), ids=str)
def test_all_other_elements_move_as_without_strange_ones(strategy, settings, kernel):
    clean, held = (run(strategy, settings, kernel, poisoned) for poisoned in (False, True))
    assert (held.n, held.rate, held.progress) == (clean.n, clean.rate, clean.progress)
    expected = slots(clean)
    for name, tensor in slots(held).items():
        if name.startswith("2.weight"):
            assert tensor.isfinite().all()
            for t in (tensor, expected[name]):
                t[0, 0] = t[1, 2] = 0
        assert bits(tensor) == bits(expected[name]), name


@pytest.mark.filterwarnings("ignore:.*kept the old value:polyak.PolyakWarning")
@pytest.mark.filterwarnings("ignore:.*moves again:polyak.PolyakWarning")
@pytest.mark.parametrize("kernel", KERNELS)
def test_an_element_that_is_held_misses_these_updates_and_no_others(kernel):
    averager = run("ema", {"decay": 0.9}, kernel, poisoned=True)
    torch.manual_seed(0)
    model, expected = linear(), None
    expected = model[2].weight[0, 0].double()
    for step, _ in enumerate(drifting(model, 12)):
        if step not in {0, 3, 4, 8}:
            expected = expected + 0.1 * (model[2].weight[0, 0].double() - expected)
    assert averager.averages["2.weight"][0, 0].item() == pytest.approx(expected.item(), rel=1e-6)


@pytest.mark.parametrize("kernel", KERNELS)
def test_what_was_held_is_counted_named_and_warned_of_once(kernel):
    model = linear()
    averager = polyak.average(model, "ema", decay=0.5, kernel=kernel)
    assert averager.held == {}
    averager.update()
    assert averager.held == {}
    healthy = copy.deepcopy(model.state_dict())
    poison(model)
    with torch.no_grad():
        model[0].bias.fill_(math.inf)
    with pytest.warns(
        polyak.PolyakWarning, match=r"4 elements .* step 2 \(3 of 0.bias, 1 of 2.weight\).*averager.held"
    ):
        averager.update()
    with warnings.catch_warnings(action="error"):
        averager.update()
    assert averager.held == {"0.bias": 3, "2.weight": 1}
    assert "held by the last update: 0.bias (all 3), 2.weight (1 of 6)" in averager.describe()
    model.load_state_dict(healthy)
    with pytest.warns(polyak.PolyakWarning, match=r"since the update at step 4 .* moves again; 2 updates kept"):
        averager.update()
    poison(model)
    with warnings.catch_warnings(action="error"):
        averager.update()
    assert (averager.n, averager.skipped, averager.profile().held) == (5, 0, 3)
    assert averager.metrics()["held"] == 1


@pytest.mark.filterwarnings("ignore::polyak.PolyakWarning")
@pytest.mark.parametrize("strategy", ["ema", "ema_v3", "swa", "dema"])
def test_an_update_in_which_nothing_could_move_is_counted_as_skipped(strategy):
    model = linear()
    averager = polyak.average(model, strategy)
    averager.update()
    before = {name: bits(tensor) for name, tensor in averager.averages.items()}
    kept = copy.deepcopy(model.state_dict())
    for tensor in (*model.parameters(), *model.buffers()):
        if tensor.is_floating_point():
            tensor.data.fill_(math.nan)
    averager.update()
    assert (averager.n, averager.skipped) == (2, 1)
    if strategy != "dema":  # whose average goes on towards its slots
        assert {name: bits(tensor) for name, tensor in averager.averages.items()} == before
    model.load_state_dict(kept)
    averager.update()
    assert (averager.n, averager.skipped, averager.profile().held) == (3, 1, 1)


@pytest.mark.filterwarnings("ignore::polyak.PolyakWarning")
def test_counts_survive_a_state_and_what_it_holds_begins_anew():
    model = linear()
    averager = polyak.average(model, "ema", decay=0.5)
    poison(model)
    averager.update()
    saved = averager.state_dict()
    other = polyak.average(model, "ema", decay=0.5)
    other.load_state_dict(saved)
    assert other.profile().held == 1
    assert other.held == {}
    other.update()
    assert other.profile().held == 2
    assert other.held == {"2.weight": 1}


@pytest.mark.parametrize("held", [-1, 2, True, "1", None], ids=repr)
def test_a_state_with_an_impossible_count_is_refused(held):
    averager = polyak.average(linear(), "ema")
    averager.update()
    saved = averager.state_dict()
    saved["history"][0]["held"] = held
    with pytest.raises(polyak.StateError, match="updates that kept old values"):
        averager.load_state_dict(saved)


@pytest.mark.parametrize("kernel", KERNELS)
def test_an_average_that_was_loaded_with_strange_elements_begins_anew_there(kernel):
    model = linear()
    averager = polyak.average(model, "ema", decay=0.5, kernel=kernel)
    saved = averager.state_dict()
    saved["slots"]["average"]["2.weight"][0, 0] = math.nan
    averager.load_state_dict(saved)
    with torch.no_grad():
        model[2].weight += 1
    averager.update()
    average = averager.averages["2.weight"]
    assert average[0, 0] == model[2].weight[0, 0]
    assert average[0, 1] == model[2].weight[0, 1] - 0.5
    assert averager.held == {}


def test_a_start_that_is_not_finite_begins_anew_where_it_is_not():
    model = linear()
    healthy = model[2].weight[0, 0].item()
    poison(model)
    averager = polyak.average(model, "ema", decay=0.5)
    poison(model, healthy)
    averager.update()
    assert averager.rate == 0.5
    assert torch.equal(averager.averages["2.weight"], model[2].weight)


@pytest.mark.filterwarnings("ignore::polyak.PolyakWarning")
def test_copied_buffers_are_copied_and_skipped_ones_are_left_alone():
    model = linear()
    copied = polyak.average(model, "ema", decay=0.5, buffers="copy")
    left = polyak.average(model, "ema", decay=0.5, buffers="skip")
    model[1].running_mean.fill_(math.nan)
    for averager in (copied, left):
        averager.update()
        assert averager.held == {}
    assert copied.averages["1.running_mean"].isnan().all()


@pytest.mark.filterwarnings("ignore::polyak.PolyakWarning")
def test_an_average_that_the_first_update_replaces_is_held_too():
    model = linear()
    averager = polyak.average(model, "swa")
    start = bits(averager.averages["2.weight"][0, 0])
    poison(model)
    averager.update()
    assert averager.rate == 1
    assert bits(averager.averages["2.weight"][0, 0]) == start
    assert averager.held == {"2.weight": 1}


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float64"])
@pytest.mark.filterwarnings("ignore::polyak.PolyakWarning")
def test_averages_of_any_dtype_stay_finite(dtype):
    model = linear()
    averager = polyak.average(model, "ema", decay=0.5, dtype=dtype)
    poison(model, 1e30)  # infinite as a float16
    averager.update()
    assert all(t.isfinite().all() for t in averager.averages.values())
    assert averager.held == ({"2.weight": 1} if dtype == "float16" else {})


@pytest.mark.filterwarnings("ignore::polyak.PolyakWarning")
def test_the_difference_of_the_largest_numbers_is_held():
    model = linear()
    largest = torch.finfo(torch.float32).max
    poison(model, largest)
    averager = polyak.average(model, "ema", decay=0.5)
    poison(model, -largest)
    averager.update()
    assert averager.averages["2.weight"][0, 0] == largest
    assert averager.held == {"2.weight": 1}


@pytest.mark.filterwarnings("ignore::polyak.PolyakWarning")
@pytest.mark.parametrize("kernel", ["auto", "foreach"])
def test_each_average_of_a_bank_holds_as_it_would_alone(kernel):
    members = {
        "fast": {"name": "ema", "decay": 0.1},
        "slow": {"name": "ema", "decay": 0.9},
        "mean": "swa",
        "two": "dema",
    }
    torch.manual_seed(0)
    model = linear()
    bank = polyak.bank(model, members, kernel=kernel)
    alone = {name: polyak.average(model, member, kernel=kernel) for name, member in members.items()}
    for step, _ in enumerate(drifting(model, 6)):
        if step in {1, 2}:
            poison(model)
        bank.update()
        for averager in alone.values():
            averager.update()
        if step == 1:
            assert all(averager.held == {"2.weight": 1} for averager in bank.values())
    for name, averager in alone.items():
        assert {k: bits(t) for k, t in slots(bank[name]).items()} == {k: bits(t) for k, t in slots(averager).items()}
        assert bank[name].profile().held == averager.profile().held


def test_a_change_to_hold_or_from_it_is_of_the_next_update():
    model = linear()
    averager = polyak.average(model, "ema", decay=0.5, nonfinite="propagate")
    averager.configure(nonfinite="hold")
    poison(model)
    with pytest.warns(polyak.PolyakWarning, match="kept the old value"):
        averager.update()
    assert averager.averages["2.weight"].isfinite().all()
    averager.configure(nonfinite="propagate")
    averager.update()
    assert averager.averages["2.weight"].isnan().sum() == 1
    averager.configure(nonfinite="skip")
    with pytest.warns(polyak.PolyakWarning, match="left out"):
        averager.update()
    assert (averager.n, averager.skipped) == (2, 1)


def test_a_state_of_skip_stays_one():
    model = linear()
    saved = polyak.average(model, "ema", nonfinite="skip").state_dict()
    averager = polyak.average(model, "ema")
    averager.load_state_dict(saved)
    poison(model)
    with pytest.warns(polyak.PolyakWarning, match="left out"):
        averager.update()
    assert (averager.n, averager.skipped) == (0, 1)


@pytest.mark.filterwarnings("ignore::polyak.PolyakWarning")
@pytest.mark.parametrize("kind", ZOO.values(), ids=str)
def test_every_architecture_keeps_a_finite_average(kind):
    model = kind.build()
    averager = polyak.average(model, "ema", decay=0.5)
    finite = {name for name, tensor in averager.averages.items() if tensor.isfinite().all()}
    for step, _ in enumerate(drifting(model, 3)):
        for parameter in model.parameters():
            if parameter.is_floating_point() and parameter.numel():
                parameter.data[np.unravel_index(step % parameter.numel(), parameter.shape)] = math.nan
        averager.update()
    assert averager.n == 3
    assert all(averager.averages[name].isfinite().all() for name in finite)


def test_metrics_are_plain_numbers():
    model = nn.Linear(2, 2)
    averager = polyak.average(model, "ema", decay=0.5)
    first = averager.metrics()
    assert {name for name, value in first.items() if math.isnan(value)} == {"rate", "half_life"}
    with torch.no_grad():
        model.weight += 3
        model.bias -= 4
    averager.update()
    found = averager.metrics()
    assert {type(value) for value in found.values()} <= {int, float}
    averages = torch.cat([a.flatten().double() for a in averager.averages.values()])
    weights = torch.cat([w.detach().flatten().double() for w in model.parameters()])
    assert found["distance"] == pytest.approx((averages - weights).norm().item(), rel=1e-6)
    assert found["cosine"] == pytest.approx(torch.cosine_similarity(averages, weights, 0).item(), rel=1e-6)
    assert found["half_life"] == averager.profile().half_life
