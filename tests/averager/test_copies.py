"""Weights that leave an averager: into models, state dicts, other dtypes, copies."""

from __future__ import annotations

import copy
import gc
import pickle
import weakref

import pytest
import torch
from torch import nn

import polyak
from evaluations import used
from models import ZOO, Conv, average_bits, bits, drifting, mlp, model_bits

# Writing the average elsewhere


def test_copy_to_overwrites_the_model_for_good():
    model = Conv()
    averager = used(model)
    objects = [*model.parameters()]
    expected = averager.averaged_state_dict()
    averager.copy_to()
    assert {n: bits(t) for n, t in model.state_dict().items()} == {n: bits(t) for n, t in expected.items()}
    assert all(a is b for a, b in zip(model.parameters(), objects, strict=True))
    averager.update()


def test_copy_to_writes_into_another_model_of_any_dtype_and_wrapper():
    averager = used(mlp())
    other = mlp().double()
    averager.copy_to(nn.DataParallel(other))
    assert torch.equal(other[0].weight, averager.averages["0.weight"].double())
    own = average_bits(averager)
    averager.update()
    assert average_bits(averager).keys() == own.keys()


def test_an_unpickled_averager_copies_to_a_model_it_is_given():
    averager = pickle.loads(pickle.dumps(used(mlp())))
    other = mlp()
    averager.copy_to(other)
    assert torch.equal(other[0].weight, averager.averages["0.weight"])


@pytest.mark.parametrize("kind", ZOO.values(), ids=str)
def test_the_averaged_state_dict_has_the_models_names_shapes_and_dtypes(kind):
    model = kind.build()
    averager = used(model)
    own, averaged = model.state_dict(), averager.averaged_state_dict()
    assert list(averaged) == list(own)
    assert averaged._metadata == own._metadata
    for name, tensor in averaged.items():
        assert (tensor.shape, tensor.dtype, tensor.device) == (own[name].shape, own[name].dtype, own[name].device)
        assert not tensor.requires_grad
        assert type(tensor) is torch.Tensor
    live = {tensor.data_ptr() for tensor in own.values() if tensor.numel()}
    stored = {tensor.data_ptr() for tensor in averager.averages.values() if tensor.numel()}
    assert not (live | stored) & {tensor.data_ptr() for tensor in averaged.values() if tensor.numel()}


def test_the_averaged_state_dict_carries_extra_state_and_follows_state_dict_hooks():
    class Extra(nn.Linear):
        def get_extra_state(self):
            return {"version": 3}

        def set_extra_state(self, state):
            assert state == {"version": 3}

    model = nn.Sequential(Extra(2, 2), nn.Linear(2, 2))

    def rename(module, state, prefix, metadata):
        state["twice"] = state["0.weight"].detach() * 2
        del state["1.bias"]

    model.register_state_dict_post_hook(rename)
    averager = used(model, decay=0.5)
    own = model_bits(model)
    averaged = averager.averaged_state_dict()
    assert averaged["0._extra_state"] == {"version": 3}
    assert torch.equal(averaged["twice"], averaged["0.weight"] * 2)
    assert torch.equal(averaged["0.weight"], averager.averages["0.weight"])
    assert "1.bias" not in averaged
    assert model_bits(model) == own


def test_the_averaged_state_dict_of_a_mapping_is_a_mapping():
    weights = {"w": torch.ones(2).bfloat16(), "n": torch.tensor(3), "left": torch.zeros(1)}
    averager = polyak.average(weights, "ema", decay=0.5, exclude="left")
    weights["w"].fill_(3.0)
    weights["n"].fill_(7)
    averager.update()
    averaged = averager.averaged_state_dict()
    assert averaged["w"].tolist() == [2.0, 2.0]
    assert averaged["w"].dtype == torch.bfloat16
    assert averaged["n"] == 7
    assert averaged["left"] is not weights["left"]


# Storage


@pytest.mark.parametrize("dtype", ["float64", torch.float64, "torch.float64"], ids=str)
def test_a_dtype_is_a_name_or_a_torch_dtype(dtype):
    averager = polyak.average(ZOO["complex"].build(), dtype=dtype)
    assert averager.averages["filter"].dtype == torch.complex128
    assert polyak.average(Conv(), dtype=dtype).averages["norm.running_mean"].dtype == torch.float64
    assert polyak.average(Conv(), dtype=dtype).averages["norm.num_batches_tracked"].dtype == torch.int64


@pytest.mark.filterwarnings("ignore:ComplexHalf support is experimental")
@pytest.mark.parametrize(
    ("live", "stored"),
    [
        (torch.float64, torch.float64), (torch.float32, torch.float32), (torch.float16, torch.float32),
        (torch.bfloat16, torch.float32), (torch.float8_e4m3fn, torch.float32), (torch.float8_e5m2, torch.float32),
        (torch.complex64, torch.complex64), (torch.complex128, torch.complex128), (torch.complex32, torch.complex64),
    ],
    ids=str,
)  # fmt: skip
def test_auto_stores_short_floats_in_float32(live, stored):
    weights = {"w": torch.ones(3).to(live)}
    averager = polyak.average(weights, "ema", decay=0.5)
    assert averager.averages["w"].dtype == stored
    weights["w"].copy_(torch.full((3,), 3.0))
    averager.update()
    assert averager.averages["w"].tolist() == [2.0, 2.0, 2.0]
    with averager.applied():
        assert weights["w"].to(stored).tolist() == [2.0, 2.0, 2.0]
    assert weights["w"].to(stored).tolist() == [3.0, 3.0, 3.0]


def test_a_device_is_a_name_or_a_torch_device():
    for device in ("cpu", torch.device("cpu"), None):
        assert polyak.average(mlp(), device=device).averages["0.weight"].device.type == "cpu"


def test_channels_last_averages_are_channels_last():
    averager = polyak.average(ZOO["channels_last"].build())
    assert averager.averages["conv.weight"].is_contiguous(memory_format=torch.channels_last)


# Copying and keeping


def test_a_deep_copy_goes_on_by_itself_with_the_same_model():
    model = mlp()
    averager = used(model)
    other = copy.deepcopy(averager)
    assert average_bits(other) == average_bits(averager)
    for _ in drifting(model, 1):
        other.update()
    assert (other.n, averager.n) == (3, 2)
    assert average_bits(other) != average_bits(averager)


def test_a_deep_copy_inside_applied_has_the_average_and_not_the_weights():
    model = mlp()
    averager = used(model)
    expected = average_bits(averager)
    with averager.applied():
        other, pickled = copy.deepcopy(averager), pickle.loads(pickle.dumps(averager))
        assert not other.is_applied
    assert average_bits(other) == average_bits(pickled) == expected
    other.update()


def test_an_averager_and_its_model_are_freed_together():
    model = mlp()
    averager = used(model)
    averager(torch.ones(1, 3))
    with averager.applied():
        pass
    watched = weakref.ref(model), weakref.ref(averager)
    del model, averager
    gc.collect()
    assert [reference() for reference in watched] == [None, None]


def test_listeners_hear_of_each_averaged_update_once():
    heard = []
    averager = polyak.average(mlp(), "ema", every=2)
    averager.updater.listeners.append(lambda who, clock: heard.append((who, clock.n, clock.step, who.n)))
    for _ in range(5):
        averager.update()
    assert heard == [(averager, 1, 2, 1), (averager, 2, 4, 2)]


def test_averagers_with_different_options_average_one_model_side_by_side():
    model = Conv()
    many = [
        polyak.average(model, name, **options)
        for name in ("ema", "swa", "ema_v3")
        for options in ({}, {"dtype": "float64"}, {"buffers": "skip"}, {"every": 2})
    ]
    before = model_bits(model)
    for averager in many:
        averager.update()
        with averager.applied():
            pass
        averager(torch.randn(1, 3, 8, 8))
    assert model_bits(model) == before


def test_what_an_averager_stores_is_freed_with_its_last_reference():
    model = torch.nn.Linear(2, 2)
    averager = polyak.average(model, "ema")
    averager.update()
    kept = weakref.ref(averager.core.state.stored[0].average)
    gc.collect()
    gc.disable()
    try:
        del averager
        assert kept() is None
    finally:
        gc.enable()
