"""Which strategy is which: families meet, and the published figures come out."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, strategies as st

import polyak
from polyak.strategy.power import gamma_of, sigma_rel_of

from .feeding import fed


def shares(strategy, n=500, **options):
    return polyak.Profile.of(strategy, n, **options).shares


@pytest.mark.parametrize("every", [1, 2, 7, 100])
def test_polynomial_with_eta_0_is_swa_exactly(every):
    np.testing.assert_array_equal(shares(polyak.PolynomialAveraging(eta=0), every=every), shares(polyak.SWA()))
    np.testing.assert_array_equal(fed(polyak.PolynomialAveraging(eta=0), 70, every=7), fed(polyak.SWA(), 70, every=7))


@pytest.mark.parametrize("every", [1, 7])
def test_power_with_gamma_0_and_the_whole_tail_are_swa(every):
    for strategy in (
        polyak.PowerEMA(gamma=0),
        polyak.TailAveraging(fraction=1),
        polyak.TailAveraging(fraction=1, total_steps=500 * every),
        polyak.LAWA(window=500),
        polyak.BlockMean(length=500 * every),
    ):
        np.testing.assert_allclose(shares(strategy, every=every), shares(polyak.SWA()), rtol=1e-12)


def test_tensorflows_warm_up_is_polynomial_with_eta_8_two_steps_later():
    warm, polynomial = polyak.TFEMA(decay=math.nextafter(1, 0)), polyak.PolynomialAveraging(eta=8)
    for t in (1, 2, 10, 1000, 1_000_000):
        rate = polynomial.rate(polyak.Clock(n=t + 2, step=t + 2))
        assert warm.rate(polyak.Clock(n=t, step=t)) == pytest.approx(rate, abs=1e-15)


def test_inverse_gamma_with_power_1_is_uniform_until_its_cap():
    strategy = polyak.EMAV3(use_warmup=True, warmup_power=1, warmup_gamma=1, decay=0.999)
    np.testing.assert_allclose(shares(strategy), shares(polyak.SWA()), rtol=1e-12)
    assert strategy.rate(polyak.Clock(n=5000, step=5000)) == pytest.approx(0.001, rel=1e-12)


def test_mmengines_momentum_warm_up_is_polynomial_with_eta_99():
    strategy = polyak.PolynomialAveraging(eta=99)
    for t in (1, 10, 1000):
        assert strategy.rate(polyak.Clock(n=t, step=t)) == pytest.approx(100 / (100 + t - 1), rel=1e-15)


def test_an_anytime_tail_is_a_power_function():
    tail, power = polyak.TailAveraging(fraction=0.25), polyak.PowerEMA(gamma=6)
    np.testing.assert_array_equal(shares(tail), shares(power))


def test_the_whole_block_is_the_whole_tail():
    block, tail = polyak.BlockMean(length=50), polyak.TailAveraging(fraction=0.1, total_steps=500)
    np.testing.assert_allclose(shares(block), shares(tail), rtol=1e-13)


@pytest.mark.parametrize(
    ("sigma_rel", "gamma"),
    [(0.05, 16.9721986023), (0.10, 6.9372039376), (0.15, 3.5578687749), (0.20, 1.8262137799), (0.25, 0.7198239580)],
)
def test_a_relative_width_has_the_exponent_of_the_table(sigma_rel, gamma):
    assert gamma_of(sigma_rel) == pytest.approx(gamma, abs=1e-9)
    assert polyak.PowerEMA(sigma_rel=sigma_rel).exponent == gamma_of(sigma_rel)
    assert polyak.PowerEMA(gamma=gamma).width == pytest.approx(sigma_rel, abs=1e-10)


@pytest.mark.property
@given(gamma=st.floats(0, 1e6))
def test_width_and_exponent_are_inverse(gamma):
    assert gamma_of(sigma_rel_of(gamma)) == pytest.approx(gamma, rel=1e-9, abs=1e-12)


@pytest.mark.parametrize("sigma_rel", [0.02, 0.1, 0.25])
def test_the_relative_width_is_the_spread_of_the_profile(sigma_rel):
    profile = polyak.Profile.of(polyak.PowerEMA(sigma_rel=sigma_rel), 20_000)
    assert profile.spread / 20_000 == pytest.approx(sigma_rel, rel=1e-4)


def test_the_plain_mean_is_the_widest():
    assert sigma_rel_of(0) == pytest.approx(12**-0.5, rel=1e-15)


@pytest.mark.parametrize(
    ("strategy", "sigma_rel"),
    [
        (polyak.PolynomialAveraging(eta=8), 0.0905),
        (polyak.PolynomialAveraging(eta=99), 0.0098),
        (polyak.TFEMA(decay=math.nextafter(1, 0)), 0.0905),
        (polyak.PowerEMA(gamma=math.log(2) / 0.05 - 1), 0.0629),
        (polyak.PowerEMA(gamma=math.log(2) / 0.09 - 1), 0.1024),
    ],
    ids=["eta=8", "eta=99", "TensorFlow's warm-up", "half-life 0.05 t", "half-life 0.09 t"],
)
def test_the_relative_widths_of_other_families_are_those_published(strategy, sigma_rel):
    profile = polyak.Profile.of(strategy, 20_000)
    assert profile.spread / 20_000 == pytest.approx(sigma_rel, abs=6e-5)


def test_a_tail_is_the_plain_mean_from_its_first_step_on():
    tail = fed(polyak.TailAveraging(fraction=1 - 75 / 100, total_steps=100), 100)
    np.testing.assert_allclose(tail, fed(polyak.SWA(), 100, start=76), rtol=1e-13)


def test_a_half_life_is_the_ema_of_its_decay():
    for every in (1, 3):
        ema = shares(polyak.EMA(decay=2 ** (-1 / 50)), every=every)
        np.testing.assert_allclose(shares(polyak.HalfLifeEMA(halflife=50), every=every), ema, rtol=1e-11)


def test_stylegans_half_life_is_that_part_of_the_run_in_which_a_decay_halves():
    # beta = 0.5 ** (1 / (r * t)) at step t: the continuous decay ln(2) / (r * t) is that of t ** (gamma + 1).
    for r in (0.05, 0.09):
        power = polyak.PowerEMA(gamma=math.log(2) / r - 1)
        for t in (10_000, 1_000_000):
            theirs = 1 - 0.5 ** (1 / (r * t))
            assert power.rate(polyak.Clock(n=t, step=t)) == pytest.approx(theirs, rel=1 / t)


def test_polynomial_and_power_differ_by_rounding_to_whole_steps():
    gap = np.abs(shares(polyak.PolynomialAveraging(eta=6), 2000) - shares(polyak.PowerEMA(gamma=6), 2000)).sum()
    assert 1e-4 < gap <= 1.6e-3


@pytest.mark.parametrize("strategy", [polyak.PolynomialAveraging(eta=3), polyak.PowerEMA(gamma=3)])
def test_the_mean_age_of_a_power_is_a_fixed_part_of_the_run(strategy):
    for n in (1000, 10_000):
        assert polyak.Profile.of(strategy, n).mean_age / n == pytest.approx(1 / 5, abs=1e-3)


def test_the_window_of_equal_age_and_size_has_the_documented_decay():
    window = 51
    ema, lawa = polyak.EMA(decay=(window - 1) / (window + 1)), polyak.LAWA(window=window)
    of_ema, of_lawa = (polyak.Profile.of(strategy, 3000) for strategy in (ema, lawa))
    assert of_ema.mean_age == pytest.approx(of_lawa.mean_age, rel=1e-9)
    assert of_ema.effective_size == pytest.approx(of_lawa.effective_size, rel=1e-9)
