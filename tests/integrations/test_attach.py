"""``polyak.attach`` on the optimisers that Accelerate, Lightning and Fabric wrap, as these hand them out."""

from __future__ import annotations

import pytest
import torch
from accelerate import Accelerator
from lightning.fabric import Fabric
from lightning.pytorch.core.optimizer import LightningOptimizer
from recorded import Record, near
from torch import nn

import polyak

DECAY = 0.7


@pytest.fixture
def model():
    return nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 1))


def test_a_prepared_optimiser_counts_its_real_steps(model):
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=3)
    raw = torch.optim.SGD(model.parameters(), lr=0.1)
    record = Record(model).follow(raw)
    prepared, optimizer = accelerator.prepare(model, raw)
    averager = polyak.average(prepared, "ema", decay=DECAY)
    polyak.attach(optimizer, averager)
    for _ in range(9):
        with accelerator.accumulate(prepared):
            accelerator.backward(prepared(torch.randn(2, 4)).square().mean())
            optimizer.step()
            optimizer.zero_grad()
    assert averager.n == len(record.steps) == 3
    assert near(averager.averages, record.ema(DECAY))


def test_a_step_that_accelerates_scaler_skips_is_no_update(model):
    raw = torch.optim.SGD(model.parameters(), lr=0.1)
    from accelerate.optimizer import AcceleratedOptimizer

    Accelerator(cpu=True)
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    optimizer = AcceleratedOptimizer(raw, scaler=scaler)
    averager = polyak.average(model, "ema", decay=DECAY)
    polyak.attach(optimizer, averager)
    for batch in range(4):
        loss = model(torch.randn(2, 4)).square().mean() * (float("inf") if batch == 1 else 1.0)
        scaler.scale(loss).backward()
        optimizer.step()
        assert optimizer.step_was_skipped is (batch == 1)
        optimizer.zero_grad()
    assert averager.n == 3


def test_the_optimisers_of_lightning_and_fabric_are_unwrapped(model):
    raw = torch.optim.SGD(model.parameters(), lr=0.1)
    fabric = Fabric(accelerator="cpu", devices=1)
    prepared, optimizer = fabric.setup(model, raw)
    averager = polyak.average(prepared, "ema", decay=DECAY)
    with polyak.attach(optimizer, averager):
        for _ in range(2):
            fabric.backward(prepared(torch.randn(2, 4)).square().mean())
            optimizer.step()
    assert averager.n == 2
    with polyak.attach([LightningOptimizer(raw)], averager):
        raw.step()
    assert averager.n == 3


def test_a_wrapper_and_the_optimiser_inside_it_are_one(model):
    raw = torch.optim.SGD(model.parameters(), lr=0.1)
    averager = polyak.average(model, "ema")
    polyak.attach(LightningOptimizer(raw), averager)
    with pytest.raises(polyak.ConfigError, match="attached to this optimiser already"):
        polyak.attach(raw, averager)
