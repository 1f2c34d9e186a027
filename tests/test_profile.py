"""Profiles: moments by closed forms, distances, equality with averagers that really ran, and no loop over steps."""

from __future__ import annotations

import math
import sys

import numpy as np
import pytest
import torch
from hypothesis import given, strategies as st

import polyak
from oracle import strategies_to_try
from polyak import EMA, LAWA, SWA, DoubleEMA, HalfLifeEMA, Profile

LONG = 20_000
_CADENCE = {"every", "start", "origin"}
DECAYS = [0.5, 0.9, 0.99, 0.999]
CADENCES = [{}, {"every": 5}, {"start": 7, "every": 3}, {"start": 4}, {"origin": "first"}, {"origin": "initial"}]
BUILT_IN = [
    pytest.param(name, settings, id=f"{name}-{i}")
    for i, (name, settings) in enumerate(strategies_to_try())
    if polyak.strategies()[name].__module__.startswith("polyak.")
]


def _strategy(name, settings):
    own = {key: value for key, value in settings.items() if key not in _CADENCE}
    return polyak.AveragerConfig(strategy={"name": name, **own}).strategy


@pytest.mark.parametrize("decay", DECAYS)
def test_the_moments_of_an_ema_are_those_of_a_geometric_distribution(decay):
    profile = Profile.of(EMA(decay=decay), LONG)
    half_life = math.log(0.5) / math.log(decay)
    assert half_life - 1e-9 <= profile.half_life < half_life + 1  # a whole number of steps
    assert profile.mean_age == pytest.approx(decay / (1 - decay), rel=1e-6)
    assert profile.spread == pytest.approx(math.sqrt(decay) / (1 - decay), rel=1e-5)
    assert profile.effective_size == pytest.approx((1 + decay) / (1 - decay), rel=1e-9)
    assert profile.start == pytest.approx(decay**LONG, abs=1e-12)


@pytest.mark.parametrize("n", [1, 2, 101, 1000])
def test_the_moments_of_a_plain_mean_are_those_of_a_uniform_distribution(n):
    profile = Profile.of(SWA(), n)
    assert profile.half_life == math.ceil(n / 2)
    assert profile.mean_age == pytest.approx((n - 1) / 2)
    assert profile.spread == pytest.approx(math.sqrt((n**2 - 1) / 12))
    assert profile.effective_size == pytest.approx(n)
    assert profile.start == 0.0


@pytest.mark.parametrize("every", [1, 10, 37])
def test_a_cadence_keeps_the_half_life_of_a_decay_to_within_one_update(every):
    profile = Profile.of(EMA(decay=0.9999), 100_000 // every, every=every)
    exact = math.log(0.5) / math.log(0.9999)
    assert exact - 1e-9 <= profile.half_life < exact + every
    assert profile.mean_age == pytest.approx(every * 0.9999**every / (1 - 0.9999**every), rel=1e-2)


@pytest.mark.parametrize("decay", [0.9, 0.97])
def test_a_window_with_the_effective_size_of_an_ema_has_its_mean_age(decay):
    size = (1 + decay) / (1 - decay)
    window = Profile.of(LAWA(window=round(size)), LONG)
    ema = Profile.of(EMA(decay=decay), LONG)
    assert window.mean_age == pytest.approx(ema.mean_age, abs=0.5)
    assert window.effective_size == pytest.approx(ema.effective_size, rel=0.02)


def test_an_average_that_is_mostly_its_start_has_no_half_life():
    assert Profile.of(EMA(decay=0.99), 10).half_life == math.inf
    assert Profile.of(EMA(decay=0.99), 0).half_life == math.inf


def test_the_start_counts_as_one_more_weight_in_the_effective_size():
    start = 0.5**3
    shares = [0.5 * 0.5**i for i in range(3)]
    assert Profile.of(EMA(decay=0.5), 3).effective_size == pytest.approx(1 / (start**2 + sum(x * x for x in shares)))
    assert Profile.of(EMA(decay=0.5), 0).effective_size == 1.0


def test_the_half_life_of_shares_that_are_partly_negative_is_the_first_age_at_which_half_is_reached():
    shares = np.array([0.3, 0.2, -0.4, 0.2, 0.5, 0.2])
    profile = Profile(shares, np.arange(1, 7))
    assert profile.half_life == 2.0
    later = Profile(np.array([0.6, 0.3, -0.3, 0.4]), np.arange(1, 5))  # .4, .1, .4, 1
    assert later.half_life == 4.0


def test_the_half_life_of_updates_at_uneven_distances_reaches_to_the_beginning_of_the_stride():
    profile = Profile(np.array([0.0, 0.8, 0.2]), np.array([10, 100, 110]), stride=10)
    assert profile.half_life == 100.0  # the share of step 100 stands for the steps 11 … 100


def test_an_average_without_lag_has_the_mean_age_zero():
    profile = Profile.of(DoubleEMA(decay=0.95), 2000)
    assert profile.mean_age == pytest.approx(0.0, abs=1e-9)
    assert profile.shares.min() < 0
    assert profile.start + profile.shares.sum() == pytest.approx(1.0, abs=1e-12)


@pytest.mark.parametrize(("name", "settings"), BUILT_IN)
@pytest.mark.parametrize("cadence", CADENCES, ids=str)
def test_a_profile_is_that_of_an_averager_that_really_ran(name, settings, cadence):
    weights = torch.zeros(1)
    given = {**settings, **cadence}
    averager = polyak.average({"w": weights}, name, **given)
    for _ in range(40):
        averager.update()
    of = {"every": 1, "start": 0, "origin": None} | {k: v for k, v in given.items() if k in _CADENCE}
    expected = Profile.of(averager.strategy, averager.n, **of)
    profile = averager.profile()
    assert averager.n
    np.testing.assert_allclose(expected.shares, profile.shares, rtol=1e-12, atol=1e-15)
    np.testing.assert_array_equal(expected.steps, profile.steps)
    assert expected.start == pytest.approx(profile.start, abs=1e-15)
    assert expected.distance(profile) < 1e-13
    config = polyak.AveragerConfig(strategy=averager.strategy, **of)
    assert config.profile(40).distance(profile) < 1e-13


@pytest.mark.parametrize(("name", "settings"), BUILT_IN)
@pytest.mark.parametrize("every", [1, 7])
def test_the_shares_by_age_are_all_of_the_average_but_the_start(name, settings, every):
    strategy = polyak.AveragerConfig(
        strategy={"name": name, **{k: v for k, v in settings.items() if k != "origin"}}
    ).strategy
    profile = Profile.of(strategy, 60, every=every)
    assert len(profile.by_age) == 60 * every
    assert profile.by_age.sum() == pytest.approx(1.0 - profile.start, abs=1e-12)
    np.testing.assert_allclose(profile.by_age.reshape(60, every).sum(axis=1)[::-1], profile.shares, atol=1e-15)


def test_a_stride_of_the_first_update_is_that_of_the_second_where_it_is_not_given():
    assert len(Profile(np.array([0.5, 0.5]), np.array([10, 20])).by_age) == 20
    assert len(Profile(np.array([0.5, 0.5]), np.array([10, 20]), stride=3).by_age) == 13
    assert len(Profile(np.array([1.0]), np.array([10])).by_age) == 1


def test_samples_as_steps_cost_no_more_than_steps():
    step = 2**40
    sparse, dense = (Profile.of(HalfLifeEMA(halflife=every), 40, every=every) for every in (step, 1))
    np.testing.assert_allclose(sparse.shares, dense.shares, rtol=0, atol=1e-12)
    assert sparse.steps.tolist() == (step * dense.steps).tolist()
    other = [Profile.of(SWA(), 20, every=every) for every in (step, 1)]
    assert sparse.distance(other[0]) == pytest.approx(dense.distance(other[1]), abs=1e-12)
    assert sparse.half_life == step * dense.half_life
    with pytest.raises(polyak.ConfigError, match="use shares and steps"):
        sparse.by_age  # noqa: B018 - a property


def test_updates_beyond_the_largest_step_are_refused():
    with pytest.raises(polyak.ConfigError, match="expected at most 9223372036854775807"):
        Profile.of(SWA(), 10, every=2**62)


profiles = st.one_of(
    st.builds(
        lambda decay, n, every, origin: Profile.of(EMA(decay=decay), n, every=every, origin=origin),
        st.floats(0, 0.999), st.integers(0, 60), st.integers(1, 4), st.sampled_from(["initial", "first"]),
    ),
    st.builds(lambda n, every: Profile.of(SWA(), n, every=every), st.integers(1, 60), st.integers(1, 4)),
    st.builds(lambda w, n: Profile.of(LAWA(window=w), n), st.integers(1, 70), st.integers(1, 60)),
)  # fmt: skip


@pytest.mark.property
@given(one=profiles, two=profiles, three=profiles)
def test_a_distance_is_a_metric_between_zero_and_one(one, two, three):
    assert one.distance(one) == 0.0
    assert one.distance(two) == two.distance(one)
    assert 0.0 <= one.distance(two) <= 1.0 + 1e-12
    assert one.distance(three) <= one.distance(two) + two.distance(three) + 1e-12


@pytest.mark.parametrize(("short", "long"), [(50, 100), (10, 1000)])
def test_the_distance_of_two_plain_means_is_the_part_they_do_not_share(short, long):
    assert Profile.of(SWA(), short).distance(Profile.of(SWA(), long)) == pytest.approx(1 - short / long)


def test_the_distance_of_disjoint_averages_is_one():
    old, new = Profile(np.array([1.0, 0.0]), np.array([1, 2])), Profile(np.array([0.0, 1.0]), np.array([1, 2]))
    assert old.distance(new) == 1.0
    nothing = Profile(np.empty(0), np.empty(0, np.int64), start=1.0)
    assert nothing.distance(new) == 1.0


@pytest.mark.parametrize(("name", "settings"), BUILT_IN)
def test_a_million_updates_are_not_a_loop_in_python(name, settings):
    strategy = polyak.AveragerConfig(
        strategy={"name": name, **{k: v for k, v in settings.items() if k != "origin"}}
    ).strategy
    made = []

    def once(n):
        calls = 0

        def count(frame, event, arg):
            nonlocal calls
            calls += event in {"call", "c_call"}

        sys.setprofile(count)
        try:
            made.append(Profile.of(strategy, n, every=2))
            made[-1].half_life, made[-1].spread, made[-1].effective_size
        finally:
            sys.setprofile(None)
        return calls

    once(10)  # whatever is imported or cached at the first time
    assert once(1_000_000) <= once(100) + 10
    assert len(made[1]) == 1_000_000
    assert made[1].start + made[1].shares.sum() == pytest.approx(1.0, abs=1e-9)


def test_shares_and_steps_of_different_lengths_are_refused():
    with pytest.raises(ValueError, match="got 2 shares and 3 steps"):
        Profile(np.zeros(2), np.arange(3))


def test_a_profile_draws_itself_as_one_line_that_falls_with_age():
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    ax = Profile.of(EMA(decay=0.99), 1000).plot(label="an EMA")
    (line,) = ax.lines
    assert line.get_label() == "an EMA"
    heights = np.asarray(line.get_ydata(), float)
    assert len(heights) > 10
    assert (np.diff(heights[np.isfinite(heights)]) <= 1e-12).all()
    assert Profile.of(SWA(), 100).plot(ax, label="a mean") is ax
    assert len(ax.lines) == 2
    plt.close("all")
