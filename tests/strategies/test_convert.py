"""The nearest member of a family: found where it is known, and nearest where it is not."""

from __future__ import annotations

from typing import Literal

import numpy as np
import pytest
from hypothesis import example, given, settings, strategies as st

import polyak
from polyak import Profile, convert

STEPS = 2000
FAMILIES = {name: cls for name, cls in polyak.strategies().items() if cls.with_mean_age(1.0, 100) is not None}
MEMBERS = [
    polyak.EMA(decay=0.99),
    polyak.DebiasedEMA(decay=0.999),
    polyak.HalfLifeEMA(halflife=50),
    polyak.TFEMA(decay=0.98),
    polyak.PolynomialAveraging(eta=6.5),
    polyak.PowerEMA(sigma_rel=0.12),
    polyak.TailAveraging(fraction=0.2, total_steps=STEPS),
    polyak.LAWA(window=37),
    polyak.DoubleEMA(decay=0.97),
]


def test_the_families_are_those_with_one_parameter():
    assert {"swa", "block_mean", "byol", "lr_weighted"} == polyak.strategies().keys() - FAMILIES.keys()


@pytest.mark.parametrize("member", MEMBERS, ids=lambda member: member.name)
def test_a_member_of_the_family_finds_itself(member):
    found = convert(member, type(member), steps=STEPS)
    assert found.distance < 1e-6
    assert type(found.strategy) is type(member)
    np.testing.assert_allclose(found.profile.shares, found.wanted.shares, rtol=1e-4, atol=1e-9)


@pytest.mark.parametrize("decay", [0.0, 0.5, 0.99, 0.9999, 0.999999])
@pytest.mark.parametrize("every", [1, 10])
def test_an_ema_finds_its_own_decay(decay, every):
    found = convert(polyak.EMA(decay=decay), "ema", steps=10_000, every=every)
    assert 1 - found.strategy.decay == pytest.approx(1 - decay, rel=1e-6)
    assert found.distance < 1e-6


@pytest.mark.property
@settings(max_examples=25)
@example(window=2642, every=1)
@example(window=2999, every=7)
@given(window=st.integers(1, 3000), every=st.sampled_from([1, 7]))
def test_a_window_is_found_to_the_snapshot(window, every):
    steps = 3000 * every
    found = convert(polyak.LAWA(window=window), "lawa", steps=steps, every=every)
    assert found.strategy.window == window
    assert found.distance < 1e-12


@pytest.mark.parametrize("source", MEMBERS, ids=lambda member: member.name)
@pytest.mark.parametrize("to", FAMILIES)
def test_no_other_mean_age_comes_nearer(source, to):
    found = convert(source, to, steps=STEPS)
    wanted = Profile.of(source, STEPS)
    ages = np.geomspace(0.02, 20 * STEPS, 150).tolist()
    others = {FAMILIES[to].with_mean_age(age, STEPS) for age in ages}
    assert found.distance <= min(wanted.distance(Profile.of(member, STEPS)) for member in others) + 1e-12
    assert found.distance == wanted.distance(Profile.of(found.strategy, STEPS))
    np.testing.assert_array_equal(found.wanted.shares, wanted.shares)


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("age", [0.5, 3.0, 100.0, 400.0])
def test_a_member_has_about_the_mean_age_that_it_was_made_for(name, age):
    member = FAMILIES[name].with_mean_age(age, 20_000)
    # The mean age of a double EMA is 0: it is told apart by that of its first average.
    profile = Profile.of(polyak.EMA(decay=member.decay) if name == "dema" else member, 20_000)
    assert profile.mean_age == pytest.approx(age, rel=0.01, abs=0.1)


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("age", [0.0, 1e-12, 1e6, 1e30])
def test_a_mean_age_beyond_the_family_gives_its_end(name, age):
    for steps in (1, 100):
        profile = Profile.of(FAMILIES[name].with_mean_age(age, steps), steps)
        assert profile.start + profile.shares.sum() == pytest.approx(1, abs=1e-12)


def test_a_decay_has_the_relative_width_that_the_documentation_says_and_back():
    there = convert("ema", "power", steps=10_000)
    assert there.strategy.sigma_rel == pytest.approx(0.0852, abs=5e-5)
    assert there.distance == pytest.approx(0.0245, abs=5e-4)
    back = convert(there.strategy, "ema", steps=10_000)
    assert back.strategy.decay == pytest.approx(0.999, abs=5e-5)


def test_the_mean_of_everything_is_a_member_of_several_families():
    for family in ("power", "polynomial", "tail", "lawa"):
        assert convert(polyak.SWA(), family, steps=500).distance < 1e-12


def test_the_other_cadence_is_that_of_what_is_looked_for():
    found = convert(polyak.LAWA(window=100), "lawa", steps=1000, to_every=10)
    assert found.strategy.window == 10
    assert len(found.profile) == 100
    assert len(found.wanted) == 1000
    assert found.distance < 1e-12


def test_names_mappings_and_objects_are_taken():
    wanted = convert(polyak.EMA(decay=0.9), polyak.LAWA, steps=100)
    assert convert({"name": "ema", "decay": 0.9}, "lawa", steps=100).strategy == wanted.strategy
    assert convert("swa", "polyak:power", steps=100).strategy == polyak.PowerEMA(gamma=0)


def test_what_is_no_family_is_answered_with_the_families():
    known = "ema, ema_debiased, ema_v1, ema_v2, ema_v3, ema_halflife, ema_tf, polynomial, power, tail, lawa, dema,"
    for to in ("swa", polyak.SWA, "block_mean"):
        with pytest.raises(polyak.ConfigError, match=f"is no family with one parameter, .* one of {known}"):
            convert("ema", to, steps=100)


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"steps": 0}, "steps: got 0; expected an integer from 1"),
        ({"steps": 5, "every": 10}, "there is no update in steps=5"),
        ({"steps": 100, "every": 0}, "every: got 0; expected an integer from 1"),
        ({"steps": -1}, "steps: got -1"),
    ],
)
def test_a_run_without_updates_is_refused(wrong, said):
    with pytest.raises(polyak.ConfigError, match=said):
        convert("ema", "power", **wrong)


def test_an_unknown_name_is_refused_as_everywhere():
    with pytest.raises(polyak.UnknownStrategyError, match="no strategy is called 'emma'"):
        convert("emma", "power", steps=10)
    with pytest.raises(polyak.UnknownStrategyError, match=r"no strategy is called 'powder'\. Did you mean 'power'"):
        convert("ema", "powder", steps=10)


class Fickle(polyak.Strategy):
    name: Literal["fickle"] = "fickle"

    def rate(self, clock):
        return 0.5

    @classmethod
    def with_mean_age(cls, age, steps):
        return cls() if age == 1.0 else None


def test_a_family_that_has_no_member_for_an_age_is_told_so():
    with pytest.raises(polyak.ConfigError, match=r"Fickle\.with_mean_age\(0\.0.*returned None"):
        convert("ema", Fickle, steps=10)
