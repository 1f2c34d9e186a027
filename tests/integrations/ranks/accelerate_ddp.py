"""Accelerate under DDP: one average on all ranks, resumed exactly; the folder is the first argument."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import torch
from accelerate import Accelerator
from recorded import Record, bits, equal, near
from torch import nn

import polyak
from polyak.integrations.accelerate import average

DECAY = 0.7


def prepared():
    accelerator = Accelerator(cpu=True)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 1))
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.05)
    record = Record(model).follow(optimizer)
    model, optimizer = accelerator.prepare(model, optimizer)
    return accelerator, model, optimizer, average(accelerator, model, optimizer, decay=DECAY), record


def train(accelerator, model, optimizer, steps):
    for step in steps:
        generator = torch.Generator().manual_seed(100 * step + accelerator.process_index)
        accelerator.backward(model(torch.randn(4, 4, generator=generator)).square().mean())
        optimizer.step()
        optimizer.zero_grad()


folder = Path(sys.argv[1])
accelerator, model, optimizer, averager, record = prepared()
assert accelerator.num_processes == 2
train(accelerator, model, optimizer, range(3))
accelerator.save_state(folder)
train(accelerator, model, optimizer, range(3, 6))
assert averager.n == 6
assert near(averager.averages, record.ema(DECAY))
polyak.distributed.verify_in_sync(averager)
whole = bits(averager.averages)

accelerator, model, optimizer, averager, _ = prepared()
accelerator.load_state(folder)
assert averager.n == 3
train(accelerator, model, optimizer, range(3, 6))
assert equal(bits(averager.averages), whole)
polyak.distributed.verify_in_sync(averager)
accelerator.end_training()
# Modules refer to the process group, and gloo aborts if a group outlives the interpreter (pytorch/pytorch#190489).
sys.stdout.flush()
os._exit(0)
