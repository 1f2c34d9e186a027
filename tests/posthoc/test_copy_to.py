"""An average that was made after the run, written into models."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import polyak
from models import drifting
from polyak.posthoc import Recorder, synthesize


def network():
    return nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2))


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    folder, model = tmp_path_factory.mktemp("run"), network()
    averager = polyak.average(model, "ema", decay=0.9)
    with Recorder(averager, folder, every=10):
        for _ in drifting(model, 40):
            averager.update()
    return synthesize(folder, "swa")


@pytest.mark.parametrize("wrap", [lambda model: model, torch.compile, nn.DataParallel], ids=["plain", "compiled", "dp"])
def test_the_model_is_the_average(made, wrap):
    model = network()
    objects = [*model.parameters()]
    made.copy_to(wrap(model))
    assert all(torch.equal(value, made.state_dict[name]) for name, value in model.state_dict().items())
    assert all(map(lambda first, second: first is second, objects, model.parameters()))


def test_a_model_of_another_dtype_keeps_it(made):
    model = network().double()
    made.copy_to(model)
    assert model[0].weight.dtype == torch.float64
    assert torch.equal(model[0].weight.float(), made.state_dict["0.weight"])


def test_tied_weights_are_written_once_and_stay_tied(made):
    model = network()
    model.add_module("again", model[0])
    made.copy_to(model)
    assert model.again is model[0]
    assert torch.equal(model[0].weight, made.state_dict["0.weight"])


@pytest.mark.parametrize(
    ("model", "says"),
    [
        (
            nn.Sequential(nn.Linear(3, 5), nn.BatchNorm1d(5), nn.Linear(5, 2)),
            r"0.weight has shape \(4, 3\), not \(5, 3\)",
        ),
        (nn.Sequential(*network(), nn.Linear(2, 2)), "3.weight is missing"),
    ],
)
def test_another_model_is_refused_and_nothing_changes(made, model, says):
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(polyak.MismatchError, match=says):
        made.copy_to(model)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
