"""A bank: several averages in one pass, each exactly what it would be alone."""

from __future__ import annotations

import copy
import io
import pickle

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import polyak
from models import ZOO, average_bits, drifting, mlp, model_bits

WANTED = {
    "short": {"name": "ema", "decay": 0.5},
    "long": {"strategy": {"name": "ema", "decay": 0.99}},
    "mean": "swa",
    "object": polyak.DebiasedEMA(decay=0.9),
    "rare": {"name": "ema", "decay": 0.9, "every": 3},
    "late": {"name": "ema", "decay": 0.9, "start": 4},
    "exact": {"name": "ema", "decay": 0.9, "dtype": "float64"},
    "coarse": {"name": "ema", "decay": 0.9, "dtype": "bfloat16"},
    "plain": {"name": "ema", "decay": 0.9, "nonfinite": "propagate"},
    "parameters": {"name": "ema", "decay": 0.9, "buffers": "skip"},
}


def _alone(model, wanted, **common):
    if not isinstance(wanted, dict):
        return polyak.average(model, wanted, **common)
    options = {**common, **wanted}
    strategy = options.pop("strategy", None) or options.pop("name")
    return polyak.average(model, strategy, **options)


@pytest.mark.parametrize("kernel", ["auto", "foreach", "loop"])
@pytest.mark.parametrize("kind", ZOO.values(), ids=str)
def test_each_average_of_a_bank_is_bit_for_bit_what_it_is_alone(kind, kernel):
    model = kind.build()
    wanted = {name: one for name, one in WANTED.items() if not (name == "coarse" and kernel == "loop")}
    bank = polyak.bank(model, wanted, kernel=kernel)
    alone = {name: _alone(model, one, kernel=kernel) for name, one in wanted.items()}
    for _ in drifting(model, 10):
        bank.update()
        for averager in alone.values():
            averager.update()
    for name, averager in alone.items():
        assert average_bits(bank[name]) == average_bits(averager), name
        assert (bank[name].n, bank[name].rate) == (averager.n, averager.rate)


def test_averages_that_are_alike_are_moved_by_one_call():
    class Counts(TorchDispatchMode):
        calls = 0

        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            self.calls += 1
            return function(*args, **(kwargs or {}))

    model = nn.Sequential(*(nn.Linear(2, 2) for _ in range(20)))
    bank = polyak.bank(
        model, {f"{k}": {"name": "ema", "decay": k / 10} for k in range(1, 9)}, kernel="foreach", nonfinite="propagate"
    )
    bank.update()
    with Counts() as counter:
        bank.update()
    assert counter.calls <= 2


def test_a_bank_is_a_mapping_of_averagers():
    model = mlp()
    bank = polyak.bank(model, {"a": "ema", "b": "swa"})
    assert [*bank] == ["a", "b"]
    assert len(bank) == 2
    assert all(isinstance(averager, polyak.Averager) for averager in bank.values())
    assert "bank of a: <averager EMA" in repr(bank)
    assert bank.describe().count("stored as") == 2
    with pytest.raises(KeyError, match="the bank has no average 'c'; it has 'a', 'b'"):
        bank["c"]


def test_one_average_is_applied_by_its_name_and_no_update_is_made_meanwhile():
    model = mlp()
    bank = polyak.bank(model, {"a": {"name": "ema", "decay": 0.5}, "b": "swa"})
    for _ in drifting(model, 3):
        bank.update()
    before = model_bits(model)
    with bank.applied("b"):
        assert torch.equal(model[0].weight, bank["b"].averages["0.weight"])
        with pytest.raises(polyak.AppliedError):
            bank.update()
    assert model_bits(model) == before
    assert (bank["a"].n, bank["b"].n) == (3, 3)


def test_a_state_resumes_all_averages_exactly_and_is_loaded_whole_or_not():
    model = mlp()
    straight, resumed = polyak.bank(model, WANTED), polyak.bank(model, WANTED)
    for number, _ in enumerate(drifting(model, 9)):
        if number in {2, 5}:
            file = io.BytesIO()
            torch.save(resumed.state_dict(), file)
            file.seek(0)
            resumed = polyak.bank(model, WANTED)
            resumed.load_state_dict(torch.load(file, weights_only=True))
        straight.update()
        resumed.update()
    for name in WANTED:
        assert average_bits(resumed[name]) == average_bits(straight[name])
    damaged = straight.state_dict()
    damaged["bank"]["coarse"]["slots"]["average"].pop("0.weight")
    before = {name: average_bits(averager) for name, averager in resumed.items()}
    with pytest.raises(polyak.StateError, match=r"missing: 0\.weight"):
        resumed.load_state_dict(damaged)
    assert {name: average_bits(averager) for name, averager in resumed.items()} == before


@pytest.mark.parametrize(
    ("state", "says"),
    [
        ({}, "expected what bank.state_dict"),
        ([], "expected what bank.state_dict"),
        ({"format": 1, "slots": {}}, "this is one averager's: bank"),
        ({"bank": {"other": {}}}, r"that of a bank of \['other'\], and this one has \['a'\]"),
    ],
)
def test_what_is_no_state_of_this_bank_is_refused(state, says):
    with pytest.raises(polyak.StateError, match=says):
        polyak.bank(mlp(), {"a": "ema"}).load_state_dict(state)


def test_the_state_of_a_bank_is_refused_by_an_averager_which_can_load_one_of_its_averages():
    bank, averager = polyak.bank(mlp(), {"a": "ema", "b": "swa"}), polyak.average(mlp(), "ema")
    bank.update()
    state = bank.state_dict()
    with pytest.raises(polyak.StateError, match=r"that of a bank of \['a', 'b'\].*state\['bank'\]\[name\]"):
        averager.load_state_dict(state)
    assert averager.n == 0
    averager.load_state_dict(state["bank"]["a"])
    assert averager.n == 1


@pytest.mark.parametrize(
    ("averages", "says"),
    [
        ({}, "at least one average"),
        ({"": "ema"}, "is a text; got ''"),
        ({3: "ema"}, "is a text; got 3"),
        ({"a": "emma"}, "the average 'a' of the bank: .*(\n.*)*emma"),
        ({"a": {"name": "ema", "decai": 0.9}}, "the average 'a' of the bank: .*(\n.*)*decai"),
        ({"a": "ema", "b": {"name": "ema", "decay": 2}}, "the average 'b' of the bank"),
        ({"a": 3}, "the average 'a' of the bank: a strategy is a name"),
    ],
)
def test_wrong_banks_are_refused_with_the_name_of_the_average(averages, says):
    with pytest.raises(polyak.ConfigError, match=says):
        polyak.bank(mlp(), averages)


@pytest.mark.filterwarnings("ignore:the weights hold NaN:polyak.PolyakWarning")
@pytest.mark.filterwarnings("ignore:1 element of the average:polyak.PolyakWarning")
def test_weights_that_are_not_finite_are_refused_by_those_that_refuse_them():
    model = mlp()
    members = {name: {"name": "ema", "nonfinite": name} for name in ("skip", "propagate", "hold")}
    bank = polyak.bank(model, {**members, "also": members["skip"]})
    bank.update()
    model[0].weight.data[0, 0] = torch.nan
    bank.update()
    assert [(bank[name].n, bank[name].skipped) for name in bank] == [(1, 1), (2, 0), (2, 0), (1, 1)]
    assert bank["propagate"].averages["0.weight"][0, 0].isnan()
    assert bank["skip"].averages["0.weight"].isfinite().all()
    assert bank["hold"].averages["0.weight"].isfinite().all()


def test_an_average_that_raises_leaves_all_others_as_they_were():
    model = mlp()
    bank = polyak.bank(model, {"a": "ema", "b": {"name": "ema", "nonfinite": "raise"}, "c": "swa"})
    bank.update()
    model[0].weight.data[0, 0] = torch.nan
    before = {name: average_bits(averager) for name, averager in bank.items()}
    with pytest.raises(polyak.NonFiniteError):
        bank.update()
    assert {name: average_bits(averager) for name, averager in bank.items()} == before
    assert [averager.n for averager in bank.values()] == [1, 1, 1]


def test_replaced_tensors_are_followed_by_all():
    model = mlp()
    bank = polyak.bank(model, {"a": {"name": "ema", "decay": 0.5}, "b": {"name": "ema", "decay": 0.75}})
    bank.update()
    before = {name: bank[name].averages["0.weight"].clone() for name in bank}
    model[0].weight = nn.Parameter(torch.full((5, 3), 8.0))
    bank.update()
    model[0].weight.data = torch.full((5, 3), 8.0)
    bank.update()
    for name, rate in (("a", 0.5), ("b", 0.25)):
        expected = before[name].lerp(torch.full((5, 3), 8.0), rate).lerp(torch.full((5, 3), 8.0), rate)
        assert torch.allclose(bank[name].averages["0.weight"], expected)
    model.append(nn.Linear(2, 2))
    with pytest.raises(polyak.MismatchError):
        bank.update()


@pytest.mark.parametrize("alone", ["a", "b"])
def test_new_data_is_found_whoever_looks_first(alone):
    model = nn.Linear(64, 64, bias=False)
    bank = polyak.bank(model, {"a": {"name": "ema", "decay": 0.5}, "b": {"name": "ema", "decay": 0.5}})
    nn.init.constant_(model.weight, 1.0)
    for averager in bank.values():
        averager.load_state_dict(polyak.average(model, "ema", decay=0.5).state_dict())
    bank.update()
    model.weight.data = torch.full((64, 64), 9.0)
    bank[alone].update()
    assert bank[alone].averages["weight"].eq(5.0).all()
    bank.update()
    assert bank[alone].averages["weight"].eq(7.0).all()


def test_averages_of_other_cadences_find_new_data():
    model = nn.Linear(64, 64, bias=False)
    nn.init.constant_(model.weight, 1.0)
    bank = polyak.bank(
        model, {"a": {"name": "ema", "decay": 0.5, "every": 2}, "b": {"name": "ema", "decay": 0.5}, "c": "ema"}
    )
    for _ in range(2):
        bank.update()
    model.weight.data = torch.full((64, 64), 9.0)
    bank.update()
    assert bank["b"].averages["weight"].eq(5.0).all()


def test_a_tensor_that_an_average_leaves_alone_cannot_stop_it():
    model = mlp()
    bank = polyak.bank(model, {"part": {"name": "ema", "include": "0.*"}, "all": "ema"}, nonfinite="skip")
    model[2].weight.data[0, 0] = torch.nan
    with pytest.warns(polyak.PolyakWarning, match=r"in 2\.weight"):
        bank.update()
    assert [(averager.n, averager.skipped) for averager in bank.values()] == [(1, 0), (0, 1)]


def test_an_update_that_cannot_begin_counts_nothing():
    model = mlp()
    bank = polyak.bank(model, {"rare": {"name": "ema", "every": 3}, "each": "ema"})
    bank.update()
    model.append(nn.Linear(2, 2))
    with pytest.raises(polyak.MismatchError):
        bank.update()
    assert [averager.state_dict()["step"] for averager in bank.values()] == [1, 1]


def test_a_listener_of_an_average_that_is_moved_alone_leaves_none_behind():
    bank = polyak.bank(mlp(), {"window": {"name": "lawa", "window": 3}, "mean": "swa"})
    bank["window"].updater.listeners.append(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        bank.update()
    assert (bank["window"].n, bank["mean"].n) == (1, 1)


def test_a_listener_that_fails_leaves_no_average_behind():
    model = mlp()
    bank = polyak.bank(model, {"a": {"name": "ema", "nonfinite": "raise"}, "b": "ema"})
    bank["a"].updater.listeners.append(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        bank.update()
    assert [averager.n for averager in bank.values()] == [1, 1]


def test_a_bank_is_copied_and_pickled():
    model = mlp()
    bank = polyak.bank(model, {"a": {"name": "ema", "decay": 0.5}, "b": "swa"})
    bank.update()
    for other in (copy.deepcopy(bank), pickle.loads(pickle.dumps(bank))):
        next(drifting(model, 1))
        other.update(model)
        assert (other["a"].n, bank["a"].n) == (2, 1)
