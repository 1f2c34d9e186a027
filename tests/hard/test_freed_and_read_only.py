"""Memory that others freed or cannot be written: an error of polyak's own, never the end of the process."""

from __future__ import annotations

import copy
import sys
import warnings

import numpy as np
import pytest
import torch
from torch import nn

import polyak
from models import average_bits, mlp


def _apply(averager, model):
    with averager.applied():
        pass


USES = {
    "update": lambda averager, model: averager.update(),
    "applied": _apply,
    "copy_to": lambda averager, model: averager.copy_to(),
    "copy_to another": lambda averager, model: averager.copy_to(copy.deepcopy(model)),
    "averaged_state_dict": lambda averager, model: averager.averaged_state_dict(),
    "state_dict": lambda averager, model: averager.state_dict(),
    "module": lambda averager, model: averager.module,
    "deepcopy": lambda averager, model: copy.deepcopy(averager),
}


on_linux = pytest.mark.skipif(sys.platform != "linux", reason="only Linux says which memory cannot be written")


def large():
    return nn.Sequential(nn.Linear(600, 600), nn.Linear(600, 3))


@pytest.mark.parametrize("kernel", ["fused", "foreach", "loop"])
@pytest.mark.parametrize("use", USES)
@pytest.mark.parametrize("build", [mlp, large])
def test_an_average_whose_memory_was_freed_is_refused(use, build, kernel):
    model = build()
    averager = polyak.average(model, "ema", decay=0.5, kernel=kernel)
    averager.update()
    averager.averages["0.weight"].untyped_storage().resize_(0)
    for _ in range(2):
        with pytest.raises(polyak.StateError, match="was freed"):
            USES[use](averager, model)
    assert averager.n == 1


def test_averages_that_shrank_twice_to_the_same_place_are_refused():
    model = large()
    averager = polyak.average(model, "ema", decay=0.5)
    averager.update()
    storage = averager.averages["0.weight"].untyped_storage()
    for size in (4000, 100):
        storage.resize_(size)
    with pytest.raises(polyak.StateError, match="was freed"):
        averager.update()


def test_what_a_strategy_keeps_beside_an_average_is_looked_at_too():
    averager = polyak.average(mlp(), "dema")
    averager.update()
    next(iter(averager.core.state.stored[0].slots.values())).untyped_storage().resize_(0)
    with pytest.raises(polyak.StateError, match="was freed"):
        averager.update()


def test_an_averager_goes_on_from_a_state_after_its_averages_were_freed():
    model = mlp()
    averager = polyak.average(model, "ema", decay=0.5)
    averager.update()
    state = averager.state_dict()
    averager.averages["0.weight"].untyped_storage().resize_(0)
    averager.load_state_dict(state)
    before = average_bits(averager)
    averager.update()
    assert (average_bits(averager), averager.n) == (before, 2)  # of weights that stay as they are


def test_averages_that_were_moved_by_resizing_are_followed():
    model = mlp()
    averager = polyak.average(model, "ema", decay=0.5)
    averager.update()
    before = averager.averages["0.weight"].clone()
    storage = averager.averages["0.weight"].untyped_storage()
    storage.resize_(storage.nbytes() + 4096)
    averager.update()
    assert torch.equal(averager.averages["0.weight"], before.lerp(model[0].weight.detach(), 0.5))


@pytest.fixture
def mapped(tmp_path):
    """A model, the weight of which lies in a file that is open for reading."""
    model = mlp()
    np.save(tmp_path / "weight.npy", model[0].weight.detach().numpy())
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*not writable")  # of torch, the first time
        model[0].weight.data = torch.from_numpy(np.load(tmp_path / "weight.npy", mmap_mode="r"))
    return model


@on_linux
@pytest.mark.parametrize("use", ["applied", "copy_to"])
def test_a_model_in_read_only_memory_is_averaged_and_never_written_to(mapped, use):
    averager = polyak.average(mapped, "ema", decay=0.5)
    averager.update()
    before = {name: tensor.clone() for name, tensor in mapped.state_dict().items()}
    for _ in range(2):
        with pytest.raises(polyak.ModelError, match=r"the first is 0\.weight"):
            USES[use](averager, mapped)
    assert not averager.is_applied
    assert all(torch.equal(tensor, before[name]) for name, tensor in mapped.state_dict().items())
    averager.update()
    assert torch.equal(averager.averages["0.weight"], mapped[0].weight)
    mapped[0].weight.data = mapped[0].weight.data.clone()
    USES[use](averager, mapped)


@on_linux
def test_another_model_in_read_only_memory_is_not_overwritten(mapped):
    averager = polyak.average(mlp(), "ema", decay=0.5)
    with pytest.raises(polyak.ModelError, match="read-only"):
        averager.copy_to(mapped)


@on_linux
def test_weights_that_come_into_read_only_memory_later_are_noticed(mapped):
    data = mapped[0].weight.data
    mapped[0].weight.data = data.clone()
    averager = polyak.average(mapped, "ema", decay=0.5)
    with averager.applied():
        pass
    mapped[0].weight.data = data
    with pytest.raises(polyak.ModelError, match="read-only"), averager.applied():
        pass
