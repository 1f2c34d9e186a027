"""Law 10: an update of an unchanged model walks nothing and waits for no device."""

from __future__ import annotations

import sys
from collections import Counter

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import polyak
from models import ZOO, drifting
from polyak.tensors import adapter
from polyak.tensors.collector import collector_paused


class _Operations(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.counts[function.overloadpacket.__name__] += 1
        return function(*args, **(kwargs or {}))


@pytest.fixture
def walks(monkeypatch):
    counted = []

    def walk(model):
        counted.append(model)
        return real(model)

    real = adapter.walk
    monkeypatch.setattr(adapter, "walk", walk)
    return counted


@pytest.mark.parametrize("kind", ZOO.values(), ids=str)
@pytest.mark.parametrize("wrap", [lambda model: model, torch.nn.DataParallel], ids=["bare", "dp"])
def test_an_unchanged_model_is_walked_once(kind, wrap, walks):
    model = kind.build()
    run = wrap(model)
    averager = polyak.average(run)
    before = len(walks)
    for _ in drifting(model, 3):
        averager.update()
        averager.update(run)
        with averager.applied():
            pass
        averager(kind.example())
        averager.averaged_state_dict()
        averager.state_dict()
    assert len(walks) == before


@pytest.mark.parametrize("kind", ZOO.values(), ids=str)
def test_an_update_waits_once_to_skip_and_never_by_default(kind):
    # item() and bool() of a tensor are what makes the host wait for its device.
    model = kind.build()
    for nonfinite, most in (("skip", 1), ("raise", 1), ("hold", 0), ("propagate", 0)):
        averager = polyak.average(model, nonfinite=nonfinite)
        averager.update()
        with _Operations() as operations:
            averager.update()
        assert operations.counts["_local_scalar_dense"] + operations.counts["is_nonzero"] <= most, nonfinite


def test_an_update_of_many_tensors_is_a_handful_of_operations():
    model = torch.nn.Sequential(*(torch.nn.Linear(2, 2) for _ in range(50)))
    averager = polyak.average(model, nonfinite="propagate")
    averager.update()
    with _Operations() as operations:
        averager.update()
    assert sum(operations.counts.values()) <= 2, operations.counts


@pytest.mark.parametrize(
    ("kernel", "nonfinite"),
    [("fused", "hold"), *((kernel, policy) for kernel in ("fused", "foreach") for policy in ("skip", "propagate"))],
)
def test_python_does_the_same_work_for_ten_tensors_and_for_a_thousand(kernel, nonfinite):
    counts = []
    for layers in (5, 500):
        model = torch.nn.Sequential(*(torch.nn.Linear(2, 2) for _ in range(layers)))
        averager = polyak.average(model, "ema", kernel=kernel, nonfinite=nonfinite)
        averager.update()
        counts.append(_python_calls(averager.update))
    assert counts[0] == counts[1]


def _python_calls(action):
    calls = []
    # The collector runs when it likes, and calls back whoever asked it to: torch, hypothesis.
    with collector_paused():
        sys.setprofile(lambda frame, event, _: calls.append(frame.f_code.co_name) if event == "call" else None)
        try:
            action()
        finally:
            sys.setprofile(None)
    return calls
