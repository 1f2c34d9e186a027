"""Elements that keep their old value where the new one would not be finite: every kernel follows the formula."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, strategies as st

from models import bits
from polyak.kernels import select
from polyak.kernels.eager.scratch import CHUNK

WIDE = [torch.float32, torch.float64, torch.complex64, torch.complex128]
SHORT = [torch.bfloat16, torch.float16]
RATES = st.floats(0, 1, width=32) | st.sampled_from([0.0, 1e-9, 0.5, math.nextafter(0.5, 0), 1.0])
SHAPES = st.lists(st.lists(st.integers(0, 4), max_size=3).map(tuple), min_size=1, max_size=5)
STRANGE = [math.nan, math.inf, -math.inf, 3.4e38, -3.4e38, 0.0]


def formula(old, weight, rate):
    """Return what becomes of an average, and how many elements keep their old value."""
    weight = weight.to(old.dtype)
    moved = weight if rate == 1 else torch.lerp(old, weight, rate)
    moved = torch.where(old.isfinite(), moved, weight)
    return torch.where(moved.isfinite(), moved, old), int((~moved.isfinite()).sum())


def generator(device):
    return torch.Generator(device).manual_seed(0)


def poisoned(shapes, dtype, seed, share=0.2):
    """Return tensors in which some elements are strange."""
    random = torch.Generator().manual_seed(seed)
    made = [torch.randn(shape, dtype=dtype, generator=random) for shape in shapes]
    for tensor in made:
        chosen = torch.rand(tensor.shape, generator=random) < share
        values = torch.tensor(STRANGE)[torch.randint(len(STRANGE), tensor.shape, generator=random)]
        tensor[chosen] = values[chosen].to(dtype)
    return made


def held(kernel, lanes, weights, rates):
    bound = select.bind(kernel, lanes, weights)
    bound.prepare(moved=True, hold=True)
    bound(rates, [generator] * len(lanes), 0)
    return bound


@pytest.mark.property
@pytest.mark.parametrize("kernel", ["loop", "foreach", "mixed", "fused"])
@given(shapes=SHAPES, dtype=st.sampled_from(WIDE), rate=RATES, seed=st.integers(0, 99))
def test_every_kernel_holds_what_the_formula_holds(kernel, shapes, dtype, rate, seed):
    if kernel == "fused" and (dtype.is_complex or not select.compiles("fused")):
        kernel = "foreach"
    averages, weights = poisoned(shapes, dtype, seed), poisoned(shapes, dtype, seed + 1)
    expected = [formula(*pair, rate) for pair in zip(averages, weights, strict=True)]
    bound = held(kernel, [averages], weights, [rate])
    assert [bits(average) for average in averages] == [bits(value) for value, _ in expected]
    assert bound.held_each().tolist() == [[count for _, count in expected]]
    assert bound.held.tolist() == [sum(count for _, count in expected)]


@pytest.mark.parametrize("kernel", ["foreach", "fused"])
def test_each_lane_holds_by_its_own_rate(kernel):
    if kernel == "fused" and not select.compiles("fused"):
        pytest.skip("no compiler works here")
    shapes, rates = [(3, 5), (), (40_000,)], [0.0, 0.3, 0.7, 1.0]
    weights = poisoned(shapes, torch.float32, 0)
    lanes = [poisoned(shapes, torch.float32, seed) for seed in (1, 2, 3, 4)]
    expected = [
        [formula(*pair, rate) for pair in zip(lane, weights, strict=True)]
        for lane, rate in zip(lanes, rates, strict=True)
    ]
    bound = held(kernel, lanes, weights, rates)
    assert [[*map(bits, lane)] for lane in lanes] == [[bits(value) for value, _ in lane] for lane in expected]
    assert bound.held_each().tolist() == [[count for _, count in lane] for lane in expected]


@pytest.mark.parametrize("kernel", ["loop", "mixed", "foreach", "fused"])
@pytest.mark.parametrize("place", [0, CHUNK - 1, CHUNK, CHUNK + 7, 2 * CHUNK + 4], ids=str)
@pytest.mark.parametrize("value", [math.nan, -math.inf], ids=str)
def test_one_element_of_a_large_tensor_is_held_wherever_it_is(kernel, place, value):
    if kernel == "fused" and not select.compiles("fused"):
        pytest.skip("no compiler works here")
    average, weight = torch.zeros(2 * CHUNK + 5), torch.ones(2 * CHUNK + 5)
    weight[place] = value
    bound = held(kernel, [[average]], [weight], [0.25])
    assert bound.held.tolist() == [1]
    assert average[place] == 0
    assert average.sum() == 0.25 * (2 * CHUNK + 4)


@pytest.mark.parametrize("live", [torch.float8_e4m3fn, torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_weights_of_other_dtypes_are_held(live):
    weight = torch.tensor([1.0, math.nan, 2.0]).to(live)
    average = torch.zeros(3)
    assert held("mixed", [[average]], [weight], [0.5]).held.tolist() == [1]
    assert average.tolist() == [0.5, 0.0, 1.0]


def test_a_weight_beyond_the_averages_dtype_is_held():
    average = torch.zeros(2, dtype=torch.float32)
    weight = torch.tensor([1e300, 1.0], dtype=torch.float64)
    kernels = ["mixed", *(["fused"] if select.compiles("fused") else [])]
    for kernel in kernels:
        for rate in (0.5, 1.0):
            average.zero_()
            assert held(kernel, [[average]], [weight], [rate]).held.tolist() == [1]
            assert average.tolist() == [0.0, rate]


@pytest.mark.parametrize("dtype", SHORT, ids=str)
@pytest.mark.parametrize("kernel", ["stochastic", "fused"])
@pytest.mark.parametrize("rate", [0.01, 0.7, 1.0])
def test_short_averages_hold_and_draw_as_without_strange_weights(dtype, kernel, rate):
    if kernel == "fused" and not select.compiles("fused"):
        pytest.skip("no compiler works here")
    old = torch.linspace(-3, 3, 5000).to(dtype)
    weights = torch.linspace(-2, 4, 5000)
    clean = old.clone()
    held(kernel, [[clean]], [weights], [rate])
    average, strange = old.clone(), weights.clone()
    strange[[0, 77, 4999]] = torch.tensor([math.nan, math.inf, -1e38 if dtype == torch.float16 else -math.inf])
    bound = held(kernel, [[average]], [strange], [rate])
    clean[[0, 77, 4999]] = old[[0, 77, 4999]]
    assert bits(average) == bits(clean)
    assert bound.held.tolist() == [3]


@pytest.mark.parametrize("dtype", [*SHORT, *WIDE], ids=str)
@pytest.mark.parametrize("kernel", ["loop", "foreach", "mixed", "stochastic", "fused"])
@pytest.mark.parametrize("rate", [0.0, 0.01, 0.7, 1.0])
def test_an_average_that_is_not_finite_begins_anew_from_a_finite_weight(dtype, kernel, rate):
    fits = dtype in SHORT if kernel == "stochastic" else kernel == "fused" or dtype not in SHORT
    if kernel == "fused" and (dtype.is_complex or not select.compiles("fused")):
        fits = False
    if not fits:
        kernel = "stochastic" if dtype in SHORT else "loop"
    average = torch.tensor([math.nan, math.inf, -math.inf, 1.0, math.nan]).to(dtype)
    weight = torch.tensor([2.0, 3.0, 4.0, 1.0, math.nan]).to(dtype)
    bound = held(kernel, [[average]], [weight], [rate])
    assert torch.equal(average[:4], weight[:4])
    assert not average[4].isfinite()
    assert bound.held.tolist() == [1]


def test_both_parts_of_a_complex_element_are_held():
    average = torch.zeros(2, dtype=torch.complex64)
    weight = torch.tensor([complex(1, math.inf), complex(2, 2)])
    held("foreach", [[average]], [weight], [0.5])
    assert average.tolist() == [0, 1 + 1j]


def test_nothing_is_held_of_what_has_no_elements():
    average, weight = torch.zeros(0), torch.zeros(0)
    for kernel in ("loop", "foreach", "mixed"):
        assert held(kernel, [[average]], [weight], [0.5]).held.tolist() == [0]


def test_transposed_and_expanded_weights_are_held_element_by_element():
    average, weight = torch.zeros(4, 3), torch.ones(3, 4).t()
    weight[1, 2] = math.nan
    held("mixed", [[average]], [weight], [0.5])
    assert average[1, 2] == 0
    assert average.sum() == 0.5 * 11


def test_plain_torch_measures_averages_anew_once_others_have_written_them():
    averages, weights = [torch.zeros(40_000), torch.zeros(3)], [torch.ones(40_000), torch.ones(3)]
    bound = select.bind("foreach", [averages], weights)

    def update():
        bound.prepare(moved=False, hold=True)
        bound([0.5], [generator], 0)
        return bound.held.tolist()

    assert update() == [0]
    averages[0][7] = math.nan
    assert update() == [0]
    assert averages[0][:9].tolist() == [0.75] * 7 + [1.0, 0.75]  # it begins anew from the weight
    averages[1][1] = 3e38
    weights[1][1] = -3e38
    assert update() == [1]
    assert averages[1].tolist() == [0.875, pytest.approx(3e38), 0.875]


def test_what_is_known_of_averages_ends_where_they_let_nan_in():
    averages, weights = [torch.zeros(3)], [torch.ones(3)]
    bound = select.bind("foreach", [averages], weights)
    for hold in (True, False, True):
        weights[0][0] = 1.0 if hold else math.nan
        bound.prepare(moved=False, hold=hold)
        bound([0.5], [generator], 0)
    assert averages[0].tolist() == [1.0, 0.875, 0.875]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("which", [0, 1])
def test_plain_torch_finds_the_one_large_tensor_among_others_that_may_overflow(dtype, which):
    large = torch.finfo(dtype).max * 0.9
    averages, weights = ([torch.ones(40_000, dtype=dtype) for _ in range(2)] for _ in range(2))
    averages[which][5], weights[which][5] = -large, large
    bound = held("foreach", [averages], weights, [0.5])
    assert bound.held_each().tolist() == [[int(which == i) for i in range(2)]]
    assert averages[which][5] == -large
