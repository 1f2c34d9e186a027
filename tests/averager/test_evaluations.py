"""An average that is mostly its start is told of when it is evaluated."""

from __future__ import annotations

import copy

import pytest
import torch

import polyak
from models import drifting, mlp

# An average that is hardly one


def _evaluations(averager, model):
    def applied():
        with averager.applied():
            pass

    return {
        "applied": applied,
        "module": lambda: averager.module,
        "call": lambda: averager(torch.ones(2, 3)),
        "copy_to": lambda: averager.copy_to(copy.deepcopy(model)),
        "averaged_state_dict": averager.averaged_state_dict,
    }


@pytest.mark.parametrize("how", ["applied", "module", "call", "copy_to", "averaged_state_dict"])
@pytest.mark.parametrize(("strategy", "share"), [("ema", 90), ("ema_v1", 99), ("dema", 81)])
def test_an_average_that_is_mostly_its_start_is_told_once_when_it_is_evaluated(how, strategy, share):
    model = mlp()
    averager = polyak.average(model, strategy)
    for _ in range(99):
        averager.update()
    for evaluate in _evaluations(averager, model).values():
        evaluate()
    averager.update()
    averager.state_dict()
    words = rf"after 100 updates the average is still {share}% the weights .*'ema_debiased' and origin='first'"
    with pytest.warns(polyak.PolyakWarning, match=words) as told:
        _evaluations(averager, model)[how]()
    assert told[0].filename == __file__
    for evaluate in _evaluations(averager, model).values():
        evaluate()


@pytest.mark.parametrize(
    ("strategy", "options"),
    [
        ("ema", {"decay": 0.99}),
        ("ema", {"origin": "first"}),
        ("ema", {"start": 10}),
        ("ema_debiased", {}),
        ("ema_tf", {}),
        ("ema_v3", {"use_warmup": True}),
        ("swa", {}),
        ("lawa", {"window": 2}),
        ("dema", {"decay": 0.9}),
    ],
)
def test_an_average_that_has_left_its_start_is_evaluated_without_a_word(strategy, options):
    model = mlp()
    averager = polyak.average(model, strategy, **options)
    for _ in range(110):
        averager.update()
    for evaluate in _evaluations(averager, model).values():
        evaluate()


def test_a_long_average_is_told_of_in_a_bank_and_after_a_resume_and_once_it_left_the_start_no_more():
    model = mlp()
    bank = polyak.bank(model, {"long": "ema", "short": {"name": "ema", "decay": 0.9}})
    for _ in drifting(model, 100):
        bank.update()
    with bank.applied("short"):
        pass
    resumed = polyak.average(model, "ema")
    resumed.load_state_dict(bank["long"].state_dict())
    with pytest.warns(polyak.PolyakWarning, match="still 90%"), bank.applied("long"):
        pass
    for _ in range(600):
        resumed.update()
    assert resumed.module is not None
