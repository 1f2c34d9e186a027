"""Strategies and functions of the package refuse wrong values with errors of polyak."""

from __future__ import annotations

import math
from typing import Literal

import pytest
import torch
from pydantic import BaseModel, ValidationError

import polyak
from models import ZOO, mlp
from polyak.registry.hookspecs import hookimpl
from refusals import refused, used

# Rates


class Odd(polyak.Strategy):
    name: Literal["odd"] = "odd"

    def rate(self, clock):
        return 0.5


BAD_RATES = [-0.1, 1.0000001, float("nan"), float("inf"), -float("inf"), None, "0.5", 0.5j, torch.tensor(0.5), [0.5]]


@pytest.mark.parametrize("rate", BAD_RATES, ids=repr)
@pytest.mark.parametrize("kind", ["mlp", "conv"])
def test_a_rate_outside_of_its_range_is_refused(rate, kind):
    class Wrong(Odd):
        def rate(self, clock):
            return rate if clock.n > 2 else 0.5

    averager = used(ZOO[kind].build(), Wrong())
    with refused(averager, polyak.RateError, "Wrong", repr(rate), "[0, 1]", "Nothing was averaged"):
        averager.update()


def test_a_rate_that_cannot_be_computed_leaves_everything_as_it_was():
    class Failing(Odd):
        def rate(self, clock):
            return 1.0 / (clock.n - 3)

    averager = used(mlp(), Failing(), steps=0)
    with refused(averager, polyak.RateError, "-0.5"):
        averager.update()


@pytest.mark.parametrize("weight", [float("nan"), float("inf"), -1.0], ids=repr)
def test_a_weight_that_is_no_mass_is_refused(weight):
    class Weighing(polyak.Strategy):
        name: Literal["weighing"] = "weighing"

        def weight(self, clock):
            return weight if clock.n > 2 else 1.0

        def rate(self, clock):
            return 0.5

    averager = used(mlp(), Weighing())
    with refused(averager, polyak.RateError, "weight"):
        averager.update()


def test_a_strategy_that_raises_leaves_everything_as_it_was():
    class Raising(Odd):
        def rate(self, clock):
            if clock.n > 2:
                raise OSError(clock)
            return 0.5

    averager = used(mlp(), Raising())
    with refused(averager, OSError, "Clock(n=3"):
        averager.update()


def test_a_plugin_with_a_wrong_offer_is_refused():
    from polyak.registry import Registry

    class Offers:
        @hookimpl
        def polyak_strategies(self):
            return [int]

    with pytest.raises(polyak.PluginError, match=r"<class 'int'>.*polyak\.Strategy"):
        Registry([], strict=False, disabled=frozenset()).register(Offers(), "mine")


# Every error of polyak's is a PolyakError, and the builtin that it is


class Nameless(polyak.Strategy):
    def rate(self, clock):
        return 0.5


def _assign(target, name):
    setattr(target, name, 1)


DIRECT = [
    (lambda: polyak.EMA(decay=2), ValueError, ["EMA() cannot be used", "decay", "less than 1", "2"]),
    (lambda: polyak.EMA(decay="0.999"), ValueError, ["decay", "valid number", "'0.999'"]),
    (lambda: polyak.EMA(0.999), TypeError, ["by name only", "0.999", "decay=..."]),
    (lambda: polyak.AveragerConfig({"every": 3}), TypeError, ["by name only", "{'every': 3}"]),
    (lambda: polyak.AveragerConfig(every=0), ValueError, ["every", "greater than 0", "0"]),
    (lambda: polyak.AveragerConfig(strategy="emma"), KeyError, ["'emma'", "Did you mean 'ema'"]),
    (lambda: polyak.BlockMean(), ValueError, ["length", "must be given"]),
    (Nameless, ValueError, ["Nameless()", "name: Literal['my_name'] = 'my_name'"]),
    (lambda: polyak.average(mlp(), Nameless), ValueError, ["Nameless()", "Literal"]),
    (polyak.Strategy, TypeError, ["abstract", "rate()"]),
    (lambda: _assign(polyak.EMA(), "decay"), AttributeError, ["EMA.decay is frozen", "EMA(decay=...)"]),
    (lambda: _assign(polyak.AveragerConfig(), "every"), AttributeError, ["AveragerConfig.every is frozen"]),
    (lambda: _assign(polyak.SWA(), "decay"), AttributeError, ["SWA has no setting 'decay'"]),
    (lambda: delattr(polyak.EMA(), "decay"), AttributeError, ["EMA.decay is frozen"]),
    (lambda: _assign(polyak.average(mlp()), "decay"), AttributeError, ["'decay' cannot be set", "configure"]),
    (
        lambda: _assign(polyak.bank(mlp(), {"a": "ema"}), "decay"),
        AttributeError,
        ["'decay' cannot be set", "configure"],
    ),
    (lambda: polyak.bank(mlp(), {"a": "ema"})["b"], KeyError, ["no average 'b'", "it has 'a'"]),
]


@pytest.mark.parametrize(("call", "builtin", "words"), DIRECT, ids=[", ".join(words[:2]) for *_, words in DIRECT])
def test_what_a_strategy_or_a_config_refuses_is_an_error_of_polyak(call, builtin, words):
    with pytest.raises(polyak.PolyakError) as caught:
        call()
    assert isinstance(caught.value, builtin)
    for word in words:
        assert word in str(caught.value)


def test_inside_a_model_of_the_users_own_pydantic_collects_all_errors_with_their_locations():
    class Train(BaseModel):
        lr: float = 0.1
        ema: polyak.AveragerConfig = polyak.AveragerConfig()
        short: polyak.EMA = polyak.EMA(decay=0.9)

    wrong = {"lr": "x", "ema": {"every": 0, "strategy": {"name": "ema", "decay": 3}}, "short": {"decay": True}}
    with pytest.raises(ValidationError) as caught:
        Train(**wrong)
    places = [error["loc"] for error in caught.value.errors()]
    assert places == [("lr",), ("ema", "every"), ("ema", "strategy", "decay"), ("short", "decay")]
    assert Train(ema={"strategy": "swa"}).ema.strategy == polyak.SWA()


PROFILES = [
    (lambda: polyak.Profile.of(polyak.BlockMean, 3), ValueError, ["length"]),
    (lambda: polyak.Profile.of("ema", 3), TypeError, ["'ema'", "AveragerConfig(strategy='ema').profile(step)"]),
    (lambda: polyak.Profile.of(polyak.EMA(), -3), ValueError, ["n: got -3", "from 0"]),
    (lambda: polyak.Profile.of(polyak.EMA(), 2.5), ValueError, ["n: got 2.5", "an integer"]),
    (lambda: polyak.Profile.of(polyak.EMA(), 10**15), ValueError, ["n: got 10000", "100,000,000"]),
    (lambda: polyak.Profile.of(polyak.EMA(), 3, every=0), ValueError, ["every: got 0", "from 1"]),
    (lambda: polyak.Profile.of(polyak.EMA(), 3, start=0.75), ValueError, ["start: got 0.75"]),
    (lambda: polyak.Profile.of(polyak.EMA(), 3, origin="last"), ValueError, ["'last'", "'initial', 'first'"]),
    (lambda: polyak.Profile.from_rates([math.nan]), ValueError, ["finite numbers"]),
    (lambda: polyak.Profile.from_rates(["a"]), ValueError, ["finite numbers", "['a']"]),
    (lambda: polyak.Profile.from_rates([0.5, 0.5], [1]), ValueError, ["2 shares and 1 steps"]),
    (
        lambda: polyak.Profile.from_rates([0.5, 0.5], ["a", "b"]),
        ValueError,
        ["steps: got ['a', 'b']"],
    ),
    (lambda: polyak.Profile.from_rates([0.5], [1.5]), ValueError, ["steps: got [1.5]"]),
    (lambda: polyak.Profile.from_rates([0.5], [True]), ValueError, ["steps: got [True]"]),
    (lambda: polyak.Profile.from_rates([0.5], [-1]), ValueError, ["steps: got [-1]"]),
    (lambda: polyak.Profile.from_rates([0.5], [2**63]), ValueError, ["steps: got [9223372036854775808]"]),
    (
        lambda: polyak.Profile.from_rates([0.5, 0.5], [2, 2]),
        ValueError,
        ["steps: got [2, 2]", "larger than"],
    ),
    (lambda: polyak.Profile.from_rates([0.5, 0.5], 3), ValueError, ["steps: got 3"]),
    (lambda: polyak.Profile.of(polyak.EMA(), 3, lr="x"), ValueError, ["lr: got 'x'"]),
    (lambda: polyak.Profile.of(polyak.EMA(), 3, lr=math.nan), ValueError, ["lr: got nan"]),
    (lambda: polyak.Profile.of(polyak.EMA(), 3).distance("swa"), TypeError, ["another profile", "'swa'"]),
    (lambda: polyak.AveragerConfig().profile("a"), TypeError, ["step: got 'a'"]),
    (lambda: polyak.AveragerConfig.of(None), TypeError, ["got None", "a mapping"]),
    (lambda: polyak.AveragerConfig.of(["ema"]), TypeError, ["got ['ema']", "a strategy, or a mapping"]),
    (lambda: polyak.AveragerConfig.from_file(None), TypeError, ["a config file is given as a path", "None"]),
    (lambda: polyak.strategies()["emma"], KeyError, ["'emma'", "Known: ema"]),
    (lambda: polyak.convert("ema", None, steps=100), TypeError, ["None as the family"]),
    (lambda: polyak.convert("ema", "power", steps="a"), TypeError, ["steps: got 'a'", "an integer"]),
    (lambda: polyak.recalibrate([], polyak.average(mlp())), TypeError, ["are the arguments swapped"]),
    (lambda: polyak.recalibrate(None, []), TypeError, ["None as the averager"]),
    (lambda: polyak.average(mlp(), "lawa", window=10**12), ValueError, ["window=1,000,000,000,000", "100,000"]),
    (lambda: polyak.average(mlp(), device=True), ValueError, ["device: got True"]),
    (lambda: polyak.average(mlp(), device=200), ValueError, ["device: got 200"]),
]


@pytest.mark.parametrize(("call", "builtin", "words"), PROFILES, ids=[words[0] for *_, words in PROFILES])
def test_what_a_function_refuses_is_an_error_of_polyak(call, builtin, words):
    with pytest.raises(polyak.PolyakError) as caught:
        call()
    assert isinstance(caught.value, builtin)
    for word in words:
        assert word in str(caught.value)


def test_a_profile_takes_a_class_whose_settings_have_defaults():
    assert polyak.Profile.of(polyak.SWA, 4).shares.tolist() == [0.25] * 4
