"""The state on its way out and in: what it holds, what it refuses, and what a load leaves alone."""

from __future__ import annotations

import copy
import io
import pickle
import subprocess
import sys
import warnings

import pytest
import torch

import polyak
from models import ZOO, Tied, average_bits, drifting, mlp
from polyak.engine.history import Identity


def _through_a_file(state):
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def _used(model, strategy="ema", steps=3, **options):
    averager = polyak.average(model, strategy, **options)
    for _ in drifting(model, steps):
        averager.update()
    return averager


def test_a_state_names_everything_a_reader_needs():
    state = _used(Tied(), "ema", decay=0.5, every=1).state_dict()
    assert state["config"]["every"] == 1
    assert state["config"]["dtype"] == "auto"
    assert state["aliases"] == [["emb.weight", "head.weight"]]
    assert state["progress"]["n"] == state["n"] == 3
    (history,) = state["history"]
    assert {key: column.tolist() for key, column in history.items()} == {"rates": [0.5], "strides": [1], "last": [3]}
    assert state["skipped"] == 0


def test_the_history_of_a_constant_decay_stays_small():
    averager = polyak.average({"w": torch.zeros(1)}, "ema", decay=0.9)
    for _ in range(500):
        averager.update()
    assert averager.state_dict()["history"][0]["rates"].numel() == 1
    assert len(averager.profile()) == 500


@pytest.mark.filterwarnings("ignore:torch.distributed is (disabled|unavailable)", "ignore::FutureWarning")
@pytest.mark.parametrize("kind", ["pt", "safetensors", "dcp", "pickle", "copy"])
def test_the_identity_of_a_history_is_saved_with_it(tmp_path, kind):
    averager, other = (_used(mlp(), "ema", decay=0.5) for _ in range(2))
    averager.configure(decay=0.75)
    averager.identity = Identity("00ff", ((2, "ab"), (3, "cd")))
    if kind in {"pickle", "copy"}:
        other = pickle.loads(pickle.dumps(averager)) if kind == "pickle" else copy.deepcopy(averager)
    elif kind == "dcp":
        polyak.distributed.save(averager, tmp_path / "average")
        polyak.distributed.load(other, tmp_path / "average")
    else:
        polyak.save(averager, tmp_path / f"average.{kind}")
        polyak.load(other, tmp_path / f"average.{kind}")
    assert other.identity == averager.identity
    assert other.state_dict()["history"][0]["identity"] == averager.state_dict()["history"][0]["identity"]


def test_a_state_taken_inside_applied_holds_the_average():
    model = mlp()
    averager = _used(model)
    expected = average_bits(averager)
    with averager.applied():
        state = averager.state_dict()
    other = polyak.average(mlp(), "ema")
    other.load_state_dict(state)
    assert average_bits(other) == expected


@pytest.mark.parametrize("kind", ZOO.values(), ids=str)
def test_a_load_keeps_layouts_and_shares_no_memory_with_the_state(kind):
    averager = _used(kind.build())
    state = averager.state_dict()
    other = polyak.average(kind.build(), "ema")
    strides = {name: tensor.stride() for name, tensor in other.averages.items()}
    other.load_state_dict(state)
    assert {name: tensor.stride() for name, tensor in other.averages.items()} == strides
    assert average_bits(other) == average_bits(averager)
    given = {tensor.data_ptr() for tensor in state["slots"]["average"].values() if tensor.numel()}
    assert not given & {tensor.data_ptr() for tensor in other.averages.values() if tensor.numel()}


def test_a_load_under_inference_mode_leaves_an_averager_that_can_be_updated():
    model = mlp()
    averager = _used(model)
    with torch.inference_mode():
        averager.load_state_dict(averager.state_dict())
    for _ in drifting(model, 1):
        averager.update()
    assert averager.n == 4


def test_two_loads_in_a_row_leave_the_second_one():
    model, x = mlp(), torch.ones(1, 3)
    averager = polyak.average(model, "ema", decay=0.5)
    states, results = [], []
    for _ in drifting(model, 4):
        averager.update()
        states.append(averager.state_dict())
        results.append(averager(x).clone())
    for state, result in [*zip(states, results, strict=True)][::-1] * 2:
        averager.load_state_dict(states[0])
        averager.load_state_dict(state)
        assert torch.equal(averager(x), result)


def test_loads_of_states_with_one_count_are_told_apart():
    model, x = mlp(), torch.ones(1, 3)
    averager = polyak.average(model, "ema", decay=0.5)
    states = []
    for seed in range(6):
        other = _used(mlp(), "ema", steps=2, decay=0.5)
        for _ in drifting(other.core.binding.model, 1, seed=seed):
            pass
        states.append(other.state_dict())
    averager(x)
    for state in states * 2:
        averager.load_state_dict(state)
        averager.load_state_dict(state)
        expected = nn_linear(state, x)
        assert torch.allclose(averager(x), expected)


def nn_linear(state, x):
    weights = state["slots"]["average"]
    hidden = torch.relu(x @ weights["0.weight"].T + weights["0.bias"])
    return hidden @ weights["2.weight"].T + weights["2.bias"]


def test_a_resume_may_change_the_cadence():
    averager = _used(mlp(), "swa", every=1)
    other = polyak.average(mlp(), "swa", every=2)
    with pytest.warns(polyak.PolyakWarning, match=r"every=2 \(saved: 1\)"):
        other.load_state_dict(_through_a_file(averager.state_dict()))
    other.update()
    assert (other.n, other.options.every) == (4, 2)
    other.update()
    assert other.n == 4


def test_a_state_of_a_bfloat16_average_carries_its_generator():
    model = mlp()
    averager = _used(model, dtype="bfloat16")
    state = _through_a_file(averager.state_dict())
    assert set(dict(state["generators"])) == {"cpu"}
    assert polyak.average(model, dtype="bfloat16").state_dict()["generators"] == ()


def test_a_fresh_process_resumes_from_a_file(tmp_path):
    path = tmp_path / "average.pt"
    model = mlp()
    averager = _used(model, "ema_v3", use_warmup=True)
    torch.save({"model": model.state_dict(), "average": averager.state_dict()}, path)
    script = f"""
import polyak, torch
from torch import nn
model = nn.Sequential(nn.Linear(3, 5), nn.ReLU(), nn.Linear(5, 2))
saved = torch.load({str(path)!r}, weights_only=True)
model.load_state_dict(saved["model"])
averager = polyak.average(model, "ema_v3", use_warmup=True)
averager.load_state_dict(saved["average"])
with torch.no_grad():
    model[0].weight.add_(1.0)
averager.update()
torch.save(averager.state_dict(), {str(path)!r})
"""
    subprocess.run([sys.executable, "-c", script], check=True, timeout=120)
    with torch.no_grad():
        model[0].weight.add_(1.0)
    averager.update()
    other = polyak.average(mlp(), "ema_v3", use_warmup=True)
    other.load_state_dict(torch.load(path, weights_only=True))
    assert average_bits(other) == average_bits(averager)
    assert (other.n, other.rate) == (4, averager.rate)


def test_a_load_that_warns_as_an_error_has_loaded_nothing():
    averager, other = _used(mlp(), decay=0.5), _used(mlp(), decay=0.9, steps=1)
    before = average_bits(averager), averager.n
    with pytest.raises(polyak.PolyakWarning):  # warnings are errors in this test suite
        averager.load_state_dict(other.state_dict())
    assert (average_bits(averager), averager.n) == before


def test_a_state_is_no_heavier_than_its_tensors():
    averager = _used(mlp())
    file = io.BytesIO()
    torch.save(averager.state_dict(), file)
    tensors = sum(tensor.nbytes for tensor in averager.averages.values())
    assert file.tell() < tensors + 10_000


def _checkpoint(averager, model):
    return {
        "model": {key: value.clone() for key, value in model.state_dict().items()},
        "average": averager.state_dict(),
    }


@pytest.mark.parametrize("name", ["ema", "swa", "lawa"])
def test_a_run_that_resumes_from_the_average_is_warned(name):
    model = mlp()
    averager = polyak.average(model, name)
    for _ in drifting(model, 12):
        averager.update()
    with averager.applied():
        inside = _checkpoint(averager, model)
    for saved, warned in ((inside, True), (_checkpoint(averager, model), False)):
        resumed = mlp()
        resumed.load_state_dict(saved["model"])
        other = polyak.average(resumed, name)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            other.load_state_dict(saved["average"])
        assert [str(one.message) for one in caught if "inside applied()" in str(one.message)] == [
            str(one.message) for one in caught
        ]
        assert len(caught) == warned
        assert all(one.filename == __file__ for one in caught)


def test_a_bank_that_resumes_from_one_of_its_averages_is_warned():
    model = mlp()
    bank = polyak.bank(model, {"a": "ema", "b": "swa"})
    for _ in drifting(model, 12):
        bank.update()
    with bank.applied("b"):
        inside = _checkpoint(bank, model)
    resumed = mlp()
    resumed.load_state_dict(inside["model"])
    other = polyak.bank(resumed, {"a": "ema", "b": "swa"})
    with pytest.warns(polyak.PolyakWarning, match=r"inside applied\(\)"):
        other.load_state_dict(inside["average"])


def test_a_state_loads_into_an_averager_whose_model_became_another_one():
    model = mlp()
    averager = polyak.average(model, "ema")
    for _ in drifting(model, 12):
        averager.update()
    state = averager.state_dict()
    model[0].weight = torch.nn.Parameter(torch.zeros(2, 2))
    averager.load_state_dict(state)  # the update says what does not fit
    with pytest.raises(polyak.MismatchError):
        averager.update()


def test_a_history_of_format_1_has_its_columns_in_order_and_the_rest_between_them():
    model = mlp()
    averager = polyak.average(model, "ema", decay=0.5)
    for step, _ in enumerate(drifting(model, 4), 1):
        averager.update(step=10 * step)  # steps that are given are a column of their own
        averager.configure(decay=0.5 + 0.1 * step)
    averager.identity = Identity("00ff", ((10, "ab"),))
    state = averager.state_dict()
    (history,) = state["history"]
    assert {*history} == {"rates", "strides", "last", "lrs", "counted", "changes", "identity"}
    before = (*(history[key] for key in ("rates", "strides", "last")), history["changes"], history["identity"])
    former = state | {"format": 1, "history": (*before, history["lrs"], history["counted"])}
    other = polyak.average(mlp(), "ema", decay=0.5)
    other.load_state_dict(former)
    (again,) = other.state_dict()["history"]
    assert {key: part.tolist() if isinstance(part, torch.Tensor) else part for key, part in again.items()} == {
        key: part.tolist() if isinstance(part, torch.Tensor) else part for key, part in history.items()
    }
