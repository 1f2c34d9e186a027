"""What plugin authors test with: sound strategies pass, and a broken one is told which law it breaks."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import ClassVar, Generic, Literal, TypeVar

import pytest
import torch
from pydantic import BaseModel, ConfigDict, PrivateAttr, field_serializer

import polyak
from polyak.kernels import select as kernels
from polyak.kernels.eager import chunked
from polyak.testing import check_strategies, check_strategy, learning_rate


class Sound(polyak.Strategy):
    name: Literal["sound"] = "sound"
    decay: float = 0.9

    def rate(self, clock: polyak.Clock) -> float:
        return 1 - self.decay**clock.stride


class Excessive(Sound):
    def rate(self, clock):
        return 1.5 if clock.n == 7 else 0.5


class Negative(Sound):
    def rate(self, clock):
        return -1e-9 if clock.stride == 7 else 0.5


class NotANumber(Sound):
    def rate(self, clock):
        return float("nan") if clock.step == 1999 else 0.5


class ATensor(Sound):
    def rate(self, clock):
        return torch.tensor(0.5)


class Nothing(Sound):
    def rate(self, clock):
        pass


class DividesByTheStep(Sound):
    def rate(self, clock):
        return 1 / clock.step


class NeedsALearningRate(Sound):
    def rate(self, clock):
        return 1 - clock.lr


class AsksForALearningRate(Sound):
    def rate(self, clock):
        if clock.lr is None:
            message = "give lr="
            raise polyak.RateError(message)
        return 1 - clock.lr


class NegativeWeight(Sound):
    def weight(self, clock):
        return 1.0 - clock.n


class Counts(Sound):
    calls: ClassVar[Iterator[int]] = itertools.count(1)

    def rate(self, clock):
        return 1 / next(self.calls)


class RemembersOtherAveragers(Sound):
    built: ClassVar[list[str]] = []

    def engine(self):
        self.built.append("one more")
        return {}

    def rate(self, clock):
        return 1 / (1 + len(self.built))


class Secret(Sound):
    made: ClassVar[Iterator[int]] = itertools.count()
    _secret: float = PrivateAttr(default_factory=lambda: 0.1 + 0.8 * (next(Secret.made) * 0.618 % 1))  # never twice

    def rate(self, clock):
        return self._secret


class Mutable(Sound):
    model_config = ConfigDict(frozen=False)


class Part(BaseModel):
    value: float = 1.0


class MutablePart(Sound):
    part: Part = Part()


_T = TypeVar("_T")


class AnyPart(BaseModel, Generic[_T]):
    value: _T


FloatPart = AnyPart[float]


class MutableGenericPart(Sound):
    part: FloatPart = FloatPart(value=1.0)


class WithoutHash(Sound):
    def __hash__(self):
        return id(self)


class Lenient(Sound):
    model_config = ConfigDict(extra="ignore")


class Forgetful(Sound):
    @field_serializer("decay")
    def _rounded(self, decay: float) -> float:
        return round(decay)


class Unsupported(Sound):
    def engine(self):
        return {"origin": "last"}


BROKEN = [
    (Excessive(), r"law 1, rates and shares: rate\(\) returned 1\.5 at Clock\(n=7, .* finite number in \[0, 1\]"),
    (Negative(), r"law 1, .* returned -1e-09 at Clock\(n=1, step=7, stride=7"),
    (NotANumber(), r"law 1, .* returned nan at Clock\(n=1999"),
    (ATensor(), r"law 1, .* returned tensor\(0\.5000\)"),
    (Nothing(), r"law 1, .* returned None"),
    (DividesByTheStep(), r"law 1, .* raised ZeroDivisionError: .* at Clock\(n=1, step=0"),
    (NeedsALearningRate(), r"law 1, .* raised TypeError: .* lr=None.* raises polyak\.RateError"),
    (NegativeWeight(), r"law 1, .* weight\(\) returned -1\.0 at Clock\(n=2, .* in \[0, inf\]"),
    (Counts(), r"law 1, .* returned 1\.0 and then 0\.5 at one Clock"),
    (RemembersOtherAveragers(), r"law 1, one-hot weights give the profile: update \d+ has the share 0\.\d+ by"),
    (Secret(), r"law 8, .*: the last rate is 0\.\d+ after a resume and 0\.\d+ without"),
    (Mutable(), r"settings are frozen .* can be changed"),
    (MutablePart(), r"frozen .* MutablePart\.part holds an object of the class Part, .* ConfigDict\(frozen=True\)"),
    (MutableGenericPart(), r"frozen .* MutableGenericPart\.part .* AnyPart\[float\], which can be changed"),
    (WithoutHash(), r"a copy of WithoutHash\(.*\) is equal and has another hash"),
    (Lenient(), r"configs, .* a misspelt setting is accepted"),
    (Forgetful(), r"configs, .* JSON changes it: Forgetful\(.*decay=0\.9\) came back as Forgetful\(.*decay=1\.0\)"),
    (Unsupported(), r"law 1, one-hot .* raised ValidationError: .*\n.*origin"),
]  # fmt: skip


@pytest.mark.parametrize("strategy", [Sound, Sound(decay=0.5), AsksForALearningRate, "swa"], ids=str)
def test_a_sound_strategy_passes_as_class_instance_or_name(strategy):
    check_strategy(strategy)


@pytest.mark.parametrize(("strategy", "said"), BROKEN, ids=[type(s).__name__ for s, _ in BROKEN])
def test_a_broken_strategy_is_told_which_law_it_breaks_and_the_numbers(strategy, said):
    with pytest.raises(AssertionError, match=said):
        check_strategy(strategy)


def test_a_class_that_cannot_be_pickled_is_told_so():
    class Local(Sound):
        pass

    with pytest.raises(AssertionError, match=r"breaks 1 of the laws .*\n  pickle and deepcopy: raised .*Local"):
        check_strategy(Local)


def test_all_broken_laws_are_named_at_once():
    class Local(Lenient):
        pass

    with pytest.raises(AssertionError, match=r"breaks 2 of the laws(.*\n)+  configs, .*\n  pickle and deepcopy"):
        check_strategy(Local)


@pytest.mark.parametrize(("wrong", "found"), [("loop", "foreach"), ("foreach", "foreach"), ("fused", "auto")])
def test_a_kernel_that_disagrees_is_found(wrong, found, monkeypatch):
    if wrong == "fused" and not kernels.compiles("auto"):
        pytest.skip("there is no compiler here")
    bind = kernels.KERNELS[wrong]

    def bind_wrongly(lanes, weights):
        class Slow(type(bind(lanes, weights))):
            def __call__(self, rates, generators, done):
                super().__call__([rate * 0.999999 for rate in rates], generators, done)

        bound = bind(lanes, weights)
        bound.__class__ = Slow
        return bound

    monkeypatch.setitem(kernels.KERNELS, wrong, bind_wrongly)
    with pytest.raises(AssertionError, match=rf"law 4, kernels agree: with kernel='{found}', \S+ differs from"):
        check_strategy(Sound)


def test_averages_that_are_not_the_sum_or_drift_are_found(monkeypatch):
    def scaled(pairs, rate, generators):
        for average, weight in pairs:
            average.mul_(1 - rate).add_(weight, alpha=rate * (1 + 1e-5))

    for kernel in ("loop", "foreach", "fused"):
        binder = lambda lanes, weights: chunked.Chunked("scaled", scaled, lanes[0], weights)
        monkeypatch.setitem(kernels.KERNELS, kernel, binder)
    with pytest.raises(AssertionError) as caught:
        check_strategy(Sound)
    assert "law 1, one-hot weights give the profile: update" in str(caught.value)
    assert "laws 2 and 5, the average is sum(share * weights), tied tensors once:" in str(caught.value)
    assert "law 3, constant weights are a fixed point: after updates with constant weights" in str(caught.value)


def test_settings_go_with_a_class_or_a_name_and_not_with_an_instance():
    check_strategy(Sound, decay=0.99)
    check_strategy("ema", decay=0.99)
    check_strategy({"name": "ema", "decay": 0.99})
    with pytest.raises(polyak.ConfigError, match=r"'decay' came with the object Sound\("):
        check_strategy(Sound(), decay=0.99)
    with pytest.raises(polyak.ArgumentError, match="got 3"):
        check_strategy(3)
    with pytest.raises(polyak.UnknownStrategyError, match="Did you mean 'ema'"):
        check_strategy("emma")


def test_the_learning_rate_is_what_the_author_says():
    seen = set()

    class Sees(Sound):
        def weight(self, clock):
            seen.add(clock.lr)
            return 1.0

    with pytest.raises(AssertionError, match=r"breaks 1 of .*\n  pickle"):
        check_strategy(Sees, lr=lambda step: 0.25)
    assert seen == {0.25}


def test_the_learning_rate_warms_up_from_zero_and_comes_down_to_zero():
    rates = [learning_rate(step) for step in range(1, 120)]
    peak = rates.index(max(rates))
    assert rates[0] == rates[-1] == 0.0
    assert rates[: peak + 1] == sorted(rates[: peak + 1])
    assert rates[peak:] == sorted(rates[peak:], reverse=True)
    assert 0.09 < rates[peak] <= 0.1


def test_several_strategies_are_checked_and_every_broken_one_named():
    with pytest.raises(AssertionError) as caught:
        check_strategies([Lenient, "swa", Sound(), Mutable()])
    assert [line for line in str(caught.value).splitlines() if "breaks" in line] == [
        "Lenient(name='sound', decay=0.9) breaks 1 of the laws of averaging:",
        "Mutable(name='sound', decay=0.9) breaks 1 of the laws of averaging:",
    ]


def test_all_installed_strategies_obey_the_laws():
    check_strategies()
    check_strategies([polyak.HalfLifeEMA(halflife=7), polyak.BlockMean(length=6)])  # they have settings to be given


def test_the_global_random_state_is_left_alone():
    before = torch.random.get_rng_state()
    check_strategy(Sound)
    assert torch.equal(torch.random.get_rng_state(), before)
