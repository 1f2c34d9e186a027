"""The fused kernel for CPUs: equal to the loop whatever the dtypes, lanes, slices, threads and interruptions."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch
from hypothesis import given, strategies as st
from torch import nn

import polyak
from interrupts import at_line
from models import average_bits, bits, drifting, mlp
from polyak.engine.plan import tensor_update
from polyak.kernels import threads
from polyak.kernels.cpu import fused as cpu
from polyak.kernels.eager import foreach
from polyak.kernels.select import KERNELS, compiles, kernel_for

if not compiles("auto"):
    pytest.skip("there is no compiler here", allow_module_level=True)

FLOATS = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
SHORT = [torch.bfloat16, torch.float16]
SHAPES = st.lists(st.lists(st.integers(0, 5), max_size=3).map(tuple), min_size=1, max_size=6)
RATES = st.floats(0, 1) | st.sampled_from([0.0, 1e-9, 0.5, 0.49999999, 1.0])


def _generator(device):
    return torch.Generator(device).manual_seed(0)


def _tensors(shapes, dtype, seed):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator).to(dtype) for shape in shapes]


def _moved(kernel, lanes, weights, rates):
    lanes = [[tensor.clone() for tensor in lane] for lane in lanes]
    if kernel == "fused":
        KERNELS["fused"](lanes, weights)(rates, [_generator] * len(lanes), 0)
    else:
        for lane, rate in zip(lanes, rates, strict=True):
            KERNELS[kernel]([lane], weights)([rate], [_generator], 0)
    return [[bits(tensor) for tensor in lane] for lane in lanes]


@pytest.mark.property
@given(
    shapes=SHAPES,
    average=st.sampled_from([torch.float32, torch.float64]),
    weight=st.sampled_from(FLOATS),
    rates=st.lists(RATES, min_size=1, max_size=4),
    seed=st.integers(0, 99),
)
def test_wide_averages_equal_the_loop_bit_for_bit_in_every_lane(shapes, average, weight, rates, seed):
    lanes = [_tensors(shapes, average, seed + lane) for lane in range(len(rates))]
    weights = _tensors(shapes, weight, seed + 50)
    assert _moved("fused", lanes, weights, rates) == _moved("loop", lanes, weights, rates)


@pytest.mark.parametrize("dtype", [torch.int64, torch.bool, torch.uint8, torch.float64, torch.complex64])
def test_what_is_copied_is_copied_bit_for_bit(dtype, many_slices):
    weights = [tensor.mul(9).to(dtype) for tensor in _tensors([(3, 5), (), (100,), (0,), (41, 3)], torch.float32, 0)]
    weights.append(weights[0].t())
    averages = [torch.zeros_like(weight) for weight in weights]
    assert {kernel_for(*pair, "auto", copied=True) for pair in zip(averages, weights, strict=True)} == {"compiled copy"}
    kernel = KERNELS["compiled copy"]([averages], weights)
    before = averages[0]._version
    for value in (1, 0):
        kernel.prepare(moved=False, hold=False)
        kernel([0.5], [_generator], 0)
        assert [*map(bits, averages)] == [*map(bits, weights)]
        assert kernel.position() > 0
        weights[0].fill_(value)
    assert averages[0]._version == before + 2


def test_what_is_no_plain_memory_of_the_same_values_is_copied_by_torch():
    turned, conjugated = torch.ones(2, 3).t(), torch.ones(3, 2, dtype=torch.complex64).conj()
    for average, weight in (
        (torch.ones(3, 2), turned),
        (torch.ones(3, 2, dtype=torch.complex64), conjugated),
        (torch.ones(3, dtype=torch.int32), torch.ones(3, dtype=torch.int64)),
        (torch.ones(3), torch.ones(1).expand(3)),
    ):
        assert kernel_for(average, weight, "auto", copied=True) == "copy"
    assert kernel_for(torch.ones(3), torch.ones(3), "foreach", copied=True) == "copy"


@pytest.mark.parametrize("average", [torch.float32, torch.float64])
@pytest.mark.parametrize("weight", FLOATS)
def test_pieces_and_threads_change_no_bit(average, weight, many_slices):
    shapes = [(3, 5), (), (100,), (0,), (41, 3)]
    lanes = [_tensors(shapes, average, lane) for lane in range(3)]
    weights = _tensors(shapes, weight, 9)
    rates = [0.1, 0.75, 1.0]
    assert _moved("fused", lanes, weights, rates) == _moved("loop", lanes, weights, rates)


@pytest.mark.parametrize("weight", FLOATS)
@pytest.mark.parametrize("dtype", SHORT)
@pytest.mark.parametrize("start", [1.0, -1.0, 3.1415, 1e-3, 2.0, 0.0, 1e-6])
def test_rounding_is_unbiased_and_only_to_a_neighbour(dtype, weight, start):
    count, rate = 200_000, 0.01
    average = torch.full((count,), start).to(dtype)
    weights = torch.full((count,), start + 0.1).to(weight)
    exact = average[0].float().lerp(weights[0].float(), rate)
    KERNELS["fused"]([[average]], [weights])([rate], [_generator], 0)
    values = average.unique().float()
    assert 1 <= len(values) <= 2
    if len(values) == 1:
        assert values.item() == exact
        return
    low, high = values.tolist()
    assert torch.nextafter(torch.tensor(low, dtype=dtype), torch.tensor(torch.inf, dtype=dtype)).item() == high
    assert low <= exact <= high
    spread = (high - low) / 2 / count**0.5
    assert abs(average.double().mean() - exact.double()) < 5 * spread


@pytest.mark.parametrize("dtype", SHORT)
def test_rounding_neighbouring_elements_and_updates_is_independent(dtype):
    up = []
    for seed in range(2):
        average = torch.ones(40_000).to(dtype)
        own = torch.Generator().manual_seed(seed)
        KERNELS["fused"]([[average]], [torch.full((40_000,), 1.1)])([0.0244], [lambda _, own=own: own], 0)
        up.append((average > average.min()).double())
    assert 0.1 < up[0].mean() < 0.9
    for one, other in [(up[0][1:], up[0][:-1]), (up[0][7:], up[0][:-7]), (up[0], up[1])]:
        assert abs(torch.corrcoef(torch.stack([one, other]))[0, 1]) < 0.025


@pytest.mark.property
@pytest.mark.parametrize("dtype", SHORT)
@given(value=st.floats(width=16, allow_nan=False, allow_infinity=False), rate=RATES)
def test_a_value_of_the_short_dtype_is_a_fixed_point(dtype, value, rate):
    weight = torch.full((20,), value).to(dtype)
    average = weight.clone()
    KERNELS["fused"]([[average]], [weight])([rate], [_generator], 0)
    assert torch.equal(average, weight)


@pytest.mark.parametrize("dtype", SHORT)
@pytest.mark.parametrize("live", [torch.float32, torch.float64])
def test_nan_infinities_and_the_largest_value_pass_through_rounding(dtype, live):
    largest = torch.finfo(dtype).max
    average = torch.tensor([1.0, 1.0, 1.0, torch.nan, largest, -largest]).to(dtype)
    weight = torch.tensor([torch.nan, torch.inf, -torch.inf, 1.0, largest, -largest], dtype=live)
    KERNELS["fused"]([[average]], [weight])([0.1], [_generator], 0)
    assert average.isnan().tolist() == [True, False, False, True, False, False]
    assert average[[1, 2, 4, 5]].tolist() == [torch.inf, -torch.inf, largest, -largest]


def test_rounding_draws_from_its_own_generator_only_and_not_to_replace():
    state = torch.get_rng_state()
    own = torch.Generator().manual_seed(3)
    fused = KERNELS["fused"]([[torch.zeros(9).bfloat16()]], [torch.ones(9)])
    drawn = own.get_state()
    fused([1.0], [lambda _: own], 0)
    assert torch.equal(own.get_state(), drawn)
    fused.prepare(moved=False, hold=False)
    fused([0.3], [lambda _: own], 0)
    assert not torch.equal(own.get_state(), drawn)
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("place", [0, 3, 17, 39])
def test_the_check_finds_one_value_that_is_not_finite(dtype, value, place):
    weights = [torch.full((40,), torch.finfo(dtype).max, dtype=dtype), torch.empty(0, dtype=dtype)]
    fused = KERNELS["fused"]([[weight.float() for weight in weights]], weights)
    assert fused.finite()
    weights[0][place] = value
    assert not fused.finite()


def test_memory_of_any_dense_order_is_moved_and_any_other_left_to_torch():
    model = nn.ParameterDict(
        {
            "channels_last": nn.Parameter(torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last)),
            "transposed": nn.Parameter(torch.randn(3, 4).t()),
            "holes": nn.Parameter(torch.randn(8, 8)[::2, ::2]),
            "complex": nn.Parameter(torch.randn(3, dtype=torch.complex64)),
        }
    )
    pair = [polyak.average(model, "ema", decay=0.7, kernel=kernel) for kernel in ("fused", "loop")]
    names = {line.split()[0]: line.split()[-3] for line in pair[0].describe().splitlines()[2:]}
    assert {name for name, kernel in names.items() if kernel == "fused"} == {"channels_last", "transposed"}
    for _ in drifting(model, 3):
        for averager in pair:
            averager.update()
    assert average_bits(pair[0]) == average_bits(pair[1])


def test_new_data_in_a_parameter_and_shared_averages_are_found_again():
    model = mlp()
    fused, loop = (polyak.average(model, "ema", decay=0.5, kernel=kernel) for kernel in ("fused", "loop"))
    for number in range(4):
        model[0].weight.data = torch.full((5, 3), float(number))
        if number == 2:
            fused.averages["0.bias"].share_memory_()
        fused.update()
        loop.update()
        assert average_bits(fused) == average_bits(loop)


def test_a_rate_next_to_one_is_one_where_float32_says_so():
    for decay in (1e-9, 1e-8, 3e-8, 1e-7):
        averages = []
        for kernel in ("fused", "loop"):
            model = nn.Linear(1, 1, bias=False)
            nn.init.zeros_(model.weight)
            averager = polyak.average(model, "ema", decay=decay, kernel=kernel)
            nn.init.constant_(model.weight, 5.0)
            averager.update()
            averages.append(averager.averages["weight"].item())
        assert averages[0] == averages[1], decay


def test_finite_values_are_not_rounded_to_infinity():
    average, weight = torch.full((10_000,), 65504.0).half(), torch.full((10_000,), 65519.0)
    KERNELS["fused"]([[average]], [weight])([0.5], [_generator], 0)
    assert average.eq(65504).all()
    KERNELS["fused"]([[average]], [torch.full((10_000,), 65600.0)])([0.9], [_generator], 0)
    assert average.isinf().all()


def test_an_error_on_another_thread_is_raised_once(many_slices, monkeypatch):
    fused = KERNELS["fused"]([[torch.zeros(100)]], [torch.ones(100)])

    def fail(_):
        raise MemoryError

    with monkeypatch.context() as patch:
        patch.setattr(fused, "_move", fail)
        with pytest.raises(MemoryError):
            fused([0.5], [_generator], 0)
    fused.prepare(moved=False, hold=False)
    fused([0.5], [_generator], 0)
    assert fused._lanes[0][0].eq(0.5).all()


@pytest.mark.parametrize("kernel", ["fused", "foreach", "loop"])
def test_weights_whose_memory_was_freed_are_refused_before_anything_is_written(kernel):
    model = mlp()
    averager = polyak.average(model, "ema", decay=0.5, kernel=kernel)
    averager.update()
    before, size = average_bits(averager), model[2].weight.untyped_storage().nbytes()
    model[2].weight.untyped_storage().resize_(0)
    with pytest.raises(polyak.ModelError, match=r"1 of the model's tensors \(the first of shape \(2, 5\)\)"):
        averager.update()
    assert (average_bits(averager), averager.n) == (before, 1)
    model[2].weight.untyped_storage().resize_(size)
    with torch.no_grad():
        model[2].weight.fill_(1.0)
    averager.update()
    assert averager.n == 2


def test_autograd_notices_that_a_saved_average_was_moved():
    model = mlp()
    averager = polyak.average(model, "ema", decay=0.5, kernel="fused")
    x = torch.ones(1, 3, requires_grad=True)
    loss = averager(x).sum()
    averager.update()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@pytest.mark.parametrize("options", [{}, {"dtype": "bfloat16"}], ids=str)
def test_ctrl_c_at_any_line_with_several_threads_leaves_the_old_or_the_new_average(options, many_slices):
    model = mlp()
    averager = polyak.average(model, "ema", decay=0.7, kernel="fused", **options)
    for _ in drifting(model, 3):
        averager.update()
    state, old = averager.state_dict(), average_bits(averager)
    next(drifting(model, 1, seed=5))
    modules = (tensor_update, cpu, foreach, threads)
    with at_line(modules) as lines:
        averager.update()
    new = average_bits(averager)
    assert len(lines) > 50
    for k, line in enumerate(lines):
        averager.load_state_dict(state)
        averager.averaged_state_dict()
        try:
            with at_line(modules, k):
                averager.update()
        except KeyboardInterrupt:
            pass
        else:
            # How many lines are run depends on which thread takes which slice.
            assert k > len(lines) // 2
        found = average_bits(averager), averager.n
        if options and averager.n == 4:
            continue  # rounding may have drawn again
        assert found in [(old, 3), (new, 4)], line


def test_a_forked_process_averages_with_threads_of_its_own(many_slices):
    weights = torch.ones(100)
    average = torch.zeros(100)
    KERNELS["fused"]([[average]], [weights])([0.5], [_generator], 0)
    child = os.fork()
    if not child:
        fused = KERNELS["fused"]([[average]], [weights])
        fused([0.5], [_generator], 0)
        os._exit(0 if average.eq(0.75).all() else 1)
    assert os.waitpid(child, 0)[1] == 0


def _python(code, **variables):
    return subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=False, env={**os.environ, **variables}
    )


WITHOUT = "import sys; sys.modules['numba'] = None\n"
BROKEN = """
import sys, types, importlib.machinery
sys.modules["numba"] = types.ModuleType("numba")
sys.modules["numba"].__spec__ = importlib.machinery.ModuleSpec("numba", None)
"""
USE = "import polyak, torch; print(polyak.average(torch.nn.Linear(2, 1), 'ema', kernel={!r}).describe())"


def test_without_numba_the_kernels_of_torch_are_used_and_nothing_is_said():
    done = _python(WITHOUT + USE.format("auto"))
    assert (done.returncode, done.stderr) == (0, "")
    assert "foreach" in done.stdout
    assert "fused" not in done.stdout


def test_without_numba_the_fused_kernel_is_refused_with_what_to_install():
    done = _python(WITHOUT + USE.format("fused"))
    assert done.returncode == 1
    assert "MissingExtraError: kernel='fused' needs Numba" in done.stderr
    assert "pip install numba" in done.stderr


def test_a_broken_numba_warns_once_and_the_kernels_of_torch_are_used():
    done = _python(BROKEN + USE.format("auto") + "\n" + USE.format("auto"))
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("PolyakWarning: numba is installed but compiles no kernel (ImportError") == 1
    assert done.stdout.count("foreach") == 4


def test_a_numba_that_is_not_to_compile_is_as_none():
    done = _python(USE.format("auto"), NUMBA_DISABLE_JIT="1")
    assert (done.returncode, done.stderr) == (0, "")
    assert "fused" not in done.stdout
    done = _python(USE.format("fused"), NUMBA_DISABLE_JIT="1")
    assert "MissingExtraError" in done.stderr
    assert "unset NUMBA_DISABLE_JIT" in done.stderr
