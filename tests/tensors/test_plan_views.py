"""The cached plan notices other memory, other layouts and other views of the same numbers."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import polyak
from models import average_bits, mlp
from plans import averager_of, is_current


def other_strides(model):
    model[0].weight.data = model[0].weight.data.as_strided((5, 3), (1, 5))


def other_type_over_the_same_memory(model):
    model[0].weight.data = model[0].weight.data.view(torch.int32)


@pytest.mark.parametrize("change", [other_strides, other_type_over_the_same_memory])
def test_another_layout_over_the_same_memory_is_noticed(change, kernel):
    model, averager = averager_of(kernel=kernel)
    model[0].weight.requires_grad_(False)
    change(model)
    assert not is_current(averager)


@pytest.mark.parametrize("change", [other_strides, other_type_over_the_same_memory])
def test_a_layout_that_changed_before_the_first_look_is_noticed_at_each(change, kernel):
    model = mlp().requires_grad_(requires_grad=False)
    averager = polyak.average(model, "ema", decay=0.5, kernel=kernel)
    change(model)
    assert not is_current(averager)
    assert not is_current(averager)


def test_memory_that_changed_beside_a_tensor_of_other_dimensions_is_followed_there_and_back(kernel):
    model = nn.ParameterDict({"skip": nn.Parameter(torch.zeros(6)), "w": nn.Parameter(torch.zeros(4))})
    averager = polyak.average(model, "ema", decay=0.5, exclude="skip", kernel=kernel)
    averager.update()
    own, other, skipped = model["w"].data, torch.full((4,), 5.0), model["skip"].data
    model["skip"].data, model["w"].data = torch.zeros(2, 3), other
    averager.update()
    assert averager.averages["w"].tolist() == [2.5] * 4
    own.fill_(1.0)
    other.fill_(7.0)
    model["skip"].data, model["w"].data = skipped, own
    averager.update()
    assert averager.averages["w"].tolist() == [1.75] * 4


def test_freed_memory_is_refused_each_time_until_it_is_back(kernel):
    model, averager = averager_of(kernel=kernel)
    weight = model[0].weight
    size = weight.untyped_storage().nbytes()
    weight.untyped_storage().resize_(0)
    for _ in range(2):
        with pytest.raises(polyak.ModelError, match="no memory now"):
            averager.update()
    assert averager.n == 1
    weight.untyped_storage().resize_(size)
    weight.data.fill_(8.0)
    before = averager.averages["0.weight"].clone()
    averager.update()
    assert torch.allclose(averager.averages["0.weight"], (before + 8.0) / 2)


class Scales(nn.Module):
    def __init__(self):
        super().__init__()
        self.one, self.two = nn.Parameter(torch.ones(())), nn.Parameter(torch.ones(()))
        self.register_buffer("count", torch.ones(()))


def equal_parameter(model):
    model.one = nn.Parameter(torch.ones(()))


def exchanged_names(model):
    model._parameters = {"two": model.one, "one": model.two}


def equal_buffer(model):
    model.count = torch.ones(())


@pytest.mark.parametrize("change", [equal_parameter, exchanged_names, equal_buffer])
def test_another_tensor_of_the_same_single_value_is_noticed_and_followed(change, kernel):
    model, averager = averager_of(Scales(), kernel=kernel)
    change(model)
    assert not is_current(averager)
    averager.update()
    with torch.no_grad():
        model.one.fill_(3.0)
    averager.update()
    assert averager.averages["one"].item() == 2.0
    assert averager.averages["two"].item() == 1.0


class Alike(nn.Linear):
    """Equal to every layer of its kind."""

    def __eq__(self, other):
        return isinstance(other, Alike)

    __hash__ = nn.Module.__hash__


def test_another_module_that_calls_itself_equal_is_noticed(kernel):
    model, averager = averager_of(nn.Sequential(Alike(3, 5)), kernel=kernel)
    before = averager.averages["0.weight"].clone()
    model[0] = Alike(3, 5)
    averager.update()
    assert torch.allclose(averager.averages["0.weight"], (before + model[0].weight) / 2)


def negative_view(weight):
    return torch._neg_view(weight)


def conjugate_view(weight):
    return weight.conj()


def view_of_another_shape_and_back(weight):
    return weight.t().contiguous().t()


@pytest.mark.parametrize(
    ("view", "dtype"),
    [
        (negative_view, torch.float32),
        (negative_view, torch.complex64),
        (conjugate_view, torch.complex64),
        (view_of_another_shape_and_back, torch.float32),
    ],
)
def test_another_view_of_the_same_numbers_is_averaged_as_it_reads(view, dtype, kernel):
    model = nn.ParameterDict({"w": nn.Parameter(torch.randn(4, 3, dtype=dtype))})
    averager = polyak.average(model, "ema", decay=0.5, kernel=kernel)
    averager.update()
    own = model["w"].data
    for data in (view(own), own, view(own)):
        before = averager.averages["w"].clone()
        model["w"].data = data
        averager.update()
        assert torch.allclose(averager.averages["w"], (before + model["w"].detach()) / 2)


def transposed(weight):
    weight.t_()


def flattened(weight):
    weight.requires_grad_(False).resize_(15)


def another_storage(weight):
    weight.set_(torch.ones(3, 5))


@pytest.mark.parametrize("change", [transposed, flattened, another_storage])
def test_a_weight_that_is_reshaped_in_place_is_refused_before_anything_is_written(change, kernel):
    model, averager = averager_of(kernel=kernel)
    before = average_bits(averager)
    with torch.no_grad():
        change(model[0].weight)
    with pytest.raises(polyak.MismatchError):
        averager.update()
    assert (average_bits(averager), averager.n) == (before, 1)
