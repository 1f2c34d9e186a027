"""What tests of attached averagers share."""

from __future__ import annotations

import torch
from torch.optim import SGD, AdamW, Optimizer

OPTIMIZERS = {
    "SGD": lambda parameters: SGD(parameters, lr=0.1),
    "SGD fused": lambda parameters: SGD(parameters, lr=0.1, fused=True),
    "AdamW loop": lambda parameters: AdamW(parameters, lr=0.1, foreach=False),
    "AdamW foreach": lambda parameters: AdamW(parameters, lr=0.1, foreach=True),
    "AdamW fused": lambda parameters: AdamW(parameters, lr=0.1, fused=True),
}


def backward(model):
    model(torch.ones(2, 3)).square().sum().backward()


def train(model, optimizer, steps=3):
    for _ in range(steps):
        optimizer.zero_grad()
        backward(model)
        optimizer.step()


# Wrappers around the optimiser that steps


class SAM(Optimizer):
    """As davda54/sam: perturbs the weights, then lets another optimiser step."""

    def __init__(self, params, base=SGD, own_step=True, **settings):
        super().__init__(params, settings)
        self.base_optimizer = base(self.param_groups, **settings)
        self.param_groups = self.base_optimizer.param_groups
        self.own_step = own_step

    @torch.no_grad()
    def first_step(self):
        for group in self.param_groups:
            for param in group["params"]:
                self.state[param]["moved"] = 0.05 * param.grad / (param.grad.norm() + 1e-12)
                param.add_(self.state[param]["moved"])

    @torch.no_grad()
    def second_step(self):
        for group in self.param_groups:
            for param in group["params"]:
                param.sub_(self.state[param]["moved"])
        self.base_optimizer.step()

    def step(self, closure=None):
        self.first_step()
        with torch.enable_grad():
            closure()
        self.second_step()


def step(model, optimizer):
    return lambda: train(model, optimizer, steps=1)
