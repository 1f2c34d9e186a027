"""Law 3: weights that do not change leave the average as it is, bit for bit."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, strategies as st
from hypothesis.extra.numpy import arrays

import polyak
from models import ZOO, average_bits, mlp
from oracle import strategies_to_try

TRIED = [pytest.param(name, settings, id=f"{name}-{i}") for i, (name, settings) in enumerate(strategies_to_try())]


@pytest.mark.parametrize(("name", "settings"), TRIED)
@pytest.mark.parametrize("kernel", ["loop", "foreach"])
@pytest.mark.parametrize("kind", ZOO.values(), ids=str)
def test_constant_weights_are_a_fixed_point(name, settings, kernel, kind):
    averager = polyak.average(kind.build(), name, **{**settings, "kernel": kernel})
    before = average_bits(averager)
    for _ in range(6):
        averager.update(lr=0.1)
    assert averager.n == 6
    assert average_bits(averager) == before


@pytest.mark.filterwarnings("ignore:the weights have not changed:polyak.PolyakWarning")
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("decay", [0.0, 0.3, 0.9, 0.9999])
def test_constant_weights_are_a_fixed_point_of_stochastic_rounding(dtype, decay):
    averager = polyak.average(mlp().to(getattr(torch, dtype)), "ema", decay=decay, dtype=dtype)
    before = average_bits(averager)
    for _ in range(200):
        averager.update()
    assert average_bits(averager) == before


@pytest.mark.property
@given(
    values=arrays("float32", 16, elements=st.floats(width=32, allow_nan=False, allow_infinity=False)),
    decay=st.floats(0, 1, exclude_max=True),
    dtype=st.sampled_from(["auto", "float64"]),
    kernel=st.sampled_from(["loop", "foreach"]),
)
def test_any_finite_values_are_a_fixed_point_of_any_decay(values, decay, dtype, kernel):
    # Adding 0.0 makes the one exception go away: -0.0 may become 0.0, the same number.
    weights = torch.from_numpy(values) + 0.0
    averager = polyak.average({"w": weights}, "ema", decay=decay, dtype=dtype, kernel=kernel)
    before = average_bits(averager)
    for _ in range(3):
        averager.update()
    assert average_bits(averager) == before
