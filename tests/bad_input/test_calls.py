"""Attributes and calls that cannot be meant show the right ones."""

from __future__ import annotations

import io
import re

import pytest
import torch
from torch import nn

import polyak
from models import Conv, mlp
from refusals import averager_of, bank_of

# Attributes that averages of other libraries have

ATTRIBUTES = {
    "step": "averager.update()",
    "update_parameters": "averager.update()",
    "store": "averager.applied()",
    "restore": "averager.applied()",
    "apply_shadow": "averager.applied()",
    "copy_to_": "averager.copy_to()",
    "ema": "averager.module",
    "shadow_params": "averager.averages",
    "ema_state_dict": "averager.averaged_state_dict()",
    "n_averaged": "averager.n",
    "decay": "averager.strategy",
    "save": "polyak.save(averager, path)",
    "cuda": "averager.to(device=, dtype=)",
    "update_bn": "polyak.recalibrate(averager, batches)",
    "updat": "Did you mean 'update'?",
    "unheard_of": "has no attribute 'unheard_of'.",
}


@pytest.mark.parametrize("name", ATTRIBUTES)
def test_an_attribute_of_another_library_is_answered_with_what_serves_here(name):
    averager = polyak.average(mlp())
    with pytest.raises(polyak.AttributeAccessError, match=re.escape(ATTRIBUTES[name])) as caught:
        getattr(averager, name)
    assert isinstance(caught.value, AttributeError)
    assert not hasattr(averager, name)


def test_a_bank_sends_to_its_averages_what_only_they_have():
    bank = polyak.bank(mlp(), {"a": "ema"})
    for name, answer in (("copy_to", "bank['name'].copy_to"), ("n", "bank['name'].n"), ("step", "bank.update()")):
        with pytest.raises(polyak.AttributeAccessError, match=re.escape(answer)):
            getattr(bank, name)


def test_a_property_that_fails_says_why_and_is_not_called_missing():
    class Failing(nn.Linear):
        def __deepcopy__(self, memo):
            message = "of the model's own"
            raise AttributeError(message)

    averager = polyak.average(Failing(2, 2))
    with pytest.raises((AttributeError, polyak.ModelError)) as caught:
        averager.module.no_such_thing  # noqa: B018 - reading it is the test
    assert "has no attribute 'module'" not in str(caught.value)


CALLS = [
    lambda averager: averager.update(weights=None),
    lambda averager: averager.applied(1, 2, 3),
    lambda averager: averager.copy_to(1, 2, 3),
    lambda averager: averager.load_state_dict(),
    lambda averager: averager.configure(0.5),
    lambda averager: averager.no_such_thing,
    lambda averager: setattr(averager, "no_such_thing", 1),
    lambda averager: polyak.attach(averager, torch.optim.SGD([torch.zeros(1)], lr=0.1)),
    lambda averager: polyak.save("average.pt", averager),
    lambda averager: polyak.load("average.pt", averager),
    lambda averager: polyak.save(mlp(), "average.pt"),
    lambda averager: polyak.distributed.save("average", averager),
    lambda averager: polyak.distributed.load("average", averager),
    lambda averager: polyak.average(averager),
    lambda averager: polyak.average(mlp(), averager),
]


@pytest.mark.parametrize("call", CALLS)
def test_messages_speak_of_averagers(call, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(Exception) as caught:
        call(polyak.average(mlp()))
    assert "Engine" not in str(caught.value)
    assert re.search("[Aa]verager", str(caught.value))
    assert list(tmp_path.iterdir()) == []


SWAPPED_AVERAGERS = [
    lambda averager, optimizer: polyak.attach(averager, optimizer),
    lambda averager, optimizer: polyak.save("average.pt", averager),
    lambda averager, optimizer: polyak.load("average.pt", averager),
    lambda averager, optimizer: polyak.distributed.save("average", averager),
    lambda averager, optimizer: polyak.distributed.load("average", averager),
    lambda averager, optimizer: polyak.save("average.pt", polyak.bank(mlp(), {"a": "ema"})),
]


@pytest.mark.parametrize("call", SWAPPED_AVERAGERS)
def test_an_averager_in_the_second_place_is_asked_about(call):
    model = mlp()
    with pytest.raises(polyak.ArgumentError, match="are the arguments swapped"):
        call(polyak.average(model), torch.optim.SGD(model.parameters(), lr=0.1))


def _entered(context):
    with context:
        pass


def _loss(state):
    return state["0.weight"].sum()


MISTAKEN_CALLS = {
    "decay by position": (
        lambda: polyak.average(mlp(), "ema", 0.9),
        ["by name", "polyak.average(model, "],
    ),
    "no model": (lambda: polyak.average(strategy="ema"), ["missing", "'model'", "polyak.average(model"]),
    "a bank of nothing": (lambda: polyak.bank(mlp()), ["missing", "polyak.bank(model, {"]),
    "configure by position": (lambda: averager_of().configure(0.5), ["averager.configure(decay=0.5)"]),
    "update with a decay": (lambda: averager_of().update(decay=0.5), ["got decay=0.5", "averager.configure("]),
    "update with a step": (lambda: averager_of().update(None, 7), ["step=", "got 7"]),
    "load with strict": (lambda: averager_of().load_state_dict({}, strict=False), ["'strict'", "whole or not at all"]),
    "applied of a bank": (lambda: bank_of().applied(), ["bank.applied('mean')"]),
    "the protocol": (lambda: polyak.Averager(mlp()), ["polyak.average(model, 'ema'"]),
    "with averager": (lambda: _entered(averager_of()), ["averager is no context", "with averager.applied()"]),
    "with bank": (lambda: _entered(bank_of()), ["bank is no context", "with bank.applied('name')"]),
    "load without a path": (lambda: polyak.load(averager_of(), None), ["load()", "a path", "None"]),
    "save to an open file": (lambda: polyak.save(averager_of(), io.StringIO()), ["save()", "a path", "StringIO"]),
    "recorder swapped": (
        lambda: polyak.posthoc.Recorder("snaps", bank_of(), every=2),
        ["swapped", "polyak.posthoc.Recorder(bank, directory, every=...)"],
    ),
    "recorder without a folder": (lambda: polyak.posthoc.Recorder(bank_of(), 5, every=2), ["a path", "5"]),
    "sweep swapped": (lambda: polyak.posthoc.sweep(_loss, "snaps"), ["polyak.posthoc.sweep(directory, evaluate)"]),
    "AdamW swapped": (
        lambda: polyak.optim.AdamW(averager_of(), mlp().parameters()),
        ["the averager first", "polyak.optim.AdamW(model.parameters(), averager=averager)"],
    ),
    "recalibrate with a tensor": (
        lambda: polyak.recalibrate(polyak.average(Conv()), torch.ones(4, 3)),
        ["iterable of batches", "<Tensor>", "[x]", "x.split(64)"],
    ),
    "recalibrate with a mapping": (lambda: polyak.recalibrate(Conv(), {"x": torch.ones(1)}), ["iterable", "[x]"]),
    "recalibrate with a number": (lambda: polyak.recalibrate(Conv(), 5), ["iterable of batches", "got 5"]),
    "rate without a clock": (
        lambda: type("Half", (polyak.Strategy,), {"rate": lambda self: 0.5}),
        ["Half.rate(self)", "rate(self, clock)"],
    ),
}


@pytest.mark.parametrize("case", MISTAKEN_CALLS)
def test_a_call_that_cannot_be_meant_shows_the_right_one(case):
    call, words = MISTAKEN_CALLS[case]
    with pytest.raises(polyak.ArgumentError) as caught:
        call()
    for word in words:
        assert word in str(caught.value)
    assert "Engine" not in str(caught.value)


def test_a_type_error_of_a_called_function_stays_its_own():
    averager = polyak.average(mlp(), "ema", decay=0.9)
    averager.updater.listeners.append(lambda: None)
    with pytest.raises(TypeError, match="positional") as caught:
        averager.update()
    assert not isinstance(caught.value, polyak.PolyakError)


PACKAGE_NAMES = {
    "ModelEmaV3": "polyak.average(model, 'ema_v3'",
    "AveragedModel": "polyak.average(model, 'ema'",
    "ema": "polyak.average(model, 'ema'",
    "Recorder": "polyak.posthoc.Recorder",
    "update_bn": "polyak.recalibrate(averager, batches)",
    "AdamW": "polyak.optim.AdamW",
}


@pytest.mark.parametrize("name", PACKAGE_NAMES)
def test_names_of_other_libraries_in_the_package_name_ours(name):
    with pytest.raises(AttributeError, match=f"no attribute '{name}'.*{re.escape(PACKAGE_NAMES[name])}"):
        getattr(polyak, name)
    assert not hasattr(polyak, "no_such_name")


def test_attributes_that_only_the_type_has_are_none_of_the_averagers():
    with pytest.raises(AttributeError, match=r"averager has no attribute 'register'.*polyak\.attach"):
        averager_of().register  # noqa: B018 - the access is what is tested
