"""The kernels: all equal the reference loop; short averages are rounded without bias; the check finds every NaN."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, strategies as st

import polyak
from models import bits
from polyak.kernels.eager import chunked, scratch
from polyak.kernels.select import KERNELS
from polyak.tensors.finite import FiniteCheck
from polyak.tensors.memory import clones

WIDE = [torch.float32, torch.float64, torch.complex64, torch.complex128]
SHAPES = st.lists(st.lists(st.integers(0, 4), max_size=3).map(tuple), min_size=1, max_size=5)
RATES = st.floats(0, 1) | st.sampled_from([0.0, 1e-9, 0.5, math.nextafter(0.5, 0), 1.0])


def _generator(device):
    return torch.Generator(device).manual_seed(0)


def _tensors(shapes, dtype, seed):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, dtype=dtype, generator=generator) for shape in shapes]


def _move(kernel, averages, weights, rate, done=0):
    KERNELS[kernel]([averages], weights)([rate], [_generator], done)


def _moved(kernel, averages, weights, rate):
    averages = [tensor.clone() for tensor in averages]
    _move(kernel, averages, weights, rate)
    return [bits(tensor) for tensor in averages]


@pytest.mark.property
@given(shapes=SHAPES, dtype=st.sampled_from(WIDE), rate=RATES, seed=st.integers(0, 99))
def test_foreach_and_mixed_equal_the_loop_bit_for_bit(shapes, dtype, rate, seed):
    averages, weights = _tensors(shapes, dtype, seed), _tensors(shapes, dtype, seed + 1)
    reference = _moved("loop", averages, weights, rate)
    assert _moved("foreach", averages, weights, rate) == reference
    assert _moved("mixed", averages, weights, rate) == reference


@pytest.mark.property
@pytest.mark.filterwarnings("ignore:ComplexHalf support is experimental")
@given(
    shapes=SHAPES,
    dtypes=st.sampled_from(
        [(torch.float32, live) for live in (torch.bfloat16, torch.float16, torch.float64, torch.float8_e4m3fn)]
        + [(torch.float64, torch.float32), (torch.complex128, torch.complex64), (torch.complex64, torch.complex32)]
    ),
    rate=RATES,
)
def test_mixed_equals_the_loop_where_dtypes_differ(shapes, dtypes, rate):
    average, live = dtypes
    averages = _tensors(shapes, average, 0)
    weights = [tensor.to(live) for tensor in _tensors(shapes, average, 1)]
    assert _moved("mixed", averages, weights, rate) == _moved("loop", averages, weights, rate)


@pytest.mark.property
@given(rate=RATES, seed=st.integers(0, 99))
def test_the_loop_is_the_recursion(rate, seed):
    (average,), (weight,) = _tensors([(7,)], torch.float64, seed), _tensors([(7,)], torch.float64, seed + 1)
    expected = average + rate * (weight - average)
    _move("loop", [average], [weight], rate)
    torch.testing.assert_close(average, expected, rtol=1e-15, atol=1e-15)


@pytest.mark.parametrize("kernel", ["loop", "foreach", "mixed", "stochastic"])
def test_a_rate_of_one_replaces_even_what_is_not_finite(kernel):
    dtype = torch.bfloat16 if kernel == "stochastic" else torch.float32
    average, weight = torch.full((3,), torch.nan, dtype=dtype), torch.ones(3)
    _move(kernel, [average], [weight.to(dtype) if kernel == "foreach" else weight], 1.0)
    assert torch.equal(average.float(), weight)


@pytest.mark.parametrize("kernel", ["mixed", "stochastic"])
def test_large_tensors_are_moved_in_pieces_and_go_on_where_they_stopped(kernel, monkeypatch):
    monkeypatch.setattr(chunked, "CHUNK", 10)
    dtype = torch.bfloat16 if kernel == "stochastic" else torch.float64
    average, weight = torch.zeros(35, dtype=dtype), torch.ones(35)
    _move(kernel, [average], [weight], 0.5, done=2)
    assert torch.equal(average, torch.cat([torch.zeros(20), torch.full((15,), 0.5)]).to(dtype))
    assert average._version == 2
    whole = torch.zeros(35, dtype=dtype)
    _move(kernel, [whole], [weight], 0.5)
    assert torch.equal(whole, torch.full((35,), 0.5, dtype=dtype))
    assert whole._version == 4


@pytest.mark.parametrize("done", range(6))
@pytest.mark.parametrize("kernel", ["mixed", "stochastic", "loop"])
def test_small_tensors_are_moved_several_at_a_time_and_go_on_where_they_stopped(kernel, done, monkeypatch):
    monkeypatch.setattr(chunked, "CHUNK", 10)
    dtype = torch.bfloat16 if kernel == "stochastic" else torch.float64
    averages = [torch.zeros(shape, dtype=dtype) for shape in ((3,), (2, 2), (15,), (0,), (5,))]
    weights = [torch.ones_like(average, dtype=torch.float32) for average in averages]
    _move(kernel, averages, weights, 0.5, done=done)
    pieces = [[2], [2], [4, 1], [0, 3]] if kernel != "loop" else [[2], [2], [4], [1], [0], [3]]
    still = [sum(i in piece for piece in pieces[done:]) for i in range(5)]
    half = [average.eq(0.5).sum().item() for average in averages]
    assert half == [3 * still[0], 4 * still[1], [0, 5, 15][still[2]], 0, 5 * still[4]]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_random_numbers_do_not_depend_on_where_the_averages_lie(dtype):
    torch.manual_seed(0)
    weights = [torch.randn(shape) for shape in ((70,), (3, 5), (64,), (), (2, 3, 4, 5))]
    alone = [torch.ones_like(weight, dtype=dtype) for weight in weights]
    packed = clones(alone, [(torch.device("cpu"), dtype)] * len(alone))
    assert packed[0].untyped_storage().data_ptr() == packed[1].untyped_storage().data_ptr()
    _move("stochastic", alone, weights, 0.3)
    with torch.no_grad():
        _move("stochastic", packed, weights, 0.3)
    assert all(torch.equal(*pair) for pair in zip(alone, packed, strict=True))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_random_numbers_do_not_depend_on_how_an_average_lies(dtype):
    torch.manual_seed(0)
    weight = torch.randn(2, 3, 4, 5)
    moved = []
    for layout in (torch.contiguous_format, torch.channels_last):
        average = torch.ones(weight.shape, dtype=dtype).to(memory_format=layout)
        _move("stochastic", [average], [weight], 0.3)
        moved.append(average)
    assert torch.equal(*moved)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_large_tensor_that_is_not_contiguous_is_rounded_in_memory_of_its_own(dtype, monkeypatch):
    monkeypatch.setattr(scratch, "CHUNK", 10)
    monkeypatch.setattr(chunked, "CHUNK", 10)
    average = torch.zeros(9, 7, dtype=dtype).t()
    _move("stochastic", [average], [torch.ones(7, 9)], 0.25)
    assert torch.equal(average, torch.full((7, 9), 0.25, dtype=dtype))


@pytest.mark.parametrize("kernel", ["mixed", "loop"])
def test_tensors_that_are_not_contiguous_are_moved_whole(kernel, monkeypatch):
    monkeypatch.setattr(chunked, "CHUNK", 10)
    average = torch.zeros(6, 7, dtype=torch.float64).t()
    _move(kernel, [average], [torch.ones(7, 6)], 0.25)
    assert torch.equal(average, torch.full((7, 6), 0.25, dtype=torch.float64))


# Stochastic rounding


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("start", [1.0, -1.0, 3.1415, 1e-3, 2.0, 0.0])
def test_rounding_is_unbiased_and_only_to_a_neighbour(dtype, start):
    count, rate = 200_000, 0.01
    average = torch.full((count,), start).to(dtype)
    weight = torch.full((count,), start + 0.1)
    exact = average[0].float().lerp(weight[0], rate)
    _move("stochastic", [average], [weight], rate)
    values = average.unique().float()
    assert len(values) <= 2
    if len(values) == 2:
        low, high = values.tolist()
        assert torch.nextafter(torch.tensor(low, dtype=dtype), torch.tensor(torch.inf, dtype=dtype)).item() == high
        assert low <= exact <= high
        spread = (high - low) / 2 / math.sqrt(count)
        assert abs(average.double().mean() - exact.double()) < 5 * spread
    else:
        assert values.item() == exact


@pytest.mark.property
@given(value=st.floats(width=16, allow_nan=False, allow_infinity=False), rate=RATES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_value_of_the_short_dtype_is_a_fixed_point_of_rounding(dtype, value, rate):
    weight = torch.full((50,), value).to(dtype)
    average = weight.clone()
    _move("stochastic", [average], [weight], rate)
    assert torch.equal(average, weight)


def test_nan_and_infinities_pass_through_rounding():
    average = torch.tensor([1.0, 1.0, 1.0, torch.nan]).bfloat16()
    weight = torch.tensor([torch.nan, torch.inf, -torch.inf, 1.0])
    _move("stochastic", [average], [weight], 0.1)
    assert average.isnan().tolist() == [True, False, False, True]
    assert average[1] == torch.inf
    assert average[2] == -torch.inf


def test_rounding_draws_from_its_own_generator_only():
    state = torch.get_rng_state()
    _move("stochastic", [torch.zeros(9).bfloat16()], [torch.ones(9)], 0.3)
    assert torch.equal(torch.get_rng_state(), state)


# The check for NaN and infinities

FLOATS = [
    torch.float64,
    torch.float32,
    torch.float16,
    torch.bfloat16,
    torch.complex64,
    torch.complex128,
    torch.complex32,
]
EIGHTHS = [dtype for name, dtype in vars(torch).items() if name.startswith("float8") and isinstance(dtype, torch.dtype)]


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("size", [5, 1 << 14])
@pytest.mark.filterwarnings("ignore:ComplexHalf support is experimental")
def test_the_check_finds_one_value_that_is_not_finite(dtype, value, size):
    tensor = torch.ones(size, dtype=torch.complex64 if dtype.is_complex else torch.float32)
    assert FiniteCheck([tensor.to(dtype), torch.ones(3)])()
    tensor[3] = value
    assert not FiniteCheck([torch.ones(3), tensor.to(dtype)])()
    tensor[4] = -value
    assert not FiniteCheck([tensor.to(dtype)])()


@pytest.mark.parametrize("dtype", EIGHTHS, ids=str)
def test_the_check_reads_eight_bit_floats(dtype):
    tensor = torch.ones(5).to(dtype)
    assert FiniteCheck([tensor])()
    broken = torch.tensor([1.0, torch.nan]).to(dtype)
    assert FiniteCheck([broken])() == broken.float().isfinite().all()


@pytest.mark.parametrize("part", ["real", "imag"])
def test_the_check_reads_both_parts_of_a_complex_number(part):
    tensor = torch.ones(4, dtype=torch.complex64)
    getattr(tensor, part)[2] = torch.inf
    assert not FiniteCheck([tensor])()
    assert not FiniteCheck([tensor.conj()])()
    assert FiniteCheck([torch.ones(4, dtype=torch.complex64).conj()])()


@pytest.mark.parametrize(
    "dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.complex64], ids=str
)
@pytest.mark.parametrize("size", [64, 1 << 15])
def test_a_sum_that_overflows_is_no_infinity(dtype, size):
    largest = torch.finfo(dtype).max
    tensor = torch.full((size,), largest, dtype=dtype)
    assert FiniteCheck([tensor, tensor.clone()])()
    assert FiniteCheck([torch.cat([tensor, -tensor])])()
    tensor[0] = torch.inf
    assert not FiniteCheck([tensor])()


@pytest.mark.parametrize(
    "tensors", [[], [torch.empty(0)], [torch.empty(0, 3), torch.ones(2)], [torch.tensor(1.0)]], ids=str
)
def test_nothing_and_empty_tensors_are_finite(tensors):
    assert FiniteCheck(tensors)()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_autocast_changes_nothing(dtype):
    tensors = [torch.ones(3, dtype=dtype), torch.ones(2, 2, dtype=dtype)]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert FiniteCheck(tensors)()
        tensors[1][0, 0] = torch.inf
        assert not FiniteCheck(tensors)()


def test_expanded_and_strided_tensors_are_read():
    one = torch.tensor([[torch.nan]])
    assert not FiniteCheck([one.expand(200, 200)])()
    assert not FiniteCheck([torch.full((6, 6), torch.nan)[::2, ::3]])()
    holes = torch.full((6, 6), torch.nan)
    holes[::2, ::3] = 1.0
    assert FiniteCheck([holes[::2, ::3]])()


@pytest.mark.parametrize("kernel", ["auto", "foreach", "loop"])
def test_a_weight_that_lies_otherwise_than_before_is_moved_beside_those_that_do_not(kernel):
    torch.manual_seed(0)
    model = torch.nn.ParameterList([torch.randn(6, 4) for _ in range(3)])
    averager = polyak.average(model, "ema", decay=0.5, kernel=kernel)
    exact = [parameter.detach().clone() for parameter in model]
    model[1].data = torch.randn(4, 6).t()
    averager.update()
    for before, parameter, average in zip(exact, model, averager.averages.values(), strict=True):
        torch.testing.assert_close(average, (before + parameter.detach()) / 2, rtol=1e-6, atol=1e-7)
