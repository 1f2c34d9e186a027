"""The kernel that ``kernel="auto"`` takes on a CPU: the fastest of those that give the same bits, by trial."""

from __future__ import annotations

import time

import pytest
import torch
from torch import nn

import polyak
from models import average_bits, bits, drifting, mlp
from polyak.kernels import select
from polyak.kernels.cpu.fused import FusedCPU
from polyak.kernels.eager.foreach import Foreach
from polyak.kernels.trial import Trial

pytestmark = pytest.mark.skipif(
    not select.compiles("auto"), reason="no compiler works here: there is nothing to choose"
)


class SlowFused(FusedCPU):
    def __call__(self, *arguments):
        time.sleep(0.01)
        super().__call__(*arguments)


class SlowForeach(Foreach):
    def __call__(self, *arguments):
        time.sleep(0.01)
        super().__call__(*arguments)


def trial(first=FusedCPU, other=Foreach, lanes=None, weights=None):
    lanes, weights = lanes or [[torch.zeros(3)]], weights or [torch.ones(3)]
    return Trial(first(lanes, weights), [lambda: other(lanes, weights)])


def called(kernel, times, *, rate=0.5, hold=True):
    for _ in range(times):
        kernel.prepare(moved=False, hold=hold)
        kernel([rate], [lambda device: None], 0)


@pytest.mark.parametrize(
    ("first", "other", "best"), [(SlowFused, Foreach, "foreach"), (FusedCPU, SlowForeach, "fused")]
)
def test_the_faster_one_is_kept_and_said_with_how_much_slower_the_other_is(first, other, best):
    kernel = trial(first, other)
    called(kernel, 3)
    assert kernel.tried == {}
    called(kernel, 7)
    assert kernel.name == best
    (slower,) = {"fused", "foreach"} - {best}
    assert kernel.tried[slower] > 1


def test_it_is_tried_anew_where_holding_begins_or_ends():
    kernel = trial()
    called(kernel, 10)
    assert kernel.tried
    called(kernel, 1, hold=False)
    assert not kernel._chosen
    called(kernel, 10, hold=False)
    assert kernel._chosen


def test_copies_are_not_timed():
    kernel = trial()
    called(kernel, 20, rate=1.0)
    assert not kernel._chosen


@pytest.mark.parametrize("strategy", ["ema", "swa", "dema"])
@pytest.mark.parametrize("nonfinite", ["hold", "skip", "propagate"])
def test_a_trial_changes_no_bit(strategy, nonfinite):
    model = nn.Sequential(mlp(), nn.BatchNorm1d(2))
    both = [polyak.average(model, strategy, kernel=kernel, nonfinite=nonfinite) for kernel in ("auto", "loop")]
    for _ in drifting(model, 14):
        for averager in both:
            averager.update()
        assert average_bits(both[0]) == average_bits(both[1])
    assert "chosen by trial for " in both[0].describe()


def test_a_bank_tries_for_all_its_averages_at_once():
    model = mlp()
    bank = polyak.bank(model, {"a": {"name": "ema", "decay": 0.5}, "b": {"name": "ema", "decay": 0.9}})
    alone = {name: polyak.average(model, averager.strategy, kernel="loop") for name, averager in bank.items()}
    for _ in drifting(model, 14):
        bank.update()
        for averager in alone.values():
            averager.update()
    assert [average_bits(one) for one in bank.values()] == [average_bits(one) for one in alone.values()]


@pytest.mark.filterwarnings("ignore::polyak.PolyakWarning")
def test_each_update_of_a_trial_holds_and_finds_what_is_not_finite():
    model = mlp()
    holds, skips = (polyak.average(model, "ema", decay=0.5, nonfinite=what) for what in ("hold", "skip"))
    model[0].weight.data[0, 0] = torch.nan
    for _ in range(12):
        holds.update()
        skips.update()
        assert holds.held == {"0.weight": 1}
    assert (skips.n, skips.skipped) == (0, 12)


@pytest.mark.parametrize("call", range(1, 10))
def test_an_interruption_in_a_trial_leaves_an_update_whole(call, monkeypatch):
    model = nn.Sequential(mlp(), mlp())
    averager, straight = polyak.average(model, "ema", decay=0.5), polyak.average(model, "ema", decay=0.5, kernel="loop")
    for kernel in (FusedCPU, Foreach):
        original = kernel.__call__

        def interrupted(self, *arguments, original=original):
            original(self, *arguments)
            if straight.n == call - 1 and not struck:
                struck.append(True)
                raise KeyboardInterrupt

        monkeypatch.setattr(kernel, "__call__", interrupted)
    struck = []
    for number in drifting(model, 12):
        if number == call:
            with pytest.raises(KeyboardInterrupt):
                averager.update()
        else:
            averager.update()
        straight.update()
        assert average_bits(averager) == average_bits(straight)
    assert averager.n == 12


def test_short_averages_and_a_fixed_choice_have_no_trial():
    for options in ({"dtype": "bfloat16"}, {"kernel": "fused"}, {"kernel": "foreach"}):
        model = mlp()
        averager = polyak.average(model, "ema", **options)
        for _ in drifting(model, 12):
            averager.update()
        assert "by trial" not in averager.describe()


def test_tensors_that_move_in_a_trial_are_followed():
    model = mlp()
    averager, straight = (polyak.average(model, "ema", decay=0.5, kernel=kernel) for kernel in ("auto", "loop"))
    for _ in drifting(model, 12):
        model[0].weight.data = model[0].weight.data.clone() + 1
        averager.update()
        straight.update()
    assert bits(averager.averages["0.weight"]) == bits(straight.averages["0.weight"])
