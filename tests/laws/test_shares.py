"""Laws 1 and 2: shares are a distribution, and the average is the sum of shares times weights."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, strategies as st

import polyak
from models import ZOO, drifting, mlp
from oracle import Reference, is_copied, rates_of, shares_of, strategies_to_try

STEPS = 12
LRS = [0.1 * (1.0 - 0.05 * i) for i in range(STEPS)]
NEGATIVE = {"dema"}  # twice an average less another: old weights count against it
TRIED = [pytest.param(name, settings, id=f"{name}-{i}") for i, (name, settings) in enumerate(strategies_to_try())]


@pytest.mark.parametrize(("name", "settings"), TRIED)
@pytest.mark.parametrize("kernel", ["loop", "foreach"])
def test_one_hot_weights_give_exactly_the_profile(name, settings, kernel):
    weights = torch.zeros(STEPS + 1, dtype=torch.float64)
    weights[0] = 1.0
    averager = polyak.average({"w": weights}, name, **{**settings, "kernel": kernel})
    for i, lr in enumerate(LRS, start=1):
        weights.zero_()[i] = 1.0
        averager.update(lr=lr)
    profile = averager.profile()
    assert len(profile) == STEPS
    # Where shares are sums of terms of both signs they are as exact as the terms.
    atol = 1e-15 if name in NEGATIVE else 0
    np.testing.assert_allclose(averager.averages["w"], [profile.start, *profile.shares], rtol=1e-13, atol=atol)
    assert (min(profile.start, *profile.shares) >= 0) == (name not in NEGATIVE)
    assert math.isclose(profile.start + profile.shares.sum(), 1.0, rel_tol=1e-14)


@pytest.mark.parametrize(("name", "settings"), TRIED)
@pytest.mark.parametrize("kernel", ["loop", "foreach"])
@pytest.mark.parametrize("kind", ZOO.values(), ids=str)
def test_a_float64_average_is_the_sum_of_shares_times_weights(name, settings, kernel, kind):
    model = kind.build()
    averager = polyak.average(model, name, **{**settings, "kernel": kernel, "dtype": "float64"})
    _run_and_compare(model, averager, lambda name: 1e-14)


@pytest.mark.parametrize("kind", ZOO.values(), ids=str)
def test_an_average_in_the_default_dtype_stays_within_a_rounding_per_update(kind):
    model = kind.build()
    averager = polyak.average(model, "ema", decay=0.9)
    _run_and_compare(model, averager, lambda name: 2 * STEPS * torch.finfo(averager.averages[name].dtype).eps)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_an_average_in_a_short_dtype_stays_within_a_step_of_it_per_update(dtype):
    model = mlp()
    averager = polyak.average(model, "ema", decay=0.9, dtype=dtype)
    _run_and_compare(model, averager, lambda name: STEPS * torch.finfo(averager.averages[name].dtype).eps)


def _run_and_compare(model, averager, tolerance):
    reference = Reference(model)
    for number in drifting(model, STEPS):
        averager.update(lr=LRS[number - 1])
        reference.see()
    rates = rates_of(averager.strategy, range(1, STEPS + 1), origin=averager.options.origin, lrs=LRS, counted=True)
    start, shares = shares_of(averager.strategy, rates)
    np.testing.assert_allclose(averager.profile().shares, shares, rtol=1e-13, atol=1e-15)
    buffers = {s.name for s in averager.stored if s.kind == "buffer"} if averager.options.buffers == "copy" else set()
    for name, average in averager.averages.items():
        if name in buffers or is_copied(name, averager.averages):
            latest = reference.latest(name)
            assert torch.equal(average.to(latest.dtype), latest), name
            continue
        wanted = reference.mean(name, start, shares)
        scale = max((seen[name].abs().amax() for seen in reference.seen if average.numel()), default=1.0)
        torch.testing.assert_close(average.to(wanted.dtype), wanted, rtol=0, atol=float(tolerance(name) * scale))


SPACE = {
    "decay": st.floats(0, 0.9999) | st.sampled_from([0.0, 0.5, 0.9999]),
    "every": st.integers(1, 4),
    "start": st.integers(0, 7),
    "origin": st.sampled_from([None, "initial", "first"]),
    "strategy": st.sampled_from(["ema", "ema_debiased", "swa", "ema_v1", "ema_v3"]),
    "broken": st.sets(st.integers(1, 14)),
}


def _built(model, strategy, decay, **options):
    settings = {} if strategy == "swa" else {"decay": decay}
    settings |= {"use_warmup": True} if strategy == "ema_v3" else {}
    return polyak.average(model, strategy, dtype="float64", nonfinite="skip", **settings, **options)


def _compare(averager, reference, due, every, *, counted):
    lrs = [None] * len(due)
    rates = rates_of(averager.strategy, due, every=every, origin=averager.options.origin, lrs=lrs, counted=counted)
    assert averager.n == len(due)
    start, shares = shares_of(averager.strategy, rates)
    np.testing.assert_allclose(averager.profile().shares, shares, rtol=1e-12, atol=1e-15)
    np.testing.assert_array_equal(averager.profile().ages, [due[-1] - step for step in due] if due else [])
    for name, average in averager.averages.items():
        if due:
            torch.testing.assert_close(average, reference.mean(name, start, shares), rtol=1e-13, atol=1e-13)


def _spoilt(model, number, broken):
    """Put a NaN into the weights of a broken step, and return how to take it out again."""
    weight = next(model.parameters())
    kept = weight.detach().clone()
    if number in broken:
        weight.data.view(-1)[0] = torch.nan
    return lambda: weight.data.copy_(kept)


@pytest.mark.property
@pytest.mark.filterwarnings("ignore::polyak.PolyakWarning")
@given(**SPACE)
def test_counted_steps_are_averaged_as_the_cadence_says(strategy, decay, every, start, origin, broken):
    torch.manual_seed(0)
    model = mlp()
    averager = _built(model, strategy, decay, every=every, start=start, origin=origin)
    reference, due = Reference(model), []
    for number in drifting(model, 14):
        mend = _spoilt(model, number, broken)
        averager.update()
        mend()
        if number >= start and number % every == 0 and number not in broken:
            due.append(number)
            reference.see()
    assert averager.skipped == len([s for s in broken if s >= start and s % every == 0])
    _compare(averager, reference, due, every, counted=True)


@pytest.mark.property
@pytest.mark.filterwarnings("ignore::polyak.PolyakWarning")
@given(**SPACE, first=st.integers(0, 9), jumps=st.lists(st.integers(1, 9), min_size=1, max_size=12))
def test_given_steps_may_jump_and_keep_their_meaning_per_step(
    strategy, decay, every, start, origin, broken, first, jumps
):
    torch.manual_seed(0)
    model = mlp()
    averager = _built(model, strategy, decay, every=every, start=start, origin=origin)
    reference, due, last, now = Reference(model), [], min(0, first - 1), first
    for number, jump in zip(drifting(model, len(jumps)), jumps, strict=True):
        mend = _spoilt(model, number, broken)
        averager.update(step=now)
        mend()
        if now >= start and now // every > last // every and number not in broken:
            due.append(now)
            reference.see()
        last, now = now, now + jump
    _compare(averager, reference, due, every, counted=False)


@pytest.mark.property
@given(
    decay=st.floats(0, 1, exclude_max=True), every=st.integers(1, 50), n=st.integers(1, 200),
    origin=st.sampled_from(["initial", "first"]),
)  # fmt: skip
def test_the_profile_of_a_strategy_is_that_of_its_averager(decay, every, n, origin):
    weights = torch.zeros(1)
    strategy = polyak.EMA(decay=decay)
    averager = polyak.average({"w": weights}, strategy, every=every, origin=origin)
    for _ in range(n * every):
        averager.update()
    expected = polyak.Profile.of(strategy, n, every=every, origin=origin)
    np.testing.assert_array_equal(averager.profile().shares, expected.shares)
    np.testing.assert_array_equal(averager.profile().ages, expected.ages)
