"""Small tensors side by side, moved as one: the same bits as one by one, in any order and of any sizes."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, strategies as st
from torch import nn

import polyak
from models import average_bits, drifting
from polyak.kernels.eager.coalesce import runs_of
from polyak.kernels.select import bind
from polyak.tensors.memory import clones

CHUNK = 1 << 20
# Vectors that leave no gaps between averages, and others among them.
JOINING = st.lists(st.sampled_from([(16,), (64,), (80,)]), max_size=40)
OTHERS = st.lists(st.sampled_from([(7,), (1,), (3, 4), (), (5000,)]), max_size=3)
SHAPES = st.tuples(JOINING, OTHERS).map(lambda two: [*two[0], *two[1]]).filter(bool).flatmap(st.permutations)


def _generator(device):
    return torch.Generator(device).manual_seed(0)


def _stored(weights):
    return clones(weights, [(weight.device, weight.dtype) for weight in weights])


@pytest.mark.property
@given(SHAPES, st.sampled_from([torch.float32, torch.float64]), st.floats(0, 1, width=32), st.integers(1, 3))
def test_runs_equal_the_loop_bit_for_bit(shapes, dtype, rate, lanes):
    torch.manual_seed(0)
    start = [torch.randn(shape, dtype=dtype) for shape in shapes]
    weights = [torch.randn(shape, dtype=dtype) for shape in shapes]
    joined, alone = [_stored(start) for _ in range(lanes)], [_stored(start) for _ in range(lanes)]
    rates = [rate / (lane + 1) for lane in range(lanes)]
    with torch.no_grad():
        kernel = bind("foreach", joined, weights)
        kernel.prepare(moved=True, hold=False)
        kernel(rates, [_generator] * lanes, 0)
        for averages, own in zip(alone, rates, strict=True):
            loop = bind("loop", [averages], weights)
            loop.prepare(moved=True, hold=False)
            loop([own], [_generator], 0)
    for ours, theirs in zip(joined, alone, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


def test_vectors_whose_averages_lie_side_by_side_are_one_run_whatever_lies_between_them_in_the_model():
    weights = [torch.randn(shape) for _ in range(8) for shape in ((64,), (3, 16), (128,))]
    found = runs_of([_stored(weights)], weights, CHUNK)
    assert [len(run.weights) for run in found.runs] == [16]
    assert [run.averages[0].shape for run in found.runs] == [(8 * 192,)]
    assert len(found.weights) == 8


@pytest.mark.parametrize(
    "weights",
    [
        [torch.zeros(64)] * 15,  # too few
        [torch.zeros(7)] * 20,  # with gaps between them
        [torch.zeros(8192)] * 20,
        [torch.zeros(64, dtype=torch.int64)] * 20,
        [torch.zeros(64, 2)[:, 0]] * 20,
        [torch.zeros(64, device="meta")] * 20,
    ],
)
def test_what_gains_nothing_is_moved_alone(weights):
    found = runs_of([_stored(weights)], weights, CHUNK)
    assert not found.runs
    assert len(found.weights) == len(weights)


def test_no_more_is_joined_than_fits_the_scratch_memory():
    weights = [torch.zeros(64) for _ in range(100)]
    for most, lengths in ((6400, [100]), (6399, [99]), (1024, [16]), (960, [])):
        found = runs_of([_stored(weights)], weights, most)
        assert [len(run.weights) for run in found.runs] == lengths
        assert len(found.weights) == 100 - sum(lengths)


def test_averages_of_their_own_memory_are_moved_alone():
    weights = [torch.zeros(64) for _ in range(20)]
    assert not runs_of([[weight.clone() for weight in weights]], weights, CHUNK).runs


def test_a_model_of_norms_is_averaged_as_by_the_loop_and_after_new_memory_of_its_weights():
    def averaged(kernel):
        torch.manual_seed(0)
        model = nn.Sequential(*(layer for _ in range(6) for layer in (nn.Linear(16, 16), nn.BatchNorm1d(16))))
        averager = polyak.average(model, "ema", decay=0.9, kernel=kernel)
        for step in drifting(model, 6):
            if step == 3:
                for parameter in model.parameters():
                    parameter.data = parameter.data.clone()
            averager.update()
        return averager

    ours = averaged("foreach")
    group = next(g for g in ours.plan.moves.groups if g.kernel.name == "foreach")
    assert group.kernel._runs.runs
    assert average_bits(ours) == average_bits(averaged("loop"))


def test_neighbours_in_memory_that_are_no_views_of_one_tensor_are_left_alone():
    storage = torch.zeros(20 * 8).untyped_storage()
    averages = [torch.empty(0).set_(storage, 8 * i, (8,), (1,)) for i in range(20)]
    weights = [torch.full((8,), float(i)) for i in range(20)]
    joined = runs_of([averages], weights, 1 << 20)
    assert not joined.runs
    assert len(joined.weights) == 20
