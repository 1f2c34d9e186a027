"""What `every=k` costs: one update in k steps, and an error of (k-1)/2·(1-d) of the distance weights–average."""

from __future__ import annotations

import math
from statistics import fmean

import pytest
import torch
from sklearn.datasets import load_digits
from torch import nn

import polyak

OPTIMIZERS = {
    "SGD": lambda parameters: torch.optim.SGD(parameters, lr=0.01, momentum=0.9),
    "Adam": lambda parameters: torch.optim.Adam(parameters, lr=1e-3),
}
STEPS = 600


def training(build):
    """Train on the digits, and yield the model and the 1-based step after each."""
    inputs, labels = (torch.from_numpy(array) for array in load_digits(return_X_y=True))
    inputs = inputs / 16
    model = nn.Sequential(nn.Linear(64, 32), nn.Tanh(), nn.Linear(32, 10)).double()
    optimizer = build(model.parameters())
    generator = torch.Generator().manual_seed(1)
    yield model, 0
    for step in range(1, STEPS + 1):
        rows = torch.randint(len(inputs), (32,), generator=generator)
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(inputs[rows]), labels[rows]).backward()
        optimizer.step()
        yield model, step


def joined(tensors):
    return torch.cat([tensor.detach().flatten() for tensor in tensors])


@pytest.mark.parametrize("decay", [0.99, 0.999])
@pytest.mark.parametrize("build", OPTIMIZERS.values(), ids=OPTIMIZERS)
def test_the_error_is_half_of_k_minus_one_rates_of_the_distance_and_changes_sign_between_updates(build, decay):
    spaces = (2, 5, 10)
    run = training(build)
    model, _ = next(run)
    exact = polyak.average(model, "ema", decay=decay)
    spaced = {k: polyak.average(model, "ema", decay=decay, every=k) for k in spaces}
    sizes = {k: [] for k in spaces}
    behind = {(k, since): [] for k in spaces for since in range(k)}
    for _, step in run:
        for averager in (exact, *spaced.values()):
            averager.update()
        if step <= STEPS // 2:
            continue
        average = joined(exact.averages.values())
        distance = joined(model.parameters()) - average
        for k, averager in spaced.items():
            error = joined(averager.averages.values()) - average
            behind[k, step % k].append((error @ distance / (distance @ distance)).item())
            if step % k == 0:
                sizes[k].append((error.norm() / distance.norm()).item())
    for k in spaces:
        largest = (k - 1) / 2 * (1 - decay)
        assert fmean(sizes[k]) == pytest.approx(largest, rel=0.015)
        # Right after an update it is nearer to the weights than the exact average; it stands still while that moves on.
        for since in range(k):
            expected = largest - since * (1 - decay)
            assert fmean(behind[k, since]) == pytest.approx(expected, abs=0.035 * largest)


@pytest.mark.parametrize(("decay", "k"), [(0.99, 2), (0.99, 5), (0.999, 10)])
def test_where_each_step_goes_anywhere_the_error_is_up_to_1_41_times_that(decay, k):
    weights = {"walk": torch.zeros(20_000, dtype=torch.float64)}
    exact, spaced = (polyak.average(weights, "ema", decay=decay, every=every) for every in (1, k))
    for _ in range(1000):
        weights["walk"].add_(torch.randn(20_000, dtype=torch.float64))
        exact.update()
        spaced.update()
    error = spaced.averages["walk"] - exact.averages["walk"]
    distance = weights["walk"] - exact.averages["walk"]
    times = 2 * math.sqrt((2 * k - 1) / (6 * (k - 1)))
    assert 1.15 < times < 1.415
    assert (error.norm() / distance.norm()).item() == pytest.approx(times * (k - 1) / 2 * (1 - decay), rel=0.015)


def test_only_one_step_in_k_writes_to_the_average():
    run = training(OPTIMIZERS["Adam"])
    model, _ = next(run)
    averager = polyak.average(model, "ema", every=10)
    written = []
    for _, step in run:
        before = {name: tensor._version for name, tensor in averager.averages.items()}
        averager.update()
        if before != {name: tensor._version for name, tensor in averager.averages.items()}:
            written.append(step)
    assert written == [*range(10, STEPS + 1, 10)]
    assert averager.n == STEPS // 10


@pytest.mark.parametrize("k", [2, 10, 100])
def test_the_mean_age_right_after_an_update_is_half_of_k_minus_one_steps_less(k):
    one = polyak.Profile.of(polyak.EMA(decay=0.999), 60_000)
    spaced = polyak.Profile.of(polyak.EMA(decay=0.999), 60_000 // k, every=k)
    assert one.mean_age - spaced.mean_age == pytest.approx((k - 1) / 2, rel=0.02)
