"""The cached plan: it notices every change of a model that matters, and is kept otherwise."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

import polyak
from models import ZOO, Conv, average_bits, drifting
from plans import averager_of, is_current
from polyak.kernels import select as kernels


def replaced_parameter(model):
    model[0].weight = nn.Parameter(torch.full((5, 3), 8.0))


def assigned_state_dict(model):
    model.load_state_dict({name: torch.full_like(t, 8.0) for name, t in model.state_dict().items()}, assign=True)


def replaced_module(model):
    model[0] = nn.Linear(3, 5)
    nn.init.constant_(model[0].weight, 8.0)


def deleted_and_registered_again(model):
    del model[0].weight
    model[0].weight = nn.Parameter(torch.full((5, 3), 8.0))
    model[0].bias = model[0]._parameters.pop("bias")  # the order of the dictionary as it was


def filled_with_eights():
    layer = nn.Linear(3, 5)
    nn.init.constant_(layer.weight, 8.0)
    return layer


def another_dictionary_of_parameters(model):
    model[0]._parameters = dict(filled_with_eights()._parameters)


def another_dictionary_of_modules(model):
    model._modules = {**model._modules, "0": filled_with_eights()}


def updated_attributes(model):
    model[0].__dict__.update(filled_with_eights().__dict__)


def replaced_attributes(model):
    model[0].__dict__ = filled_with_eights().__dict__


def set_state(model):
    model[0].__setstate__(filled_with_eights().__getstate__())


def a_copy_of_the_dictionary_that_was_written_to(model):
    model[0]._parameters = {**model[0]._parameters, "weight": filled_with_eights().weight}


@pytest.mark.parametrize(
    "change",
    [
        replaced_parameter,
        assigned_state_dict,
        replaced_module,
        deleted_and_registered_again,
        another_dictionary_of_parameters,
        another_dictionary_of_modules,
        updated_attributes,
        replaced_attributes,
        set_state,
        a_copy_of_the_dictionary_that_was_written_to,
    ],
)
def test_a_replaced_tensor_is_noticed_and_followed(change, kernel):
    model, averager = averager_of(kernel=kernel)
    before = averager.averages["0.weight"].clone()
    change(model)
    assert not is_current(averager)
    averager.update()
    assert torch.allclose(averager.averages["0.weight"], (before + 8.0) / 2)
    with averager.applied():
        assert torch.equal(model[0].weight, averager.averages["0.weight"])
    assert torch.equal(model[0].weight, torch.full((5, 3), 8.0))


def test_new_data_in_the_same_parameter_is_followed_without_a_new_plan(kernel):
    model, averager = averager_of(kernel=kernel)
    for value in (8.0, 4.0):
        before = averager.averages["0.weight"].clone()
        model[0].weight.data = torch.full((5, 3), value)
        assert is_current(averager)
        averager.update()
        assert torch.allclose(averager.averages["0.weight"], (before + value) / 2)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_a_change_of_dtype_in_place_is_noticed_and_the_average_keeps_its_own(dtype, kernel):
    model, averager = averager_of(kernel=kernel)
    model.to(dtype)
    assert not is_current(averager)
    for _ in drifting(model, 2):
        averager.update()
    assert {tensor.dtype for tensor in averager.averages.values()} == {torch.float32}
    assert {tensor.dtype for tensor in averager.averaged_state_dict().values()} == {dtype}
    assert averager(torch.ones(1, 3, dtype=dtype)).dtype == dtype


def added_parameter(model):
    model.register_parameter("extra", nn.Parameter(torch.ones(1)))


def added_buffer(model):
    model[0].register_buffer("extra", torch.ones(1))


def added_module(model):
    model.append(nn.Linear(2, 2))


def removed_parameter(model):
    model[2].bias = None


def removed_module(model):
    del model[2]


def renamed_module(model):
    model.add_module("last", model[2])
    del model._modules["2"]


def reshaped_in_place(model):
    model[0].weight.data = torch.ones(5, 4)


@pytest.mark.parametrize(
    "change",
    [added_parameter, added_buffer, added_module, removed_parameter, removed_module, renamed_module, reshaped_in_place],
)
def test_another_structure_is_noticed_and_refused(change, kernel):
    model, averager = averager_of(kernel=kernel)
    before = average_bits(averager)
    change(model)
    assert not is_current(averager)
    with pytest.raises(polyak.MismatchError):
        averager.update()
    assert (average_bits(averager), averager.n) == (before, 1)


def test_two_modules_that_changed_places_are_noticed():
    model, averager = averager_of(nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3)))
    averages = {name: tensor.clone() for name, tensor in averager.averages.items()}
    model[0], model[1] = model[1], model[0]
    averager.update()
    # By name: the names say which average goes on with which weights.
    assert torch.allclose(averager.averages["0.weight"], (averages["0.weight"] + model[0].weight) / 2)


def test_a_module_without_tensors_may_be_added_and_replaced():
    model, averager = averager_of()
    model[1] = nn.GELU()
    model.append(nn.Dropout())
    averager.update()
    assert averager.n == 2


@pytest.mark.parametrize("kind", ZOO.values(), ids=str)
def test_training_leaves_the_plan_current(kind):
    model = kind.build()
    averager = polyak.average(model)
    plan = averager.core.binding.plan
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
    for _ in range(3):
        model.train()
        model(kind.example()).float().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
        averager.update()
        model.eval()
    model.requires_grad_(False)
    model.load_state_dict(model.state_dict()) if kind.name != "buffers" else None
    averager.update()
    assert averager.core.binding.plan is plan


def test_a_mapping_is_watched_too():
    weights = {"a": torch.ones(2), "b": torch.ones(2)}
    averager = polyak.average(weights, "ema", decay=0.5)
    weights["a"] = torch.full((2,), 3.0)
    averager.update()
    assert torch.equal(averager.averages["a"], torch.full((2,), 2.0))
    weights["c"] = torch.ones(1)
    with pytest.raises(polyak.MismatchError, match="new: c"):
        averager.update()


def test_a_plan_groups_what_one_call_can_move():
    model = Conv()
    best = {"auto": "fused", "fused": "fused"} if kernels.compiles("fused") else {"auto": "foreach"}
    for kernel, name in {"foreach": "foreach", **best}.items():
        groups = polyak.average(model, kernel=kernel).core.binding.plan.moves.groups
        assert [(group.kernel.name, len(group.weights)) for group in groups] == [(name, 8), ("copy", 1)]


def test_tensors_that_were_swapped_with_others_are_followed(kernel):
    model, averager = averager_of(kernel=kernel)
    before = averager.averages["0.weight"].clone()
    torch.utils.swap_tensors(model[0].weight, nn.Parameter(torch.full((5, 3), 8.0)))
    averager.update()
    assert torch.allclose(averager.averages["0.weight"], (before + 8.0) / 2)


def test_a_tie_by_memory_that_moves_to_another_tensor_is_noticed(kernel):
    model = nn.ModuleDict({name: nn.Linear(2, 2, bias=False) for name in ("one", "two", "head")})
    for name, value in (("one", 1.0), ("two", 2.0)):
        nn.init.constant_(model[name].weight, value)
    model["head"].weight.data = model["one"].weight.data
    averager = polyak.average(model, "ema", decay=0.5, kernel=kernel)
    averager.update()
    model["head"].weight.data = model["two"].weight.data
    averager.update()
    assert averager.averaged_state_dict()["head.weight"].eq(2.0).all()


def test_what_a_wrapper_inside_wraps_is_watched():
    inner = checkpoint_wrapper(nn.Linear(2, 2, bias=False))
    model = nn.Sequential(inner)
    averager = polyak.average(model, "ema", decay=0.5)
    averager.update()
    inner._checkpoint_wrapped_module = nn.Linear(2, 2, bias=False)
    nn.init.constant_(inner._checkpoint_wrapped_module.weight, 7.0)
    before = averager.averages["0.weight"].clone()
    averager.update()
    assert torch.equal(averager.averages["0.weight"], before.lerp(torch.full((2, 2), 7.0), 0.5))


def test_an_equal_dictionary_in_the_place_of_another_is_watched_from_then_on(kernel):
    model, averager = averager_of(kernel=kernel)
    model[0]._parameters = dict(model[0]._parameters)
    averager.update()
    before = averager.averages["0.weight"].clone()
    model[0]._parameters["weight"] = filled_with_eights().weight
    averager.update()
    assert torch.allclose(averager.averages["0.weight"], (before + 8.0) / 2)


def test_frozen_tensors_are_compared_as_fast_as_before():
    model, averager = averager_of()
    model.requires_grad_(False)
    for _ in range(2):
        averager.update()
    located_now = averager.core.binding.plan.watch._located
    assert located_now._guards[True](*located_now.tensors)


@pytest.mark.parametrize("tie", ["made", "undone"])
def test_a_tie_of_memory_is_noticed_where_one_of_its_ends_is_left_out(tie, kernel):
    model = nn.ModuleDict({name: nn.Linear(2, 2, bias=False) for name in ("one", "two")})
    if tie == "undone":
        model["two"].weight.data = model["one"].weight.data
    averager = polyak.average(model, "ema", exclude="two.*" if tie == "made" else None, kernel=kernel)
    averager.update()
    model["two"].weight.data = model["one"].weight.data if tie == "made" else torch.ones(2, 2)
    assert not is_current(averager)


def test_a_mapping_whose_order_or_names_change_is_noticed():
    weights = {"a": torch.ones(2), "b": torch.ones(2)}
    averager = polyak.average(weights, "ema", decay=0.5)
    weights["a"], weights["b"] = weights["b"], weights["a"]
    assert not is_current(averager)
    averager.update()
    weights["c"] = weights.pop("b")
    with pytest.raises(polyak.MismatchError):
        averager.update()
