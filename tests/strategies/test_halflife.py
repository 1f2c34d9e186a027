"""A half-life means the same in every unit, at every cadence and with every size of a batch."""

from __future__ import annotations

import math
import re

import pytest
from hypothesis import given, strategies as st

import polyak
from polyak import HalfLifeEMA

UNITS = [
    ({"halflife": 300}, 300),
    ({"halflife": 76_800, "unit": "samples", "batch_size": 256}, 300),
    ({"halflife": 3e6, "unit": "tokens", "tokens_per_step": 10_000}, 300),
    ({"halflife": 1.5, "unit": "epochs", "steps_per_epoch": 200}, 300),
    ({"halflife": 0.1, "unit": "fraction", "total_steps": 3000}, 300),
]


@pytest.mark.parametrize(("settings", "steps"), UNITS, ids=lambda x: str(x))
def test_every_unit_comes_to_steps(settings, steps):
    strategy = HalfLifeEMA(**settings)
    assert strategy.in_steps == pytest.approx(steps, rel=1e-15)
    assert HalfLifeEMA.model_validate_json(strategy.model_dump_json()) == strategy


@pytest.mark.parametrize("every", [1, 3, 10])
def test_after_a_half_life_an_update_counts_half(every):
    profile = polyak.Profile.of(HalfLifeEMA(halflife=30), 100, every=every)
    assert profile.shares[-1 - 30 // every] / profile.shares[-1] == pytest.approx(0.5, rel=1e-12)


def test_the_half_life_of_a_decay_is_the_published_one():
    assert polyak.Profile.of(HalfLifeEMA(halflife=6931.125), 100_000).half_life == 6932
    strategy = HalfLifeEMA(halflife=math.log(0.5) / math.log(0.9999))
    assert strategy.in_steps == pytest.approx(6931.12, abs=0.01)
    assert strategy.rate(polyak.Clock(n=1, step=1)) == pytest.approx(1e-4, rel=1e-10)
    tenfold = polyak.EMAV1(decay=0.9999)  # a decay per update, ten steps apart: the half-life of 69 311 steps
    assert polyak.Profile.of(tenfold, 20_000, every=10).half_life == 69_320


@pytest.mark.property
@given(decay=st.floats(0.5, 0.99999), times=st.integers(1, 64), batch=st.integers(1, 4096))
def test_a_batch_several_times_as_large_has_the_decay_to_that_power(decay, times, batch):
    samples = batch * math.log(0.5) / math.log(decay)
    small, large = (HalfLifeEMA(halflife=samples, unit="samples", batch_size=b) for b in (batch, batch * times))
    clock = polyak.Clock(n=1, step=1)
    assert 1 - small.rate(clock) == pytest.approx(decay, rel=1e-12)
    assert 1 - large.rate(clock) == pytest.approx(decay**times, rel=1e-12, abs=1e-15)


def test_the_decay_of_a_batch_eight_times_as_large_is_the_published_one():
    strategy = HalfLifeEMA(halflife=math.log(0.5) / math.log(0.9999) * 32, unit="samples", batch_size=256)
    assert 1 - strategy.rate(polyak.Clock(n=1, step=1)) == pytest.approx(0.99920028, abs=5e-9)


WRONG = [
    ({}, r"halflife: it has no default"),
    ({"halflife": 0}, "greater than 0"),
    ({"halflife": math.inf}, "finite number"),
    ({"halflife": 1, "unit": "hours"}, "'steps', 'samples', 'tokens', 'epochs' or 'fraction'"),
    ({"halflife": 1, "batch_size": 8}, "unit='steps' needs none of batch_size, .* got batch_size"),
    (
        {"halflife": 1, "unit": "samples"},
        r"unit='samples' needs batch_size= \(and none of tokens.*\); got none",
    ),
    ({"halflife": 1, "unit": "samples", "batch_size": 0}, "greater than 0"),
    ({"halflife": 1, "unit": "tokens", "batch_size": 8}, "unit='tokens' needs tokens_per_step= .* got batch_size"),
    ({"halflife": 1, "unit": "epochs"}, "unit='epochs' needs steps_per_epoch="),
    (
        {"halflife": 1, "unit": "fraction", "total_steps": 9, "steps_per_epoch": 3},
        "unit='fraction' needs total_steps= .* got steps_per_epoch, total_steps",
    ),
]


@pytest.mark.parametrize(("settings", "message"), WRONG, ids=lambda x: str(x))
def test_a_wrong_setting_is_answered_with_what_the_unit_needs(settings, message):
    with pytest.raises(polyak.ConfigError, match=message):
        HalfLifeEMA(**settings)


def test_a_config_says_so_in_words():
    said = "strategy: unit='samples' needs batch_size= (and none of tokens_per_step, steps_per_epoch, total_steps); "
    with pytest.raises(polyak.ConfigError, match=re.escape(said)):
        polyak.AveragerConfig.of({"strategy": {"name": "ema_halflife", "halflife": 5, "unit": "samples"}})
