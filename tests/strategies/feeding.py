"""What the tests of strategies share: one-hot weights through a real averager, and sums by formula in float64."""

from __future__ import annotations

import numpy as np
import torch

import polyak


def fed(strategy, n, *, every=1, **options):
    """Return what each step 0 (the start) … n counts in the average of a real averager."""
    weights = torch.zeros(n + 1, dtype=torch.float64)
    weights[0] = 1.0
    averager = polyak.average({"w": weights}, strategy, every=every, **options)
    for step in range(1, n + 1):
        weights.zero_()[step] = 1.0
        averager.update()
    return averager.averages["w"].numpy()


def by_recursion(rates):
    """Return the shares of the start and of each update, one update after the other."""
    shares = np.zeros(len(rates) + 1)
    shares[0] = 1.0
    for i, rate in enumerate(rates, start=1):
        shares *= 1.0 - rate
        shares[i] += rate
    return shares


def summed(shares, every):
    """Return the shares of strides of so many steps, the last step of each at its end."""
    return np.asarray(shares).reshape(-1, every).sum(axis=1)
