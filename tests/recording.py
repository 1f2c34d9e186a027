"""What tests of recorders share: what is in a folder, and whether it is exact."""

from __future__ import annotations

import pytest
import torch

import polyak
from polyak.posthoc import Store


def files(folder):
    return sorted(path.name for path in folder.iterdir())


def series(folder, name):
    """Return the snapshots of a series, in order."""
    return [snapshot for snapshot in Store(folder).snapshots if snapshot.average == name]


def steps_of(folder, name):
    return [snapshot.step for snapshot in series(folder, name)]


def assert_exact(folder, values=float, start=0.0):
    """Every snapshot must be what its profile says of the weights of each step."""
    for snapshot in Store(folder).snapshots:
        profile = snapshot.profile
        shares = zip(profile.steps.tolist(), profile.shares, strict=True)
        told = profile.start * start + sum(share * values(step) for step, share in shares)
        assert snapshot.read_weights("w").item() == pytest.approx(told, rel=1e-12, abs=1e-12), snapshot.path.name
        assert profile.start + profile.shares.sum() == pytest.approx(1.0, abs=1e-12)


def run_of(model, averager, steps_, *, given=None, values=float):
    for step in steps_:
        model["w"].fill_(values(step))
        averager.update(step=step if given else None)


def fresh(strategy="ema", **options):
    model = {"w": torch.zeros(1, dtype=torch.float64)}
    return model, polyak.average(model, strategy, **options)
