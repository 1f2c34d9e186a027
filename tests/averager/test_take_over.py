"""Averages of other libraries that an averager goes on from, and averages that are moved elsewhere."""

from __future__ import annotations

from typing import Literal

import pytest
import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

import polyak
from models import average_bits, drifting, mlp

timm = pytest.importorskip("timm.utils", reason="a test dependency, left out with the oldest torch")
torch_ema = pytest.importorskip("torch_ema", reason="as above")
ema_pytorch = pytest.importorskip("ema_pytorch", reason="as above")
training_utils = pytest.importorskip("diffusers.training_utils", reason="as above")


def network():
    return nn.Sequential(nn.Linear(3, 5), nn.BatchNorm1d(5), nn.Linear(5, 2))


def swa(model):
    averaged = AveragedModel(model, use_buffers=True)
    for _ in drifting(model, 10):
        averaged.update_parameters(model)
    return averaged


def _torch_ema(model):
    return torch_ema.ExponentialMovingAverage(model.parameters(), 0.9)


def _diffusers(model):
    return training_utils.EMAModel(model.parameters())


SOURCES = {
    "torch": (AveragedModel, lambda one: one.module, 0),
    "torch, its state": (AveragedModel, lambda one: one.module, 0),
    "timm v3": (timm.ModelEmaV3, lambda one: one.module, 0),
    "timm v1": (timm.ModelEma, lambda one: one.ema, 0),
    "timm, a checkpoint": (timm.ModelEmaV3, lambda one: one.module, 0),
    "torch_ema": (_torch_ema, lambda one: one.shadow_params, 0),
    "torch_ema, its state": (_torch_ema, lambda one: one.shadow_params, 0),
    "diffusers": (_diffusers, lambda one: one.shadow_params, 0),
    "ema-pytorch": (ema_pytorch.EMA, lambda one: one.ema_model, 0),
    "ema-pytorch, its state": (ema_pytorch.EMA, lambda one: one.ema_model, 0),
    "a module": (lambda model: network(), lambda one: one, 0),
    "tensors": (lambda model: [p.detach() + 1 for p in model.parameters()], lambda one: one, 0),
}


@pytest.mark.parametrize("name", SOURCES)
def test_the_average_is_the_one_that_was_taken_over(name, tmp_path):
    model = network()
    make, held, n = SOURCES[name]
    source = make(model)
    average = held(source)
    with torch.no_grad():
        for tensor in average if isinstance(average, list) else average.parameters():
            tensor.add_(torch.randn_like(tensor))
    expected = [*(average if isinstance(average, list) else average.parameters())]
    averager = polyak.average(model, "ema", decay=0.9)
    given = source.state_dict() if "state" in name else source
    if "checkpoint" in name:
        torch.save({"state_dict_ema": source.module.state_dict(), "epoch": 3}, tmp_path / "last.pt")
        given = tmp_path / "last.pt"
    averager.take_over(given)
    assert averager.n == n
    for parameter, own in zip(model.named_parameters(), expected, strict=True):
        assert torch.equal(averager.averages[parameter[0]], own)
    averager.update()
    assert averager.n == n + 1


def test_a_count_goes_on():
    model = network()
    theirs = swa(model)
    averager, plain = polyak.average(model, "swa"), AveragedModel(model, use_buffers=True)
    plain.load_state_dict(theirs.state_dict())
    averager.take_over(theirs.state_dict())
    for _ in drifting(model, 5, seed=1):
        averager.update()
        plain.update_parameters(model)
    assert averager.n == 15
    assert averager.rate == 1 / 15
    for name, value in plain.module.named_parameters():
        torch.testing.assert_close(averager.averages[name], value)
    assert averager.profile().start == pytest.approx(10 / 15)
    assert averager.profile().shares.tolist() == pytest.approx([0.0] * 10 + [1 / 15] * 5)
    resumed = polyak.average(model, "swa")
    resumed.load_state_dict(averager.state_dict())
    assert resumed.profile().shares.tolist() == averager.profile().shares.tolist()


def test_a_count_may_be_given():
    model = network()
    averager = polyak.average(model, "swa")
    averager.take_over([parameter.detach() for parameter in model.parameters()], n=3)
    averager.update()
    assert (averager.n, averager.rate) == (4, 0.25)


def test_a_checkpoint_of_lightnings_callback_is_taken_over():
    model = network()
    theirs = swa(model)
    state = {name.removeprefix("module."): value for name, value in theirs.state_dict().items() if "module." in name}
    checkpoint = {
        "state_dict": state,
        "current_model_state": model.state_dict(),
        "averaging_state": {"n_averaged": theirs.n_averaged},
    }
    averager = polyak.average(model, "swa")
    averager.take_over(checkpoint)
    assert averager.n == 10
    assert torch.equal(averager.averages["0.weight"], state["0.weight"])


@pytest.mark.parametrize(
    ("source", "error", "says"),
    [
        (lambda _: 3, polyak.StateError, "found no average in 3"),
        (lambda _: {}, polyak.StateError, "no tensors"),
        (lambda _: {"epoch": 3}, polyak.StateError, "epoch"),
        (lambda _: nn.Linear(3, 5), polyak.StateError, "0.weight is missing"),
        (lambda _: [torch.zeros(3)], polyak.StateError, "expected one for each of 6 parameters"),
        (lambda m: [torch.zeros(3) for _ in m.parameters()], polyak.StateError, r"has shape \(3,\), not \(5, 3\)"),
        (lambda _: "missing.pt", polyak.StateError, "is not there"),
        (lambda _: AveragedModel(nn.Linear(2, 2)), polyak.StateError, "another model"),
    ],
)
def test_what_is_no_average_of_this_model_changes_nothing(source, error, says):
    model = network()
    averager = polyak.average(model, "ema")
    averager.update()
    before = average_bits(averager)
    with pytest.raises(error, match=says):
        averager.take_over(source(model))
    assert (average_bits(averager), averager.n) == (before, 1)


def test_a_file_that_would_run_code_is_not_read(tmp_path):
    torch.save(AveragedModel(network()), tmp_path / "object.pt")
    with pytest.raises(polyak.StateError, match="cannot be read"):
        polyak.average(network()).take_over(tmp_path / "object.pt")


def test_no_count_and_no_several_tensors():
    model = network()
    with pytest.raises(polyak.ConfigError, match="n: got -1"):
        polyak.average(model).take_over(model, n=-1)
    with pytest.raises(polyak.ConfigError, match="keeps several tensors"):
        polyak.average(model, "dema").take_over(network())
    averager = polyak.average(model)
    with averager.applied(), pytest.raises(polyak.AppliedError):
        averager.take_over(network())


class ByMass(polyak.Strategy):
    """A mean that asks for the sum of the weights before."""

    name: Literal["by_mass"] = "by_mass"

    def rate(self, clock):
        return 1.0 / (clock.mass + 1.0)


class Weighing(ByMass):
    name: Literal["weighing"] = "weighing"

    def weight(self, clock):
        return float(clock.n)


def test_the_sum_of_weights_goes_on_and_is_not_made_up():
    model = network()
    averager = polyak.average(model, ByMass())
    averager.take_over([parameter.detach() for parameter in model.parameters()], n=3)
    averager.update()
    assert averager.rate == 0.25
    averager = polyak.average(model, Weighing())
    with pytest.raises(polyak.ConfigError, match="weighs updates"):
        averager.take_over([parameter.detach() for parameter in model.parameters()], n=3)
    averager.take_over([parameter.detach() for parameter in model.parameters()])
    averager.update()
    assert (averager.n, averager.rate) == (1, 1.0)


def test_an_ema_of_torchs_goes_on_with_the_same_numbers():
    model = network()
    theirs = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.9), use_buffers=True)
    for _ in drifting(model, 4):
        theirs.update_parameters(model)
    averager = polyak.average(model, "ema", decay=0.9)
    averager.take_over(theirs)
    for _ in drifting(model, 4, seed=2):
        theirs.update_parameters(model)
        averager.update()
    for name, value in theirs.module.named_parameters():
        torch.testing.assert_close(averager.averages[name], value)


# Moved elsewhere


@pytest.mark.parametrize("strategy", ["ema", "swa", "dema"])
def test_another_dtype_keeps_counts_and_goes_on(strategy):
    model = network()
    averager, wide = polyak.average(model, strategy), polyak.average(model, strategy, dtype="float64")
    for _ in drifting(model, 3):
        averager.update()
        wide.update()
    averager.to(dtype="float64")
    for _ in drifting(model, 3, seed=1):
        averager.update()
        wide.update()
    assert averager.n == 6
    assert averager.averages["0.weight"].dtype == torch.float64
    assert averager.averages["1.num_batches_tracked"].dtype == torch.int64
    for name, value in wide.averages.items():
        torch.testing.assert_close(averager.averages[name], value, rtol=1e-6, atol=1e-7)
    assert averager.profile().shares.tolist() == wide.profile().shares.tolist()
    assert averager.options.dtype == "float64"


def test_the_same_device_changes_nothing_and_an_unknown_one_is_refused():
    averager = polyak.average(mlp())
    before = average_bits(averager)
    averager.to("cpu")
    assert average_bits(averager) == before
    with pytest.raises(polyak.ConfigError, match="device"):
        averager.to("nowhere")
    with pytest.raises(polyak.ConfigError):
        averager.to(dtype="int8")
    if not torch.cuda.is_available():
        with pytest.raises(polyak.ConfigError, match="cuda"):
            averager.to("cuda")
        with pytest.raises(polyak.ConfigError, match="needs an accelerator"):
            averager.pin_memory()
    assert average_bits(averager) == before


@pytest.mark.parametrize(
    ("options", "says"), [({"capturable": True}, "captured|graph"), ({"into": "list"}, "move them yourself")], ids=str
)
def test_an_average_whose_place_is_fixed_is_not_moved(options, says):
    model = mlp()
    if "into" in options:
        options = {"into": [torch.zeros_like(parameter) for parameter in model.parameters()]}
        model = [*model.parameters()]
    averager = polyak.average(model, **options)
    with pytest.raises(polyak.ConfigError, match=says):
        averager.to(dtype="float64")


def test_inside_applied_nothing_moves():
    averager = polyak.average(mlp())
    with averager.applied(), pytest.raises(polyak.AppliedError):
        averager.to(dtype="float64")
