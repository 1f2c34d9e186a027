"""``nonfinite="skip"`` and ``"raise"``: one NaN step is left out as a whole, counted, and warned about once."""

from __future__ import annotations

import warnings

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import polyak


def poison(model: nn.Module, value: float) -> None:
    with torch.no_grad():
        model[1].weight[0, 0] = value


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("strategy", ["ema", "ema_v1", "ema_v2", "ema_v3", "ema_debiased", "swa"])
def test_one_nan_step_does_not_poison_the_average_for_ever(value, strategy):
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 2))
    averager = polyak.average(model, strategy, nonfinite="skip")
    averager.update()
    healthy = model[1].weight[0, 0].item()
    before = {name: tensor.clone() for name, tensor in averager.averages.items()}
    poison(model, value)
    with pytest.warns(polyak.PolyakWarning, match=r"NaN or infinities at step 2 \(in 1.weight\)"):
        averager.update()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        averager.update()
    assert (averager.skipped, averager.n) == (2, 1)
    assert all(torch.equal(tensor, averager.averages[name]) for name, tensor in before.items())
    poison(model, healthy)
    averager.update()
    assert averager.n == 2
    assert all(tensor.isfinite().all() for tensor in averager.averages.values())


def test_raise_names_the_tensor_and_changes_nothing():
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 2))
    averager = polyak.average(model, "ema", decay=0.5, nonfinite="raise")
    before = averager.averages["0.weight"].clone()
    poison(model, torch.nan)
    with pytest.raises(polyak.NonFiniteError, match=r"step 1 \(in 1.weight\)"):
        averager.update()
    assert torch.equal(averager.averages["0.weight"], before)
    assert averager.n == 0


def test_propagate_averages_what_it_gets():
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 2))
    averager = polyak.average(model, "ema", decay=0.5, nonfinite="propagate")
    poison(model, torch.nan)
    averager.update()
    assert averager.averages["1.weight"].isnan().sum() == 1


def test_large_finite_weights_whose_sum_overflows_are_not_skipped():
    sizes = {"large": (40_000, 1e38), "small": (9, 3e38)}
    model = nn.ParameterDict({name: nn.Parameter(torch.full((size,), value)) for name, (size, value) in sizes.items()})
    averager = polyak.average(model, "swa", nonfinite="skip")
    averager.update()
    assert (averager.n, averager.skipped) == (1, 0)


class CountsReads(TorchDispatchMode):
    """Counts the operations that make the host wait for a device."""

    def __init__(self):
        super().__init__()
        self.reads = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.reads += func in (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.is_nonzero.default)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    ("nonfinite", "kernel", "reads"),
    [("skip", "foreach", 1), ("raise", "foreach", 1), ("propagate", "foreach", 0), ("skip", "fused", 0)],
)
def test_the_check_costs_one_synchronisation_and_none_with_propagate(nonfinite, kernel, reads):
    model = nn.Sequential(nn.Linear(300, 300), nn.BatchNorm1d(300), nn.Linear(300, 2))
    averager = polyak.average(model, "ema", decay=0.5, nonfinite=nonfinite, kernel=kernel)
    averager.update()
    with CountsReads() as counter:
        averager.update()
    assert counter.reads == reads


def poisoned_start(**options):
    """Return a model that is finite now, and an average that was built when it was not."""
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 2))
    healthy = model[1].weight[0, 0].item()
    poison(model, torch.nan)
    averager = polyak.average(model, **{"nonfinite": "skip", **options})
    poison(model, healthy)
    return model, averager


@pytest.mark.parametrize("kernel", ["auto", "foreach", "loop"])
@pytest.mark.parametrize("strategy", ["ema", "ema_v1", "ema_v3", "dema"])
def test_the_first_finite_update_replaces_a_start_that_is_not_finite(strategy, kernel):
    model, averager = poisoned_start(strategy=strategy, kernel=kernel)
    with pytest.warns(polyak.PolyakWarning, match=r"built from hold NaN or infinities \(in 1.weight\); the first upd"):
        averager.update()
    assert torch.equal(averager.averages["1.weight"], model[1].weight)
    averager.update()
    assert all(tensor.isfinite().all() for stored in averager.stored for tensor in stored.tensors)
    profile = averager.profile()
    assert profile.start == 0
    assert profile.shares.sum() == pytest.approx(1, abs=1e-12)


def test_a_start_that_is_not_finite_is_replaced_only_once_the_weights_are_finite():
    model, averager = poisoned_start(strategy="ema", decay=0.5)
    healthy = model[1].weight[0, 0].item()
    poison(model, torch.nan)
    with pytest.warns(polyak.PolyakWarning) as caught:
        averager.update()
    assert [str(w.message).split(";")[0].split(" hold")[0] for w in caught] == [
        "the weights that the averager was built from", "the weights"
    ]  # fmt: skip
    assert (averager.n, averager.skipped) == (0, 1)
    poison(model, healthy)
    averager.update()
    assert averager.rate == 1
    assert averager.averages["1.weight"].isfinite().all()


def test_a_start_that_is_not_finite_is_replaced_in_each_average_of_a_bank_and_after_a_resume():
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 2))
    healthy = model[1].weight[0, 0].item()
    poison(model, torch.nan)
    bank = polyak.bank(model, {"a": {"name": "ema", "decay": 0.5}, "b": "ema_v2", "mean": "swa"}, nonfinite="skip")
    saved = bank.state_dict()
    poison(model, healthy)
    bank.load_state_dict(saved)
    with pytest.warns(polyak.PolyakWarning, match="the first update replaces them") as caught:
        bank.update()
    assert len(caught) == 2  # a mean takes nothing from its start
    assert all(torch.equal(one.averages["1.weight"], model[1].weight) for one in bank.values())


def test_raise_refuses_a_start_that_is_not_finite_and_changes_nothing():
    _, averager = poisoned_start(strategy="ema", decay=0.5, nonfinite="raise")
    with pytest.raises(polyak.NonFiniteError, match=r"built from hold NaN or infinities \(in 1.weight\).*'first'"):
        averager.update()
    assert averager.progress.calls == 0


@pytest.mark.parametrize("options", [{"origin": "first"}, {"nonfinite": "propagate"}], ids=str)
def test_a_start_that_is_not_finite_is_no_matter_where_it_is_not_asked_for(options):
    _, averager = poisoned_start(strategy="ema", decay=0.5, **options)
    averager.update()
    assert averager.averages["1.weight"].isnan().any() == ("nonfinite" in options)
