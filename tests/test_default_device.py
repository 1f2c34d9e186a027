"""A user's default device or dtype changes no number: ``meta`` stands for an accelerator, and refuses all values."""

from __future__ import annotations

import ast
import copy
import pickle
from pathlib import Path

import pytest
import torch
from torch import nn

import polyak
from polyak.testing import check_strategy

SOURCES = Path(polyak.__file__).parent

# What makes a tensor on the default device, where none is named.
FACTORIES = {
    "arange", "as_tensor", "asarray", "empty", "empty_strided", "eye", "full", "linspace", "logspace", "normal", "ones",
    "rand", "randint", "randn", "randperm", "range", "scalar_tensor", "tensor", "tril_indices", "triu_indices", "zeros",
}  # fmt: skip


def build():
    torch.manual_seed(0)
    with torch.device("cpu"):
        model = nn.Sequential(nn.Linear(4, 4, dtype=torch.float32), nn.BatchNorm1d(4, dtype=torch.float32))
        return model, torch.randn(32, 4, dtype=torch.float32)


def averaging(folder, **options):
    """Use most of what averagers can do, and return the last average."""
    model, data = build()
    averager = polyak.average(model, "ema", decay=0.5, **options)
    averager.update()
    polyak.recalibrate(averager, data.split(16))
    for suffix in ("pt", "safetensors"):
        polyak.save(averager, folder / f"average.{suffix}")
        polyak.load(averager, folder / f"average.{suffix}")
    averager = copy.deepcopy(averager)
    averager.load_state_dict(pickle.loads(pickle.dumps(averager)).state_dict())
    averager.update(model)
    with averager.applied():
        model(data)
    averager(data)
    averager.copy_to(model)
    return averager.averaged_state_dict()


def banking(folder):
    model, _ = build()
    bank = polyak.bank(model, {"window": {"name": "lawa", "window": 2}, "short": {"name": "dema", "decay": 0.5}})
    for _ in range(3):
        bank.update()
    bank.load_state_dict(bank.state_dict())
    return {f"{name}.{key}": tensor for name in bank for key, tensor in bank[name].averages.items()}


def synthesizing(folder):
    """Synthesise from profiles in each form: regular, in runs as steps jump, by shares as a setting changes."""
    model, _ = build()
    bank = polyak.bank(model, {"ema": {"name": "ema", "decay": 0.5}, "changed": {"name": "ema", "decay": 0.5}})
    for steps in (range(1, 11), [*range(11, 15), *range(20, 40)]):
        again = polyak.bank(model, {name: one.strategy for name, one in bank.items()})
        again.load_state_dict(bank.state_dict())
        bank = again
        with polyak.posthoc.Recorder(bank, folder, every=5):
            for step in steps:
                bank.update(step=step)
        bank["changed"].configure(decay=0.25)
        with torch.no_grad():  # weights that equal their average would be warned of
            for parameter in model.parameters():
                parameter.mul_(2)
    return polyak.posthoc.synthesize(folder, "swa").state_dict


def checking(folder):
    check_strategy(polyak.EMA(decay=0.5))
    return {}


def rounding(folder):
    return averaging(folder, dtype="bfloat16")


def rounding_with_the_loop(folder):
    return averaging(folder, dtype="bfloat16", kernel="loop")


@pytest.mark.parametrize("work", [averaging, rounding, rounding_with_the_loop, banking, synthesizing, checking])
def test_a_default_device_or_dtype_changes_no_number(work, tmp_path):
    for name in ("plain", "device", "dtype"):
        (tmp_path / name).mkdir()
    wanted = work(tmp_path / "plain")
    with torch.device("meta"):
        got = work(tmp_path / "device")
    torch.set_default_dtype(torch.bfloat16)
    try:
        same = work(tmp_path / "dtype")
    finally:
        torch.set_default_dtype(torch.float32)
    for name, tensor in wanted.items():
        assert torch.equal(got[name], tensor), name
        assert torch.equal(same[name], tensor), name


def factories_without_a_device(path):
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr in FACTORIES:
            of_torch = isinstance(node.func.value, ast.Name) and node.func.value.id == "torch"
            if of_torch and "device" not in {keyword.arg for keyword in node.keywords}:
                yield f"{path.relative_to(SOURCES)}:{node.lineno} torch.{node.func.attr}"


def test_every_tensor_that_the_package_makes_has_its_device_named():
    found = [call for path in sorted(SOURCES.rglob("*.py")) for call in factories_without_a_device(path)]
    # Benchmarks choose their device for the whole process, and these readings put no value into a tensor.
    assert [call for call in found if not call.startswith(("bench/", "tensors/kernels/readings.py"))] == []
