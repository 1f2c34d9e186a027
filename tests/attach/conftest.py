"""Fixtures of these tests."""

from __future__ import annotations

import pytest
import torch.distributed as dist
from torch.optim import SGD

import polyak
from models import mlp


@pytest.fixture
def model():
    return mlp()


@pytest.fixture
def optimizer(model):
    return SGD(model.parameters(), lr=0.1)


@pytest.fixture
def averager(model):
    return polyak.average(model, "ema", decay=0.5)


@pytest.fixture(scope="module")
def _process_group(tmp_path_factory):
    store = dist.FileStore(str(tmp_path_factory.mktemp("gloo") / "store"), 1)
    dist.init_process_group("gloo", store=store, rank=0, world_size=1)
    yield
    dist.destroy_process_group()
