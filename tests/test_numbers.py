"""Numbers that users give: those of numpy and torch count as Python's, and booleans do not count as numbers."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from tests.models import mlp

import polyak
from polyak.posthoc import Recorder, sweep, synthesize

FIVE = [np.int64(5), np.uint8(5), np.array(5), torch.tensor(5), torch.tensor([5])]
NONE = [True, np.bool_(1), np.array(True), torch.tensor(True), torch.tensor([True]), "5", 5.5, [5]]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    averager = polyak.average(mlp(), "ema", decay=0.5)
    with Recorder(averager, folder, every=5):
        for _ in range(10):
            averager.update()
    return folder


CALLS = {
    "start": lambda number, _: polyak.AveragerConfig(start=number),
    "every": lambda number, _: polyak.AveragerConfig(every=number),
    "a setting": lambda number, _: polyak.LAWA(window=number),
    "AveragerConfig.profile": lambda number, _: len(polyak.AveragerConfig().profile(number)),
    "counted_from": lambda number, _: len(polyak.AveragerConfig(every=2).profile(9, counted_from=number)),
    "n": lambda number, _: len(polyak.Profile.of(polyak.EMA(), number)),
    "first": lambda number, _: polyak.Profile.of(polyak.EMA(), 3, first=number).steps.tolist(),
    "steps": lambda number, _: polyak.convert("ema", "power", steps=number).strategy,
    "to_every": lambda number, _: polyak.convert("ema", "power", steps=10, to_every=number).strategy,
    "synthesize": lambda number, run: synthesize(run, "swa", at_step=number).at_step,
    "sweep": lambda number, run: sweep(run, lambda _: 0.0, ["swa"], at_step=number).synthesis.at_step,
}


@pytest.mark.parametrize("number", FIVE, ids=repr)
@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)
def test_an_integer_of_numpy_or_torch_counts_as_pythons(call, number, run):
    assert call(number, run) == call(5, run)


@pytest.mark.parametrize("number", NONE, ids=repr)
@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)
def test_what_is_no_integer_is_refused_by_polyak(call, number, run):
    with pytest.raises(polyak.ConfigError, match=r"[Ii]nteger"):
        call(number, run)


@pytest.mark.parametrize("number", FIVE, ids=repr)
def test_a_recorder_takes_integers_of_numpy_and_torch(number, tmp_path):
    averager = polyak.average(mlp(), "ema", decay=0.5)
    with Recorder(averager, tmp_path, every=number, keep=number):
        for _ in range(40):
            averager.update()
    assert sorted(int(path.stem[-12:]) for path in tmp_path.glob("average-*")) == [20, 25, 30, 35, 40]


@pytest.mark.parametrize("number", [*NONE, 0, -1, 2**63], ids=repr)
@pytest.mark.parametrize("option", ["every", "keep"])
def test_a_recorder_refuses_what_is_no_count_and_writes_nothing(option, number, tmp_path):
    with pytest.raises(polyak.ConfigError, match=f"{option}: got .*; expected an integer from 1"):
        Recorder(polyak.average(mlp(), "ema"), tmp_path / "run", **{"every": 5, option: number})
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("number", [True, np.array(True), torch.tensor(False), "0.5", [0.5]], ids=repr)
def test_what_is_no_number_is_no_setting(number):
    with pytest.raises(polyak.ConfigError, match="decay: Input should be a valid number"):
        polyak.EMA(decay=number)


@pytest.mark.parametrize("number", [np.float64(0.5), np.float16(0.5), np.array(0.5), torch.tensor(0.5)], ids=repr)
def test_a_number_of_numpy_or_torch_is_saved_as_a_plain_one(number):
    config = polyak.AveragerConfig(strategy=polyak.EMA(decay=number))
    assert json.loads(config.model_dump_json())["strategy"]["decay"] == 0.5
    assert type(config.strategy.decay) is float


@pytest.mark.parametrize("steps", [[3, 5], (3, 5), np.array([3, 5], np.uint8), torch.tensor([3, 5]), [np.int32(3), 5]])
def test_steps_of_numpy_or_torch_make_a_profile(steps):
    assert polyak.Profile.from_rates([0.5, 0.5], steps).steps.tolist() == [3, 5]
    assert len(polyak.Profile.from_rates([], [])) == 0
