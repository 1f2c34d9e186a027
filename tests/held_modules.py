"""What tests of held modules share."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional

from models import ZOO, average_bits, model_bits

KINDS = [pytest.param(kind, id=str(kind)) for kind in ZOO.values() if kind.name != "shapes"]


def applied(averager, run):
    """Return what the model computes with the average inside, in eval mode."""
    with torch.no_grad(), averager.applied():
        return run()


def everything(model, averager):
    return model_bits(model), average_bits(averager), [module.training for module in model.modules()]


# Attributes


class Scaled(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer, self.alpha = nn.Linear(3, 3), 1.0
        self.scaling, self.stages = {"default": 1.0}, [[1.0]]
        self.act = lambda y: y * self.alpha

    def forward(self, x):
        return self.act(self.layer(x)) * self.scaling["default"] * self.stages[0][0]


# Using it changes neither the model nor the average


class Merging(nn.Linear):
    """A LoRA layer that merges its weights in eval mode, in place."""

    def __init__(self, size):
        super().__init__(size, size)
        self.down, self.up = nn.Parameter(torch.randn(2, size)), nn.Parameter(torch.randn(size, 2))
        self.merged = False
        self.weight.requires_grad_(False)

    def train(self, mode=True):
        super().train(mode)
        if self.merged == mode:
            self.weight.data += (self.up @ self.down) * (-1 if mode else 1)
            self.merged = not mode
        return self

    def forward(self, x):
        y = functional.linear(x, self.weight, self.bias)
        return y if self.merged else y + x @ self.down.T @ self.up.T
