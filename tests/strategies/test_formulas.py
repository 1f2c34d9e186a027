"""Every strategy gives the shares that its formula says, through a real averager."""

from __future__ import annotations

import math
from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import given, strategies as st

import polyak
from oracle import strategies_to_try
from polyak.registry import registry
from polyak.strategy import BUILT_IN
from polyak.strategy.base import checked_rate
from polyak.strategy.polynomial import _kept
from polyak.strategy.updates import Updates, rates_of

from .feeding import by_recursion, fed

N = 60
T = range(1, N + 1)
BY_HAND = {
    "ema_halflife": (polyak.HalfLifeEMA(halflife=7), [1 - 0.5 ** (1 / 7) for t in T]),
    "ema_tf": (polyak.TFEMA(decay=0.7), [1 - min(0.7, (1 + t) / (10 + t)) for t in T]),
    "ema_tf, follow": (polyak.TFEMA(follow=3), [1 - (t - 2) / (t + 7) if t > 3 else 1.0 for t in T]),
    "polynomial": (polyak.PolynomialAveraging(eta=2.5), [3.5 / (t + 2.5) for t in T]),
    "power": (polyak.PowerEMA(gamma=3), [1 - (1 - 1 / t) ** 4 for t in T]),
    "tail": (polyak.TailAveraging(fraction=0.25, total_steps=N), [1.0 if t <= 46 else 1 / (t - 45) for t in T]),
    "tail, anytime": (polyak.TailAveraging(fraction=0.25), [1 - (1 - 1 / t) ** 7 for t in T]),
    "block_mean": (polyak.BlockMean(length=7), [1 / ((t - 1) % 7 + 1) for t in T]),
}


@pytest.mark.parametrize(("strategy", "rates"), BY_HAND.values(), ids=BY_HAND)
def test_one_hot_weights_come_back_with_the_shares_of_the_formula(strategy, rates):
    np.testing.assert_allclose(fed(strategy, N), by_recursion(rates), rtol=1e-12, atol=1e-16)


@pytest.mark.parametrize("n", [1, 3, 5, 23])
@pytest.mark.parametrize("window", [1, 2, 5, 40])
def test_lawa_is_the_mean_of_the_last_snapshots(n, window):
    held = min(n, window)
    wanted = [0.0] * (n + 1 - held) + [1 / held] * held
    np.testing.assert_allclose(fed(polyak.LAWA(window=window), n), wanted, rtol=1e-14, atol=1e-16)
    profile = polyak.Profile.of(polyak.LAWA(window=window), n)
    np.testing.assert_array_equal([profile.start, *profile.shares], wanted)


def test_lawa_keeps_no_rounding_of_earlier_updates():
    model = {"w": torch.zeros(1, dtype=torch.float64)}
    averager = polyak.average(model, "lawa", window=3)
    for value in (1e17, 3.14, 0.1, 0.1, 0.1):
        model["w"].fill_(value)
        averager.update()
    assert averager.averages["w"].item() == 0.1


def test_every_is_the_distance_of_lawas_snapshots():
    model = {"w": torch.zeros(1, dtype=torch.float64)}
    averager = polyak.average(model, "lawa", window=3, every=10)
    for step in range(1, 58):
        model["w"].fill_(step)
        averager.update()
    assert averager.averages["w"].item() == pytest.approx((30 + 40 + 50) / 3, rel=1e-15)


@pytest.mark.parametrize("origin", ["initial", "first"])
@pytest.mark.parametrize("decay", [0.0, 0.5, 0.9])
def test_dema_is_twice_the_average_less_the_average_of_the_average(decay, origin):
    # Rows: the first average after each update, as shares of the start and the updates; the second averages these.
    rates = [1.0 if t == 1 and origin == "first" else 1 - decay for t in T]
    first = second = np.eye(N + 1)[0]
    for t, rate in zip(T, rates, strict=True):
        first = first + rate * (np.eye(N + 1)[t] - first)
        second = second + rate * (first - second)
    wanted = 2 * first - second
    np.testing.assert_allclose(fed(polyak.DoubleEMA(decay=decay), N, origin=origin), wanted, rtol=1e-12, atol=1e-15)
    profile = polyak.Profile.of(polyak.DoubleEMA(decay=decay), N, origin=origin)
    np.testing.assert_allclose([profile.start, *profile.shares], wanted, rtol=1e-12, atol=1e-15)
    assert profile.start + profile.shares.sum() == pytest.approx(1, abs=1e-14)


def test_dema_does_not_lag_on_a_ramp_and_the_ema_does_by_its_mean_age():
    model = {"w": torch.zeros(1, dtype=torch.float64)}
    double, single = polyak.average(model, "dema", decay=0.99), polyak.average(model, "ema", decay=0.99)
    for step in range(1, 4001):
        model["w"].fill_(step)
        double.update()
        single.update()
    assert single.averages["w"].item() == pytest.approx(4000 - 99, abs=1e-9)
    assert double.averages["w"].item() == pytest.approx(4000, abs=1e-9)


def test_the_shares_of_power_are_differences_of_powers():
    shares = fed(polyak.PowerEMA(gamma=5.5), N)
    wanted = [0.0, *((t**6.5 - (t - 1) ** 6.5) / N**6.5 for t in T)]
    np.testing.assert_allclose(shares, wanted, rtol=1e-12, atol=1e-30)


def test_the_shares_of_polynomial_are_ratios_of_gammas():
    profile = polyak.Profile.of(polyak.PolynomialAveraging(eta=3), 200)
    growth = np.array([i * (i + 1) * (i + 2) for i in range(1, 201)], np.float64)  # Gamma(i + 3) / Gamma(i)
    np.testing.assert_allclose(profile.shares, growth / growth.sum(), rtol=1e-12)


@pytest.mark.property
@given(
    before=st.integers(0, 10**7), stride=st.integers(1, 400), eta=st.integers(0, 50),
    scale=st.sampled_from([1, 2, 5, 16]),
)  # fmt: skip
def test_a_ratio_of_gammas_is_the_product_over_the_steps(before, stride, eta, scale):
    a = Fraction(eta, scale) + 1
    exact = math.prod(Fraction(t - 1) / (t - 1 + a) for t in range(before + 1, before + stride + 1))
    assert float(_kept(before, before + stride, float(a))) == pytest.approx(float(exact), rel=1e-13, abs=1e-300)


@pytest.mark.parametrize(
    ("fraction", "total", "length"), [(0.07, 100, 7), (0.1, 1000, 100), (1, 10, 10), (0.001, 10, 1), (0.25, 10, 3)]
)
def test_the_tail_is_the_fraction_of_the_run_rounded_up(fraction, total, length):
    profile = polyak.Profile.of(polyak.TailAveraging(fraction=fraction, total_steps=total), total)
    np.testing.assert_allclose(profile.shares, [0.0] * (total - length) + [1 / length] * length, rtol=1e-13)


def test_past_the_end_a_tail_goes_on_as_the_mean_since_it_began():
    profile = polyak.Profile.of(polyak.TailAveraging(fraction=0.4, total_steps=10), 20)
    np.testing.assert_allclose(profile.shares, [0.0] * 6 + [1 / 14] * 14, rtol=1e-13)


@pytest.mark.parametrize("strategy", [polyak.TailAveraging(fraction=0.5, total_steps=30), polyak.BlockMean(length=30)])
def test_a_mean_that_begins_late_is_that_of_the_steps_since(strategy):
    shares = fed(strategy, 30, start=25)
    np.testing.assert_allclose(shares, [0.0] * 25 + [1 / 6] * 6, rtol=1e-13)


@pytest.mark.parametrize(("fraction", "elsewhere"), [(0.5, 0.21), (0.25, 0.26), (0.1, 0.28), (1.0, 0.0)])
def test_the_anytime_tail_has_the_mean_age_of_the_tail_and_the_distance_that_is_documented(fraction, elsewhere):
    exact = polyak.Profile.of(polyak.TailAveraging(fraction=fraction, total_steps=10_000), 10_000)
    anytime = polyak.Profile.of(polyak.TailAveraging(fraction=fraction), 10_000)
    assert anytime.distance(exact) == pytest.approx(elsewhere, abs=0.005)
    assert anytime.mean_age == pytest.approx(exact.mean_age, abs=0.5)


@pytest.mark.parametrize("every", [1, 2, 5])
def test_at_its_last_step_a_block_is_the_mean_of_the_block_and_of_nothing_else(every):
    for blocks in (1, 2, 3):
        profile = polyak.Profile.of(polyak.BlockMean(length=10), blocks * 10 // every, every=every)
        wanted = [0.0] * ((blocks - 1) * 10 // every) + [every / 10] * (10 // every)
        np.testing.assert_allclose(profile.shares, wanted, rtol=1e-14)


TRIED = [
    pytest.param(name, strategy, id=f"{name}-{i}")
    for i, (name, settings) in enumerate(strategies_to_try())
    if registry().resolve(name).elementwise
    for strategy in [registry().resolve(name)(**{k: v for k, v in settings.items() if k != "origin"})]
]


@pytest.mark.parametrize(("name", "strategy"), TRIED)
@pytest.mark.parametrize("every", [1, 3, 10])
def test_all_rates_at_once_are_those_one_by_one(name, strategy, every):
    regular = Updates.regular(2000, every=every, first=every)
    left_out = regular._replace(steps=np.delete(regular.steps, [7, 300, 301]))
    for updates in (regular, left_out, left_out._replace(counted=False)):
        single = [checked_rate(strategy, clock) for clock in updates.clocks()]
        np.testing.assert_allclose(rates_of(strategy, updates), single, rtol=0, atol=1e-14)


def test_every_built_in_strategy_can_give_all_rates_at_once():
    assert [cls for cls in BUILT_IN if not cls.elementwise] == []
