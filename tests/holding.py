"""What tests of applied averages share."""

from __future__ import annotations

import torch

import polyak
from models import average_bits, drifting, mlp, model_bits


def moved(build=mlp, **options):
    model = build()
    averager = polyak.average(model, "ema", decay=0.5, **options)
    for _ in drifting(model, 2):
        averager.update()
    return model, averager, (model_bits(model), average_bits(averager))


def now(model, averager):
    return model_bits(model), average_bits(averager)


def holds_average(model, averager):
    stored = averager.averages
    return all(torch.equal(p, stored[name].to(p.dtype)) for name, p in model.named_parameters() if name in stored)


def enter(averager):
    with averager.applied():
        pass


# Graphs


def loss_of(model):
    return model(torch.ones(2, 3)).square().sum()


def one(model):
    with torch.no_grad():
        model[2].bias.zero_()
