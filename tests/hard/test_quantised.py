"""Quantised tensors: left alone where they are frozen, refused where they are trained, never an error of torch's."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import polyak

pytestmark = pytest.mark.filterwarnings("ignore:torch.quantize_per:UserWarning")  # deprecated, and in use


class Codes(torch.Tensor):
    """A floating tensor on the outside, bytes inside; like those of quantisation libraries it can do little."""

    @staticmethod
    def __new__(cls, codes, scale):
        return torch.Tensor._make_wrapper_subclass(cls, codes.shape, dtype=torch.float32, device=codes.device)

    def __init__(self, codes, scale):
        self.codes, self.scale = codes, scale

    def __tensor_flatten__(self):
        return ["codes", "scale"], None

    @classmethod
    def __torch_dispatch__(cls, function, _, args=(), kwargs=None):
        if function in {torch.ops.aten.detach.default, torch.ops.aten.clone.default}:
            return cls(args[0].codes.clone(), args[0].scale)
        if function is torch.ops.aten.t.default:
            return cls(args[0].codes.t(), args[0].scale)
        if function is torch.ops.aten.addmm.default:
            bias, x, weight = args
            return function(bias, x, weight.codes.float() * weight.scale)
        raise NotImplementedError(function, kwargs)


class Adapted(nn.Module):
    """A quantised base, and an adapter that is trained."""

    def __init__(self, *, trained=False):
        super().__init__()
        torch.manual_seed(0)
        self.base, self.adapter = nn.Linear(4, 4), nn.Linear(4, 4, bias=False)
        codes = Codes(torch.randint(-128, 128, (4, 4), dtype=torch.int8), torch.tensor(0.01))
        self.base.weight = nn.Parameter(codes, requires_grad=trained)

    def forward(self, x):
        return self.base(x) + self.adapter(x)


def moved(model):
    averager = polyak.average(model, "ema", decay=0.5)
    with torch.no_grad():
        model.adapter.weight.add_(1.0)
    averager.update()
    return averager


def test_a_frozen_quantised_base_is_left_alone():
    model, x = Adapted(), torch.ones(2, 4)
    averager = moved(model)
    assert {*averager.averages} == {"base.bias", "adapter.weight"}
    assert "skip" in averager.describe()
    with torch.no_grad(), averager.applied():
        wanted = model(x)
    assert torch.equal(averager(x), wanted)
    assert torch.equal(averager.averaged_state_dict()["base.weight"].codes, model.base.weight.codes)
    averager.load_state_dict(averager.state_dict())
    averager.update()
    assert averager.n == 2


def test_a_quantised_tensor_that_is_trained_is_refused_with_the_way_out():
    with pytest.raises(polyak.ModelError, match=r"base\.weight holds quantised values \(Codes.*exclude="):
        polyak.average(Adapted(trained=True), "ema")
    polyak.average(Adapted(trained=True), "ema", exclude="base.weight").update()


def quantised(model):
    """Give a model a buffer that is one of torch's quantised tensors."""
    model.register_buffer("table", torch.quantize_per_tensor(torch.randn(4), 0.1, 0, torch.qint8))


def per_channel(model):
    scales, zeros = torch.ones(2), torch.zeros(2, dtype=torch.int64)
    model.register_buffer("table", torch.quantize_per_channel(torch.randn(2, 2), scales, zeros, 0, torch.quint8))


@pytest.mark.parametrize("register", [quantised, per_channel])
def test_torchs_quantised_buffers_are_left_alone_and_an_average_of_them_is_refused(register):
    model = Adapted()
    register(model)
    averager = moved(model)
    assert "table" not in averager.averages
    assert torch.equal(averager.averaged_state_dict()["table"].int_repr(), model.table.int_repr())
    assert torch.equal(averager.module.table.int_repr(), model.table.int_repr())
    with pytest.raises(polyak.ModelError, match="table holds quantised values"):
        polyak.average(model, "ema", buffers={"table": "average"})


def test_a_quantised_buffer_that_appears_during_training_is_left_alone():
    model = Adapted()
    averager = moved(model)
    quantised(model)
    averager.update()
    assert averager.n == 2


def test_a_weight_that_is_quantised_during_training_is_refused():
    model = nn.ModuleDict({"base": nn.Linear(4, 4), "adapter": nn.Linear(4, 4)})
    averager = polyak.average(model, "ema")
    model["base"].weight = Adapted().base.weight
    with pytest.raises(polyak.MismatchError, match=r"missing: base\.weight"):
        averager.update()


def test_packed_weights_of_dynamic_quantisation_are_in_the_averaged_state_dict():
    torch.backends.quantized.engine = torch.backends.quantized.supported_engines[-1]
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    model[1] = torch.ao.nn.quantized.dynamic.Linear(4, 4)
    state = polyak.average(model, "ema").averaged_state_dict()
    assert state.keys() == model.state_dict().keys()
