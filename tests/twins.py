"""Twins for tests of `polyak.optim.AdamW`: one trained by it, one by torch's and `polyak.attach`."""

from __future__ import annotations

import platform

import pytest
import torch

import polyak
from models import bits
from polyak.kernels.select import compiles
from polyak.optim import AdamW

READY = {"nonfinite": "propagate"}


COMPILED = compiles("auto")  # else torch makes the steps, and the numbers are its own


# Torch's kernel was seen to round as ours does wherever it is compiled for these; elsewhere they are only near.
EXACT = not COMPILED or platform.machine() in {"x86_64", "AMD64"}


needs_loops = pytest.mark.skipif(not COMPILED, reason="only compiled loops make one pass")


class Twins:
    """Two equal models: one is trained by ours, the other by torch's AdamW with the averager attached."""

    def __init__(self, build, *, groups=None, strategy=None, options=None, torchs=None, **settings):
        torch.manual_seed(0)
        self.ours = build()
        torch.manual_seed(0)
        self.theirs = build()
        groups = groups or (lambda model: model.parameters())
        strategy, options = strategy or {"strategy": "ema", "decay": 0.9}, {**READY, **(options or {})}
        self.averager, self.other = (polyak.average(model, **strategy, **options) for model in (self.ours, self.theirs))
        self.one = AdamW(groups(self.ours), averager=self.averager, **settings)
        self.two = torch.optim.AdamW(groups(self.theirs), **{"fused": True, **settings, **(torchs or {})})
        polyak.attach(self.two, self.other)

    def give_gradients(self, seed=0, *, scale=1.0, without=()):
        generator = torch.Generator().manual_seed(seed)
        pairs = zip(self.ours.named_parameters(), self.theirs.parameters(), strict=True)
        for (name, ours), theirs in pairs:
            ours.grad = theirs.grad = None
            if name not in without and ours.requires_grad:
                gradient = torch.empty_like(ours).copy_(torch.randn(ours.shape, generator=generator) * scale)
                ours.grad, theirs.grad = gradient.clone(), gradient.clone()

    def train(self, steps=3, **gradients):
        for seed in range(steps):
            self.give_gradients(seed, **gradients)
            self.one.step()
            self.two.step()

    def assert_equal(self):
        ours = everything(self.ours, self.one, self.averager)
        theirs = everything(self.theirs, self.two, self.other)
        assert [*ours] == [*theirs]
        for name, tensor in ours.items():
            assert_near(tensor, theirs[name])
            assert not EXACT or bits(tensor) == bits(theirs[name]), name
        assert (self.averager.n, self.averager.rate) == (self.other.n, self.other.rate)
        assert self.averager.profile().shares.tolist() == self.other.profile().shares.tolist()


def everything(model, optimizer, averager):
    """Return copies of the weights, the states and the average."""
    named = [(f"{i} {name}", t) for i, p in enumerate(model.parameters()) for name, t in optimizer.state[p].items()]
    found = {**model.state_dict(), **dict(named), **{f"average {k}": t for k, t in averager.averages.items()}}
    return {name: tensor.detach().clone() for name, tensor in found.items()}


def assert_near(ours, theirs):
    """Hold what a step rounds against each other with a tolerance, everything else bit for bit."""
    if ours.dtype in (torch.float32, torch.float64):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5, equal_nan=True)
    else:
        assert bits(ours) == bits(theirs)
