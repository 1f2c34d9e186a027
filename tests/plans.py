"""What tests of the cached plan share."""

from __future__ import annotations

import polyak
from models import mlp


def is_current(averager):
    binding = averager.core.binding
    return binding.plan.is_current(binding.model)


def averager_of(model=None, kernel="auto"):
    model = mlp() if model is None else model
    averager = polyak.average(model, "ema", decay=0.5, kernel=kernel)
    averager.update()
    assert is_current(averager)
    return model, averager
