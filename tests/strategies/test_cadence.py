"""An update that stands for several steps counts what they would have counted one by one."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, strategies as st

import polyak

from .feeding import fed, summed

STRATEGIES = st.one_of(
    st.builds(polyak.PowerEMA, gamma=st.floats(0, 40)),
    st.builds(polyak.PowerEMA, sigma_rel=st.floats(0.005, 0.288)),
    st.builds(polyak.PolynomialAveraging, eta=st.floats(0, 40)),
    st.builds(polyak.HalfLifeEMA, halflife=st.floats(0.5, 5000)),
    st.builds(polyak.TFEMA, decay=st.floats(0, 0.9999), follow=st.integers(0, 30)),
    st.builds(polyak.TailAveraging, fraction=st.floats(0.01, 1)),
    st.builds(polyak.TailAveraging, fraction=st.floats(0.01, 1), total_steps=st.integers(1, 3000)),
)


@pytest.mark.property
@given(strategy=STRATEGIES, every=st.integers(1, 40), n=st.integers(1, 60))
def test_the_shares_of_every_k_are_those_of_its_steps_summed(strategy, every, n):
    one = polyak.Profile.of(strategy, n * every)
    spaced = polyak.Profile.of(strategy, n, every=every)
    wanted = summed(one.shares, every)
    if isinstance(strategy, polyak.TFEMA) and strategy.follow % every:
        # The steps that are followed end within a stride, all of which then counts.
        first = strategy.follow // every
        wanted, left = wanted[first + 1 :], 1 - wanted[first + 1 :].sum()
        np.testing.assert_allclose(spaced.shares[first + 1 :], wanted, rtol=0, atol=1e-12)
        if n > first:
            assert spaced.shares[first] == pytest.approx(left, abs=1e-12)
        return
    np.testing.assert_allclose(spaced.shares, wanted, rtol=0, atol=1e-12)
    assert spaced.start == pytest.approx(one.start, abs=1e-12)


@pytest.mark.property
@given(strategy=STRATEGIES, strides=st.lists(st.integers(1, 300), min_size=1, max_size=30))
def test_steps_that_jump_count_what_the_steps_between_would_have_counted(strategy, strides):
    if isinstance(strategy, polyak.TFEMA):
        strategy = polyak.TFEMA(decay=strategy.decay)
    ends = np.cumsum(strides)
    kept = 1.0
    rates = []
    for end, stride in zip(ends.tolist(), strides, strict=True):
        rates.append(strategy.rate(polyak.Clock(n=len(rates) + 1, step=end, stride=stride, elapsed=end)))
        kept *= 1 - rates[-1]
    one = polyak.Profile.of(strategy, int(ends[-1]))
    wanted = np.add.reduceat(one.shares, [0, *ends[:-1].tolist()])
    np.testing.assert_allclose(polyak.Profile.from_rates(rates).shares, wanted, rtol=0, atol=1e-12)
    assert kept == pytest.approx(one.start, abs=1e-12)


@pytest.mark.parametrize("every", [2, 10, 32])
@pytest.mark.parametrize("gamma", [0.0, 1.7, 16.97])
def test_an_averager_of_power_has_its_shares_at_any_cadence(gamma, every):
    total = 320
    shares = fed(polyak.PowerEMA(gamma=gamma), total, every=every)[every::every]
    ends = np.arange(every, total + 1, every) / total
    wanted = ends ** (gamma + 1) - (ends - every / total) ** (gamma + 1)
    np.testing.assert_allclose(shares, wanted, rtol=0, atol=1e-14)


def test_polynomial_stays_exact_after_a_million_steps():
    # A product of ten factors against the ratio of Gammas, where differences of lgamma have lost eight digits.
    strategy, end = polyak.PolynomialAveraging(eta=2.5), 1_000_000
    rate = strategy.rate(polyak.Clock(n=2, step=end, stride=10, elapsed=end))
    exact = 1 - np.prod([(t - 1) / (t + 2.5) for t in range(end - 9, end + 1)])
    assert rate == pytest.approx(exact, rel=1e-9)
    assert rate == pytest.approx(35 / end, rel=1e-4)
