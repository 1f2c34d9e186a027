"""Settings that cannot be are refused with what is allowed."""

from __future__ import annotations

import math

import pytest

import polyak

WRONG = [
    (polyak.TFEMA, {"decay": 1.0}, "less than 1"),
    (polyak.TFEMA, {"follow": -1}, "greater than or equal to 0"),
    (polyak.PolynomialAveraging, {"eta": -0.1}, "greater than or equal to 0"),
    (polyak.PolynomialAveraging, {"eta": math.inf}, "finite number"),
    (polyak.PowerEMA, {"sigma_rel": 0}, "greater than 0"),
    (polyak.PowerEMA, {"sigma_rel": 12**-0.5}, "less than 0.288675"),
    (polyak.PowerEMA, {"gamma": -0.5}, "greater than or equal to 0"),
    (polyak.PowerEMA, {"gamma": 1, "sigma_rel": 0.1}, "by 'sigma_rel' or by 'gamma', not by both; got .*0.1.*1"),
    (polyak.TailAveraging, {"fraction": 0}, "greater than 0"),
    (polyak.TailAveraging, {"fraction": 1.01}, "less than or equal to 1"),
    (polyak.TailAveraging, {"total_steps": 0}, "greater than 0"),
    (polyak.LAWA, {"window": 0}, "greater than 0"),
    (polyak.LAWA, {"window": 2.5}, "valid integer"),
    (polyak.DoubleEMA, {"decay": 1.0}, "less than 1"),
    (polyak.BlockMean, {}, "has no default"),
    (polyak.BlockMean, {"length": 0}, "greater than 0"),
]


@pytest.mark.parametrize(("cls", "settings", "message"), WRONG, ids=lambda x: getattr(x, "__name__", str(x)))
def test_a_wrong_setting_is_refused_with_what_is_allowed(cls, settings, message):
    with pytest.raises(polyak.ConfigError, match=message):
        cls(**settings)


def test_power_is_given_by_one_of_its_two_settings_and_has_a_default():
    assert polyak.PowerEMA() == polyak.PowerEMA(sigma_rel=0.1) == polyak.PowerEMA(sigma_rel=None, gamma=None)
    assert polyak.PowerEMA(gamma=2.0).sigma_rel is None


@pytest.mark.parametrize("strategy", [polyak.PowerEMA(), polyak.PowerEMA(gamma=3), polyak.TailAveraging()])
@pytest.mark.parametrize("suffix", ["toml", "yaml", "json"])
def test_a_setting_that_is_none_survives_a_file(strategy, suffix, tmp_path):
    config = polyak.AveragerConfig(strategy=strategy)
    config.to_file(tmp_path / f"average.{suffix}")
    assert polyak.AveragerConfig.from_file(tmp_path / f"average.{suffix}") == config
