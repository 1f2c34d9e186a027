"""Checks of the fused kernel for CUDA: each is a function of a device; run as a script, all of them on the CPU.

The script needs TRITON_INTERPRET=1: Triton looks for its interpreter when it is imported.
"""

from __future__ import annotations

import math

import numpy as np
import torch

from interpreted import Checks
from models import bits
from polyak.kernels.cuda import fused as cuda
from polyak.kernels.select import KERNELS

WIDE = [torch.float32, torch.float64]
SHORT = [torch.bfloat16, torch.float16]
RATES = [0.0, 0.3, 0.5, math.nextafter(0.5, 0), 0.9, 1.0]
# A whole block and a rest, exactly one, none, a scalar.
SHAPES = [(2100,), (2048,), (0,), ()]
CHECKS = Checks()


def seeded(device, seed=0):
    return torch.Generator(device).manual_seed(seed)


def random_tensors(on, dtype, seed):
    generator = torch.Generator().manual_seed(seed)
    made = [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in SHAPES]
    # Dense, not contiguous.
    made.append(torch.randn(2, 3, 4, 5, generator=generator, dtype=torch.float64).to(memory_format=torch.channels_last))
    # An address that is no multiple of 16.
    made = [tensor.to(dtype).to(on) for tensor in made]
    made.append(torch.randn(2050, generator=generator, dtype=torch.float64).to(dtype).to(on)[1:])
    return made


def _copies(tensors):
    return [tensor.clone() for tensor in tensors]


def looped(averages, weights, rate):
    averages = _copies(averages)
    KERNELS["loop"]([averages], weights)([rate], [seeded], 0)
    return averages


def same_bits(first, second):
    return [bits(tensor.cpu()) for tensor in first] == [bits(tensor.cpu()) for tensor in second]


# What holds on each device


@CHECKS.collect(
    *[(dtype, dtype, rate) for dtype in WIDE for rate in RATES],
    *[(a, w, rate) for a in WIDE for w in WIDE + SHORT if w != a for rate in (0.3, 0.9, 1.0)],
)
def it_equals_the_loop_bit_for_bit(on, average, weight, rate):
    averages, weights = random_tensors(on, average, 0), random_tensors(on, weight, 1)
    expected = looped(averages, weights, rate)
    cuda.FusedCUDA([averages], weights)([rate], [seeded], 0)
    assert same_bits(averages, expected)


@CHECKS.collect(*[(average, weight) for average in SHORT for weight in WIDE + SHORT])
def a_rate_of_one_copies_to_the_nearest_short_float_and_of_zero_keeps(on, average, weight):
    averages, weights = random_tensors(on, average, 0), random_tensors(on, weight, 1)
    before, copies = _copies(averages), [tensor.to(average) for tensor in weights]
    kernel = cuda.FusedCUDA([averages], weights)
    kernel([0.0], [seeded], 0)
    assert same_bits(averages, before)
    kernel([1.0], [seeded], 0)
    assert same_bits(averages, copies)


@CHECKS.collect(
    *[(average, weight, 0.3) for average in SHORT for weight in WIDE + SHORT], *[(a, a, 0.9) for a in SHORT]
)
def short_averages_become_a_neighbour_of_the_exact_value(on, average, weight, rate):
    averages, weights = random_tensors(on, average, 0), random_tensors(on, weight, 1)
    exact = looped([tensor.float() for tensor in averages], weights, rate)
    cuda.FusedCUDA([averages], weights)([rate], [seeded], 0)
    for moved, value in zip(averages, exact, strict=True):
        nearest = value.to(average)
        toward = torch.where(value > nearest.float(), torch.inf, -torch.inf).to(average)
        neighbour = torch.nextafter(nearest, toward)
        assert ((moved == nearest) | ((moved == neighbour) & (value != nearest.float()))).all()


@CHECKS.collect(*[(dtype, start) for dtype in SHORT for start in [-1.0, 3.1415, 2e-5, 0.0]])
def rounding_is_unbiased(on, dtype, start):
    count, rate = 20_000, 0.01
    average = torch.full((count,), start, device=on).to(dtype)
    weight = torch.full((count,), start * 1.1 + 1e-7, device=on)
    exact = average[0].float().lerp(weight[0], rate).double()
    cuda.FusedCUDA([[average]], [weight])([rate], [seeded], 0)
    low, high = average.double().min(), average.double().max()
    assert low <= exact <= high
    assert (average.double().mean() - exact).abs() <= 5 * (high - low) / 2 / math.sqrt(count)


@CHECKS.collect(*[(dtype,) for dtype in SHORT])
def a_value_of_the_short_dtype_is_a_fixed_point_of_rounding(on, dtype):
    every = torch.arange(-(1 << 15), 1 << 15, 7, device=on).to(torch.int16).view(dtype)
    every = every[every.isfinite()]
    if on == "cpu" and dtype == torch.bfloat16:  # whose subnormal values Triton's interpreter misreads
        every = every[every.abs() >= torch.finfo(dtype).smallest_normal]
    average = every.clone()
    cuda.FusedCUDA([[average]], [every])([0.3], [seeded], 0)
    assert torch.equal(average, every)


@CHECKS.collect()
def nan_infinities_and_overflow_pass_through_rounding(on):
    for dtype in SHORT:
        average = torch.tensor([1.0, 1.0, 1.0, torch.nan, torch.finfo(dtype).max / 2], dtype=dtype, device=on)
        weight = torch.tensor([torch.nan, torch.inf, -torch.inf, 1.0, 3.4e38], device=on)
        cuda.FusedCUDA([[average]], [weight])([0.3], [seeded], 0)
        assert average.isnan().tolist() == [True, False, False, True, False]
        assert average[1:3].tolist() == [torch.inf, -torch.inf]
        assert average[4] > torch.finfo(dtype).max / 2


@CHECKS.collect(*[(dtype, rate) for dtype in SHORT for rate in (0.3, 1.0)])
def every_nan_stays_one_whatever_its_bits(on, dtype, rate):
    weight = torch.tensor([0x7F800001, 0x7FFFFFFF, -1, -0x7FFFFF], dtype=torch.int32, device=on).view(torch.float32)
    assert weight.isnan().all()
    average = torch.ones(4, dtype=dtype, device=on)
    cuda.FusedCUDA([[average]], [weight])([rate], [seeded], 0)
    assert average.isnan().all()


@CHECKS.collect(*[(dtype,) for dtype in WIDE + SHORT])
def a_rate_of_one_replaces_even_what_is_not_finite(on, dtype):
    average, weight = torch.full((2100,), torch.nan, dtype=dtype, device=on), torch.ones(2100, device=on)
    average[0] = torch.inf
    cuda.FusedCUDA([[average]], [weight])([1.0], [seeded], 0)
    assert torch.equal(average.float(), weight)


@CHECKS.collect(*[(dtype,) for dtype in WIDE])
def lanes_move_as_they_would_alone(on, dtype):
    weights, rates = random_tensors(on, torch.float32, 9), [0.9, 0.001, 1.0, 0.5]
    lanes = [random_tensors(on, dtype, seed) for seed in range(len(rates))]
    expected = [looped(lane, weights, rate) for lane, rate in zip(lanes, rates, strict=True)]
    cuda.FusedCUDA(lanes, weights)(rates, [seeded] * len(rates), 0)
    assert all(map(same_bits, lanes, expected))


@CHECKS.collect()
def each_lane_draws_from_its_own_generator(on):
    weight, seeds = torch.ones(5000, device=on), [0, 1, 0]
    lanes = [[torch.zeros(5000, dtype=torch.bfloat16, device=on)] for _ in seeds]
    generators = [lambda device, seed=seed: seeded(device, seed) for seed in seeds]
    state = torch.get_rng_state()
    cuda.FusedCUDA(lanes, [weight])([0.3] * len(seeds), generators, 0)
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(lanes[0][0], lanes[2][0])
    assert not torch.equal(lanes[0][0], lanes[1][0])


@CHECKS.collect()
def one_call_rounds_otherwise_than_the_next(on):
    generator = seeded(on)
    first, second = (torch.zeros(5000, dtype=torch.bfloat16, device=on) for _ in range(2))
    for average in (first, second):
        cuda.FusedCUDA([[average]], [torch.ones(5000, device=on)])([0.3], [lambda _: generator], 0)
    assert not torch.equal(first, second)
    # And no block otherwise as the block before.
    assert not torch.equal(first[:2048], first[2048:4096])


@CHECKS.collect(*[(dtype, value) for dtype in WIDE + SHORT for value in [math.nan, math.inf, -math.inf]])
def the_check_finds_one_value_that_is_not_finite(on, dtype, value):
    # One is aligned and one is not.
    weights = [torch.ones(2050, dtype=dtype, device=on), torch.ones(2051, dtype=dtype, device=on)[1:]]
    kernel = cuda.FusedCUDA([_copies(weights)], weights)
    assert kernel.finite()
    for tensor in weights:
        for place in (0, 2047, 2049):
            tensor[place] = value
            assert not kernel.finite()
            tensor[place] = 1.0
    assert kernel.finite()


@CHECKS.collect(*[(dtype,) for dtype in WIDE + SHORT])
def the_largest_and_smallest_values_are_finite(on, dtype):
    info = torch.finfo(dtype)
    weight = torch.tensor([info.max, info.min, info.tiny, info.smallest_normal, -0.0], dtype=dtype, device=on)
    assert cuda.FusedCUDA([[weight.clone()]], [weight]).finite()


@CHECKS.collect()
def looking_writes_only_what_it_finds(on):
    weight, found = torch.ones(3, device=on), torch.full((1,), 7, dtype=torch.int32, device=on)
    kernel = cuda.FusedCUDA([[weight.clone()]], [weight])
    kernel.look(found)
    assert found.item() == 7
    weight[1] = torch.nan
    kernel.look(found)
    assert found.item() == 1


@CHECKS.collect(*[(dtype,) for dtype in WIDE + SHORT])
def nothing_moves_while_the_guard_is_not_zero(on, dtype):
    averages, weights = random_tensors(on, dtype, 0), random_tensors(on, torch.float32, 1)
    before = _copies(averages)
    kernel = cuda.FusedCUDA([averages], weights)
    kernel.guard = torch.zeros(1, dtype=torch.int32, device=on)
    weights[0][-1] = torch.inf
    kernel.look(kernel.guard)
    for rate in (0.3, 1.0):
        kernel([rate], [seeded], 0)
        assert same_bits(averages, before)
    weights[0][-1] = 0.0
    kernel.look(kernel.guard.zero_())
    kernel([1.0], [seeded], 0)
    assert same_bits(averages, [tensor.to(dtype) for tensor in weights])


def _held(old, weight, rate):
    """Return what becomes of a wide average, and how many elements keep their old value."""
    weight = weight.to(old.dtype)
    moved = weight if rate == 1 else torch.lerp(old, weight, rate)
    moved = torch.where(old.isfinite(), moved, weight)
    return torch.where(moved.isfinite(), moved, old), int((~moved.isfinite()).sum())


def _strange(tensors, seed):
    values = [math.nan, math.inf, -math.inf, 3.3e38, -3.3e38]
    for number, tensor in enumerate(tensors):
        for place, value in enumerate(values):
            if tensor.numel():
                where = (seed + 7 * place + number) % tensor.numel()
                tensor[np.unravel_index(where, tensor.shape)] = value
    return tensors


@CHECKS.collect(*[(average, weight) for average in WIDE for weight in WIDE + SHORT])
def what_would_not_be_finite_is_held(on, average, weight):
    rates = [0.0, 0.3, 0.7, 1.0]
    lanes = [_strange(random_tensors(on, average, seed), seed) for seed in range(4)]
    weights = _strange(random_tensors(on, weight, 9), 3)
    expected = [
        [_held(*pair, rate) for pair in zip(lane, weights, strict=True)]
        for lane, rate in zip(lanes, rates, strict=True)
    ]
    kernel = cuda.FusedCUDA(lanes, weights)
    for _ in range(2):  # counts are of the last call
        kernel.prepare(moved=False, hold=True)
        kernel(rates, [seeded] * 4, 0)
        assert all(
            same_bits(lane, [value for value, _ in values]) for lane, values in zip(lanes, expected, strict=True)
        )
        assert kernel.held_each().tolist() == [[count for _, count in values] for values in expected]
        assert kernel.held.tolist() == [sum(count for _, count in values) for values in expected]
        expected = [
            [_held(*pair, rate) for pair in zip(lane, weights, strict=True)]
            for lane, rate in zip(lanes, rates, strict=True)
        ]


@CHECKS.collect(*[(dtype, rate) for dtype in SHORT for rate in (0.3, 1.0)])
def short_averages_hold_and_draw_as_without_strange_weights(on, dtype, rate):
    average, weight = torch.linspace(1, 3, 5000, device=on).to(dtype), torch.linspace(2, 4, 5000, device=on)
    clean, held = average.clone(), average.clone()
    cuda.FusedCUDA([[clean]], [weight])([rate], [seeded], 0)
    weight[[0, 2047, 4999]] = torch.tensor([math.nan, math.inf, -math.inf], device=on)
    held[5] = math.nan
    kernel = cuda.FusedCUDA([[held]], [weight])
    kernel.prepare(moved=False, hold=True)
    kernel([rate], [seeded], 0)
    assert kernel.held.tolist() == [3]
    clean[[0, 2047, 4999]] = average[[0, 2047, 4999]]
    assert abs(held[5] - weight[5]) < 0.02
    clean[5] = held[5]
    assert torch.equal(held, clean)


@CHECKS.collect()
def tensors_that_moved_are_followed(on):
    average, weight = torch.zeros(5000, device=on), torch.nn.Parameter(torch.ones(5000, device=on))
    kernel = cuda.FusedCUDA([[average]], [weight])
    weight.data = torch.full((5000,), 2.0, device=on)
    kernel.prepare(moved=True, hold=False)
    kernel([0.5], [seeded], 0)
    assert (average == 1.0).all()
    before, average.data = average.data, average.clone()
    kernel.prepare(moved=False, hold=False)
    kernel([0.5], [seeded], 0)
    assert (average == 1.5).all()
    assert (before == 1.0).all()
    # Back in memory that is not aligned.
    weight.data = torch.full((5001,), 3.5, device=on)[1:]
    kernel.prepare(moved=True, hold=False)
    kernel([0.5], [seeded], 0)
    assert (average == 2.5).all()


@CHECKS.collect(*[(dtype,) for dtype in [torch.float32, torch.float64]])
def rates_may_come_in_a_tensor_that_changes(on, dtype):
    lanes, weights = [random_tensors(on, torch.float64, seed) for seed in (0, 1)], random_tensors(on, torch.float32, 2)
    kernel = cuda.FusedCUDA(lanes, weights)
    rates = torch.tensor([0.25, 1.0], dtype=dtype, device=on)
    for values in ([0.25, 1.0], [0.5, 0.125]):
        rates.copy_(torch.tensor(values))
        expected = [looped(lane, weights, rate) for lane, rate in zip(lanes, values, strict=True)]
        kernel(rates, [seeded] * 2, 0)
        assert all(map(same_bits, lanes, expected))


@CHECKS.collect()
def a_number_is_sent_again_after_a_tensor_took_its_place(on):
    average, weights = random_tensors(on, torch.float32, 0), random_tensors(on, torch.float32, 1)
    kernel = cuda.FusedCUDA([average], weights)
    for rate in [0.25, 0.25, torch.tensor([0.5], device=on), 0.25, 0.125]:
        expected = looped(average, weights, float(rate))
        kernel.prepare(moved=False, hold=False)
        kernel(rate if isinstance(rate, torch.Tensor) else [rate], [seeded], 0)
        assert same_bits(average, expected)


@CHECKS.collect()
def an_interrupted_call_is_not_repeated(on):
    average, weight = torch.zeros(3, device=on), torch.ones(3, device=on)
    kernel = cuda.FusedCUDA([[average]], [weight])
    before = kernel.position()
    kernel([0.5], [seeded], 0)
    kernel([0.5], [seeded], kernel.position() - before)
    assert (average == 0.5).all()


@CHECKS.collect()
def autograd_knows_that_averages_changed(on):
    averages = [[torch.zeros(3, device=on), torch.zeros(2, device=on)] for _ in range(2)]
    kernel = cuda.FusedCUDA(averages, [torch.ones(3, device=on), torch.ones(2, device=on)])
    assert [tensor._version for lane in averages for tensor in lane] == [0] * 4
    kernel([0.5, 1.0], [seeded] * 2, 0)
    assert [tensor._version for lane in averages for tensor in lane] == [1] * 4


@CHECKS.collect()
def nothing_but_empty_tensors_is_moved_and_finite(on):
    empty = [torch.empty(0, device=on), torch.empty(3, 0, device=on)]
    kernel = cuda.FusedCUDA([_copies(empty)], empty)
    kernel([0.5], [seeded], 0)
    assert kernel.finite()


@CHECKS.collect()
def memory_beside_the_tensors_is_left_alone(on):
    storage = torch.zeros(5100, device=on)
    cuda.FusedCUDA([[storage[4:5004]]], [torch.ones(5000, device=on)])([1.0], [seeded], 0)
    assert storage.nonzero().flatten().tolist() == list(range(4, 5004))


if __name__ == "__main__":
    CHECKS.run()
