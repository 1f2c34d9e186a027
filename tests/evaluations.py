"""What tests of averagers share."""

from __future__ import annotations

import polyak
from models import drifting


def used(model, strategy="ema", steps=2, **options):
    averager = polyak.average(model, strategy, **options)
    for _ in drifting(model, steps):
        averager.update()
    return averager
