"""What `attach` refuses: other models, other objects, the same averager twice."""

from __future__ import annotations

import pickle
import warnings

import pytest
import torch
from torch import nn
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.optim import SGD

import polyak
from attaching import train
from models import mlp


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
