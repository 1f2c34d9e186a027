"""An average that lives in tensors of the user's: a module, a mapping or a list."""

from __future__ import annotations

import copy
import pickle
import weakref

import pytest
import torch
from torch import nn

import polyak
from models import ZOO, average_bits, drifting, mlp

KINDS = ["mlp", "conv", "tied", "lstm", "complex", "spectral", "weight_norm"]


def homed(model, strategy="ema", **options):
    module = copy.deepcopy(model)
    return module, polyak.average(model, strategy, into=module, **options)


def fill(model, value):
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(value)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("strategy", ["ema", "swa", "dema"])
@pytest.mark.parametrize("kernel", ["auto", "foreach", "loop"])
def test_the_average_is_what_it_is_elsewhere_bit_for_bit(kind, strategy, kernel):
    model = ZOO[kind].build()
    module, averager = homed(model, strategy, kernel=kernel)
    plain = polyak.average(model, strategy, kernel=kernel, dtype="model")
    for _ in drifting(model, 5):
        averager.update()
        plain.update()
    assert averager.module is module
    assert average_bits(averager) == average_bits(plain)
    held = {**dict(module.named_parameters()), **dict(module.named_buffers())}
    assert all(torch.equal(held[name], average) for name, average in averager.averages.items() if name in held)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_what_is_loaded_or_written_into_the_module_is_the_average(dtype):
    model = mlp().to(dtype)
    module, averager = homed(model, decay=0.5)
    module.load_state_dict({name: torch.full_like(value, 4.0) for name, value in module.state_dict().items()})
    fill(model, 0.0)
    averager.update()
    assert module[0].weight.unique().tolist() == [2.0]
    fill(module, 8.0)
    averager.update()
    assert averager.averages["0.weight"].unique().tolist() == [4.0]


@pytest.mark.parametrize(
    "change",
    [
        lambda module: module.double(),
        lambda module: module.bfloat16(),
        lambda module: module.load_state_dict(module.state_dict(), assign=True),
        lambda module: setattr(module[0].weight, "data", module[0].weight.data.clone()),
        lambda module: setattr(module[0], "weight", nn.Parameter(module[0].weight.detach().clone())),
    ],
    ids=["double", "bfloat16", "assign", "data", "another parameter"],
)
def test_the_average_goes_where_the_module_is_moved(change):
    model = mlp()
    module, averager = homed(model, decay=0.5)
    fill(module, 1.0)
    averager.update()
    change(module)
    fill(module, 1.0)
    fill(model, 3.0)
    averager.update()
    assert module[0].weight.unique().tolist() == [2.0]
    assert averager.averages["0.weight"].dtype == module[0].weight.dtype
    change(module)  # read before the next update
    assert averager.averages["0.weight"].data_ptr() == module[0].weight.data_ptr()


def test_tensors_of_a_list_may_be_written_and_replaced():
    model = mlp()
    shadow = [parameter.detach().clone() for parameter in model.parameters()]
    averager = polyak.average(model.parameters(), "ema", decay=0.5, into=shadow)
    fill(model, 0.0)
    shadow[0] = torch.full_like(shadow[0], 4.0)
    shadow[1].fill_(2.0)
    averager.update(model.parameters())
    assert shadow[0].unique().tolist() == [2.0]
    assert shadow[1].unique().tolist() == [1.0]
    assert [*averager.averages] == ["0", "1", "2", "3"]


class Holder(nn.Module):
    def __init__(self, model):
        super().__init__()
        self.average = copy.deepcopy(model)
        self.averager = polyak.average(model, "swa", into=self.average)


def test_copies_and_pickles_take_the_module_along():
    model = mlp()
    holder = Holder(model)
    holder.averager.update()
    copied, loaded = copy.deepcopy(holder), pickle.loads(pickle.dumps(holder))
    for other in (copied, loaded):
        assert other.averager.module is other.average
        assert other.average is not holder.average
        fill(model, 5.0)
        other.averager.update(model)
        assert other.averager.n == 2
    assert holder.averager.n == 1
    assert torch.equal(copied.average[0].weight, loaded.average[0].weight)
    assert not torch.equal(copied.average[0].weight, holder.average[0].weight)


def test_a_state_is_loaded_into_the_module():
    model = mlp()
    module, averager = homed(model, "swa")
    for _ in drifting(model, 3):
        averager.update()
    state = averager.state_dict()
    for _ in drifting(model, 2, seed=1):
        averager.update()
    averager.load_state_dict(state)
    assert averager.module is module
    assert averager.n == 3
    assert torch.equal(module[0].weight, state["slots"]["average"]["0.weight"])
    half, resumed = homed(model.bfloat16(), "swa")
    resumed.load_state_dict(state)
    assert torch.equal(half[0].weight, module[0].weight.bfloat16())


def test_the_first_update_replaces_what_the_module_holds_where_the_strategy_says_so():
    model = mlp()
    module, averager = homed(model, "swa", origin="first")
    fill(module, 7.0)
    assert averager.averages["0.weight"].unique().tolist() == [7.0]
    averager.update()
    assert torch.equal(module[0].weight, model[0].weight)


def test_the_module_is_freed_with_its_averager():
    model = mlp()
    module, averager = homed(model)
    averager.update()
    alive = weakref.ref(module)
    del module, averager
    assert alive() is None


def other_shape():
    module = mlp()
    module[0].weight = nn.Parameter(torch.zeros(5, 4))
    return module


@pytest.mark.parametrize(
    ("into", "says"),
    [
        (lambda model: nn.Linear(3, 5), "0.weight is missing"),
        (lambda model: nn.Sequential(*mlp(), nn.Linear(2, 2)), "3.weight is unknown"),
        (lambda model: other_shape(), r"0.weight has shape \(5, 4\) and not \(5, 3\)"),
        (lambda model: model, "shares its memory"),
        (lambda model: [*model.parameters()], "into= does not have the model's tensors"),
        (lambda model: {**model.state_dict(), "0.bias": torch.zeros(5, dtype=torch.int64)}, "is torch.int64"),
        (lambda model: copy.deepcopy(model).to("meta"), "meta device"),
        (lambda model: {**model.state_dict(), "0.bias": torch.zeros(1).expand(5)}, "share memory; clone it"),
        (lambda model: "a module", "a model is a torch.nn.Module"),
        (lambda model: [], "no parameters and no buffers|into= does not have"),
    ],
)
def test_tensors_that_cannot_hold_the_average_are_refused(into, says):
    model = mlp()
    with pytest.raises(polyak.PolyakError, match=says):
        polyak.average(model, into=into(model))


@pytest.mark.parametrize("option", [{"dtype": "float64"}, {"device": "cpu"}], ids=str)
def test_tensors_with_a_dtype_and_device_of_their_own_take_no_other(option):
    model = mlp()
    with pytest.raises(polyak.ConfigError, match="into= has a device and dtypes of its own"):
        polyak.average(model, into=copy.deepcopy(model), **option)


def test_a_module_that_becomes_another_one_is_refused_before_anything_moves():
    model = mlp()
    module, averager = homed(model, decay=0.5)
    module[0] = nn.Linear(3, 6)
    before = copy.deepcopy(module.state_dict())
    with pytest.raises(polyak.MismatchError, match="has shape"):
        averager.update()
    assert all(torch.equal(value, before[name]) for name, value in module.state_dict().items())
