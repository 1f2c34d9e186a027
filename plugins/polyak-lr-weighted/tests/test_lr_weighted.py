"""The strategy ``lr_weighted`` against shares normalised in float64, and on torch's real schedules."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

import polyak
from polyak.testing import check_strategy
from polyak_lr_weighted import LRWeighted

WARMUP_AND_COSINE = [0.1 * min(t / 5, 0.5 + 0.5 * math.cos(math.pi * t / 40)) for t in range(40)]


def shares_of(lrs: list[float], power: float = 2.0) -> polyak.Profile:
    model = {"w": torch.zeros(1, dtype=torch.float64)}
    averager = polyak.average(model, "lr_weighted", power=power)
    for lr in lrs:
        averager.update(lr=lr)
    return averager.profile()


@pytest.mark.parametrize("power", [0.0, 0.5, 1.0, 2.0, 3.0])
def test_shares_are_the_powers_of_the_learning_rate_over_their_sum(power: float) -> None:
    lrs = WARMUP_AND_COSINE[1:]
    weights = np.array(lrs) ** power
    np.testing.assert_allclose(shares_of(lrs, power).shares, weights / weights.sum(), rtol=0, atol=1e-15)


def test_a_warm_up_from_zero_gives_the_first_step_no_share() -> None:
    profile = shares_of(WARMUP_AND_COSINE)
    assert WARMUP_AND_COSINE[0] == 0.0
    assert profile.shares[0] == 0.0
    assert profile.start == 0.0
    assert profile.shares.sum() == pytest.approx(1.0, abs=1e-15)


def test_while_every_learning_rate_was_zero_the_average_follows_the_weights() -> None:
    assert shares_of([0.0, 0.0, 0.0]).shares.tolist() == [0.0, 0.0, 1.0]
    assert shares_of([0.0, 0.0, 0.5]).shares.tolist() == [0.0, 0.0, 1.0]


def test_a_step_at_zero_after_others_has_no_share_and_changes_no_bit() -> None:
    model = {"w": torch.tensor([1.0])}
    averager = polyak.average(model, "lr_weighted")
    averager.update(lr=0.1)
    model["w"].fill_(5.0)
    averager.update(lr=0.0)
    assert averager.averages["w"].tolist() == [1.0]


def test_power_zero_is_the_plain_mean() -> None:
    np.testing.assert_allclose(
        shares_of(WARMUP_AND_COSINE, 0.0).shares, polyak.Profile.of(polyak.SWA(), 40).shares, rtol=0, atol=1e-15
    )


def test_an_update_that_stands_for_several_steps_counts_for_as_many() -> None:
    model = {"w": torch.zeros(1, dtype=torch.float64)}
    averager = polyak.average(model, "lr_weighted")
    for step in (1, 2, 6):
        averager.update(step=step, lr=0.3)
    np.testing.assert_allclose(averager.profile().shares, [1 / 6, 1 / 6, 4 / 6], rtol=0, atol=1e-15)


def test_the_average_of_a_real_run_is_the_weighted_mean_of_its_weights() -> None:
    torch.manual_seed(0)
    model = torch.nn.Linear(3, 2, dtype=torch.float64)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda t: WARMUP_AND_COSINE[min(t, 39)])
    averager = polyak.average(model, "lr_weighted")
    seen, lrs = [], []
    for _ in range(40):
        optimizer.zero_grad()
        model(torch.randn(8, 3, dtype=torch.float64)).square().mean().backward()
        optimizer.step()
        lrs.append(scheduler.get_last_lr()[0])
        seen.append(model.weight.detach().clone())
        averager.update(lr=lrs[-1])
        scheduler.step()
    weights = torch.tensor(lrs, dtype=torch.float64) ** 2
    expected = torch.einsum("t,tij->ij", weights / weights.sum(), torch.stack(seen))
    assert float((averager.averages["weight"] - expected).abs().max()) <= 1e-14


UNUSABLE = {
    None: (polyak.RateError, r"needs the learning rate .* got None.*averager\.update\(lr="),
    -0.1: (polyak.RateError, r"needs the learning rate .* got -0\.1.*averager\.update\(lr="),
    math.nan: (polyak.ConfigError, "lr: got nan"),
    math.inf: (polyak.ConfigError, "lr: got inf"),
}


@pytest.mark.parametrize(("lr", "refused"), UNUSABLE.items())
@pytest.mark.parametrize("before", [0, 3])
def test_without_a_usable_learning_rate_nothing_is_averaged(
    lr: float | None, refused: tuple[type[polyak.PolyakError], str], before: int
) -> None:
    model = {"w": torch.ones(2)}
    averager = polyak.average(model, "lr_weighted")
    for _ in range(before):
        averager.update(lr=0.1)
    model["w"].fill_(9.0)
    held = averager.averages["w"].clone()
    with pytest.raises(refused[0], match=refused[1]):
        averager.update(lr=lr)
    assert averager.n == before
    assert torch.equal(averager.averages["w"], held)


@pytest.mark.parametrize("power", [-1.0, math.inf, math.nan])
def test_a_power_that_makes_no_sense_is_refused_by_name(power: float) -> None:
    with pytest.raises(polyak.ConfigError, match=r"strategy\.power"):
        polyak.average({"w": torch.zeros(1)}, "lr_weighted", power=power)


def test_it_is_offered_by_this_distribution() -> None:
    assert polyak.strategies()["lr_weighted"] is LRWeighted
    assert polyak.strategies().distribution("lr_weighted") == "polyak-lr-weighted"


@pytest.mark.parametrize("power", [0.0, 1.0, 2.0])
def test_it_obeys_the_laws(power: float) -> None:
    check_strategy("lr_weighted", power=power)
