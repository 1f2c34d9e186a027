"""What tests of swaps share."""

from __future__ import annotations

import polyak
from models import drifting, mlp


def moved_once(build=mlp, steps=3, **options):
    model = build()
    averager = polyak.average(model, "ema", decay=0.7, **options)
    for _ in drifting(model, steps):
        averager.update()
    return model, averager
