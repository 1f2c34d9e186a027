"""What may be written while the model holds an average, and what is warned of."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import polyak
from holding import holds_average, loss_of, moved, now, one
from models import Conv, mlp, model_bits

# Writes


def step(model):
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    loss_of(model).backward()
    optimizer.step()


def load(model):
    model.load_state_dict(mlp().state_dict())


def assign(model):
    model.load_state_dict({name: tensor + 1 for name, tensor in model.state_dict().items()}, assign=True)


@pytest.mark.parametrize("write", [step, load, assign, one])
@pytest.mark.parametrize("dtype", ["auto", "float64"])
def test_parameters_that_are_written_inside_are_warned_of(write, dtype):
    model, averager, (own, _) = moved(dtype=dtype)
    objects = [id(p) for p in model.parameters()]
    with (
        pytest.warns(polyak.PolyakWarning, match=r"parameters were written inside \(.*2\.bias\)") as caught,
        averager.applied(),
    ):
        write(model)
    assert caught[0].filename == __file__
    assert model_bits(model) == own
    assert [id(p) for p in model.parameters()] == objects
    averager.update()


class ScheduleFree(torch.optim.SGD):
    """Evaluates at another point than it trains at, as facebookresearch's schedule-free optimisers do."""

    def moved(self, weight):
        with torch.no_grad():
            for param in self.param_groups[0]["params"]:
                param.lerp_(torch.ones_like(param), weight)

    def eval(self):
        self.moved(0.5)

    def train(self):
        self.moved(-1.0)


def test_an_optimiser_that_is_put_in_eval_mode_inside_is_warned_of_and_may_be_so_around():
    model, averager, _ = moved()
    optimizer = ScheduleFree(model.parameters(), lr=0.1)
    with pytest.warns(polyak.PolyakWarning, match="parameters were written inside"), averager.applied():
        optimizer.eval()
    before = [param.detach().clone() for param in model.parameters()]
    optimizer.eval()
    with averager.applied():
        assert holds_average(model, averager)
    optimizer.train()
    assert all(torch.allclose(param, own) for param, own in zip(model.parameters(), before, strict=True))


def test_a_write_inside_does_not_replace_an_exception():
    model, averager, (own, _) = moved()

    def fail():
        one(model)
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError), averager.applied():
        fail()
    assert model_bits(model) == own


def test_a_write_inside_of_the_inner_of_two_averagers_is_warned_of_once():
    model, averager, (own, _) = moved()
    other = polyak.average(model, "ema")
    with averager.applied(), pytest.warns(polyak.PolyakWarning, match="written inside"), other.applied():
        one(model)
    assert model_bits(model) == own


def test_evaluating_and_batch_norm_are_nothing_to_warn_of():
    model, averager, _ = moved(Conv)
    x = torch.randn(4, 3, 8, 8)
    with averager.applied():
        model.eval()(x)
    before = averager.averages["norm.running_mean"].clone()
    with averager.applied():
        model.train()(x)
    # What the statistics became is the average's.
    assert not torch.equal(averager.averages["norm.running_mean"], before)


# Layers that put other tensors in the place of their weights


class Packed(nn.Linear):
    """Packs its weight at the first forward, as 4-bit layers do."""

    def __init__(self, how):
        super().__init__(4, 4)
        self.how = how

    def forward(self, x):
        if self.weight.shape == (4, 4) and self.weight.dtype == torch.float32 and not self.training:
            packed = self.weight.detach().to(torch.float16)
            if self.how == "data":
                self.weight.data = packed.view(torch.uint8).view(-1, 2).float()
            elif self.how == "dtype":
                self.weight.data = packed
            elif self.how == "parameter":
                self.weight = nn.Parameter(packed.view(torch.uint8).view(-1, 2), requires_grad=False)
            else:
                self.weight.data = self.weight.data.t()
            return x
        return super().forward(x)


@pytest.mark.parametrize("how", ["data", "dtype", "parameter", "view"])
@pytest.mark.parametrize("dtype", ["auto", "float64"])
def test_a_layer_that_repacks_its_weight_gets_it_back_and_our_error(how, dtype):
    model, averager, before = moved(lambda: nn.Sequential(Packed(how), nn.Linear(4, 2)), dtype=dtype)
    weight = model[0].weight
    model.eval()
    with pytest.raises(polyak.AppliedError, match=r"another shape or dtype inside \(0\.weight\)"), averager.applied():
        model(torch.ones(1, 4))
    assert model[0].weight is weight
    assert now(model, averager) == before
    assert not averager.is_applied
    averager.update()


def test_a_model_that_is_halved_inside_gets_its_float32_weights_back():
    model, averager, before = moved()
    with pytest.raises(polyak.AppliedError, match="another shape or dtype"), averager.applied():
        model.half()
    assert now(model, averager) == before


def test_an_exception_of_a_layer_that_has_repacked_its_weight_stays_the_exception():
    model, averager, before = moved(lambda: nn.Sequential(Packed("data")))
    model.eval()

    def fail():
        model(torch.ones(1, 4))
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError), averager.applied():
        fail()
    assert now(model, averager) == before


def test_memory_of_the_same_form_inside_is_followed():
    model, averager, before = moved()
    with averager.applied():
        for p in model.parameters():
            p.data = p.data.clone()
    assert now(model, averager) == before
