"""Frozen tensors of a run are stored once, and read as if each snapshot held them."""

from __future__ import annotations

import shutil
import warnings

import pytest
import torch
from torch import nn

import polyak
from polyak import StateError
from polyak.posthoc import Recorder, Store, sweep, synthesize


def adapted():
    """Return a frozen base with a small trained adapter."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 64), nn.BatchNorm1d(64), nn.Linear(64, 2))
    model[0].requires_grad_(requires_grad=False)
    return model


def train(model, averager, steps):
    for _ in range(steps):
        with torch.no_grad():
            model[2].weight.add_(torch.randn(2, 64))
            model[1].running_mean.add_(1)
        averager.update()


def recorded(folder, steps=60, **settings):
    model = adapted()
    averager = polyak.average(model, "ema", decay=0.9)
    with Recorder(averager, folder, every=10, **settings):
        train(model, averager, steps)
    return model, averager


def test_a_frozen_base_is_in_one_file(tmp_path):
    model, averager = recorded(tmp_path)
    (constants,) = tmp_path.glob("constants-*.safetensors")
    base = 4 * sum(p.numel() for p in model[0].parameters())
    assert base < constants.stat().st_size < base + 1000
    snapshots = Store(tmp_path).snapshots
    assert all(snapshot.path.stat().st_size < base for snapshot in snapshots)
    for snapshot in snapshots:
        assert torch.equal(snapshot.read_weights("0.weight"), model[0].weight)
    made = synthesize(tmp_path, "ema", decay=0.9)
    for key, tensor in averager.averaged_state_dict().items():
        assert torch.equal(made.state_dict[key], tensor), key


@pytest.mark.parametrize("settings", [{"keep": 2}, {"dtype": "bfloat16"}, {"blocks": False}], ids=str)
def test_it_stays_where_snapshots_are_pruned_or_short(tmp_path, settings):
    model, _ = recorded(tmp_path, **settings)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", polyak.PolyakWarning)  # few snapshots, and short ones
        made = synthesize(tmp_path, "swa", at_step=60)
    wanted = model[0].weight if "dtype" not in settings else model[0].weight.to(torch.bfloat16).float()
    assert torch.equal(made.state_dict["0.weight"], wanted)


def test_a_run_that_goes_on_adds_no_second_file(tmp_path):
    model, averager = recorded(tmp_path)
    again = polyak.average(model, "ema", decay=0.9)
    again.load_state_dict(averager.state_dict())
    with Recorder(again, tmp_path, every=10):
        train(model, again, 40)
    assert len([*tmp_path.glob("constants-*")]) == 1
    assert Store(tmp_path).snapshots[-1].step == 100


def test_what_is_thawed_in_the_middle_is_in_each_snapshot_from_then_on(tmp_path):
    model = adapted()
    averager = polyak.average(model, "swa")
    with Recorder(averager, tmp_path, every=10):
        train(model, averager, 20)
        with torch.no_grad():
            model[0].weight.add_(1)
        train(model, averager, 40)
    made = synthesize(tmp_path, "swa")
    assert made.profile_error < 1e-12
    for key, tensor in averager.averaged_state_dict().items():
        assert torch.allclose(made.state_dict[key].double(), tensor.double(), rtol=1e-6), key


def test_a_copied_folder_is_whole_and_one_without_the_file_says_what_is_missing(tmp_path):
    recorded(tmp_path / "run")
    shutil.copytree(tmp_path / "run", tmp_path / "copy")
    found = sweep(tmp_path / "copy", lambda state: state["2.weight"].norm(), ["swa", "ema"])
    assert len(found.rows) == 2
    (constants,) = (tmp_path / "copy").glob("constants-*")
    constants.unlink()
    with pytest.raises(StateError, match=r"has its frozen tensors in 'constants-.*', which is missing"):
        Store(tmp_path / "copy")


def test_a_damaged_file_of_constants_is_found(tmp_path):
    recorded(tmp_path)
    (constants,) = tmp_path.glob("constants-*")
    content = bytearray(constants.read_bytes())
    content[-100] ^= 1
    constants.write_bytes(content)
    with pytest.raises(StateError, match="checksum differs"):
        synthesize(tmp_path, "ema", decay=0.9)


def test_a_model_without_frozen_parameters_has_no_such_file(tmp_path):
    averager = polyak.average({"w": torch.zeros(3)}, "swa")
    with Recorder(averager, tmp_path, every=2):
        for _ in range(6):
            averager.update()
    assert [*tmp_path.glob("constants-*")] == []
