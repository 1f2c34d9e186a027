"""The fused kernel for CUDA: it equals the reference loop, in Triton's interpreter here and on a GPU with ``-m gpu``.

A check is a function of a device. Without a GPU a child process runs all of them on the CPU, since Triton looks
for its interpreter when it is imported; each check is a test all the same. The kernel is also compiled for GPUs.
"""

from __future__ import annotations

import os
import re

import pytest
import torch

import cuda_checks
from cuda_checks import CHECKS, SHORT, WIDE, looped, random_tensors, same_bits, seeded
from interpreted import results_of
from polyak.errors import RateError
from polyak.kernels.cuda import fused as cuda
from polyak.kernels.rounding import rounds_once

# Interpreters of older releases do not run on today's numpy without its warnings, which are errors here.
pytest.importorskip("triton", minversion="3.4")


# On the CPU, in Triton's interpreter


@pytest.fixture(scope="module")
def interpreted():
    # The kernel rounds a product and its sum once, as GPUs do.
    if not rounds_once() and "ATEN_CPU_CAPABILITY" not in os.environ:
        pytest.skip("torch rounds twice on this processor")
    return results_of(cuda_checks.__file__)


@pytest.mark.parametrize("check", CHECKS)
def test_in_the_interpreter(interpreted, check):
    assert interpreted[check] == "", interpreted[check]


# Compiled for GPUs that need not be there

NAMES = {torch.float32: "fp32", torch.float64: "fp64", torch.bfloat16: "bf16", torch.float16: "fp16"}


@pytest.fixture
def compiled(tmp_path, monkeypatch):
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))  # found nowhere, so compiled here
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    def compile_for(capability, function, pointers, **constants):
        integers = dict.fromkeys(function.arg_names, "i32")
        signature = integers | pointers | dict.fromkeys(constants, "constexpr")
        source = ASTSource(function, signature, constexprs=constants)
        return triton.compile(source, target=GPUTarget("cuda", capability, 32), options={"enable_fp_fusion": False}).asm

    return compile_for


def _widths(ptx, access):
    """Return how many bytes each access of memory takes at once."""
    found = re.findall(rf"{access}\.global(?:\.v(\d))?\.b(\d+)", ptx)
    return {int(count or 1) * int(size) // 8 for count, size in found}


@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.parametrize("average", WIDE + SHORT, ids=str)
@pytest.mark.parametrize("weight", WIDE + SHORT, ids=str)
@pytest.mark.parametrize("hold", [False, True], ids=["propagate", "hold"])
def test_moving_compiles_and_writes_sixteen_bytes_at_a_time(compiled, capability, average, weight, hold):
    import triton.language as tl

    from polyak.kernels.cuda import loops

    rate = "*fp64" if average == torch.float64 else "*fp32"
    pointers = {"tensors": "*i32", "blocks": "*i32", "table": "*i64", "guard": "*i32"}
    pointers |= {"held": "*i64", "counts": "*i32"}
    pointers |= {"rates": rate, "seeds": "*i64" if average in SHORT else rate}
    kinds = {"average": tl.dtype(NAMES[average]), "weight": tl.dtype(NAMES[weight])}
    code = compiled(capability, loops.move, pointers, **kinds, hold=hold, block=cuda._BLOCK)
    assert code["cubin"]
    assert max(_widths(code["ptx"], "ld")) == max(_widths(code["ptx"], "st")) == 16
    assert "fma.rn.f64" in code["ptx"] if average == torch.float64 else "fma.rn.f32" in code["ptx"]


@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.parametrize("weight", WIDE + SHORT, ids=str)
def test_looking_compiles_and_reads_sixteen_bytes_at_a_time(compiled, capability, weight):
    import triton.language as tl

    from polyak.kernels.cuda import loops

    known = cuda._FLOATS[weight]
    pointers = {"tensors": "*i32", "blocks": "*i32", "table": "*i64", "found": "*i32"}
    kinds = {"like": getattr(tl, known.bits), "exponent": known.exponent}
    code = compiled(capability, loops.find, pointers, **kinds, block=cuda._BLOCK)
    assert code["cubin"]
    assert max(_widths(code["ptx"], "ld")) == 16


# Which pairs it takes


def test_tensors_of_the_cpu_are_left_to_others():
    assert not cuda.fits(torch.zeros(3), torch.zeros(3))


# On a GPU: deselected unless asked for by -m gpu


@pytest.mark.gpu
@pytest.mark.parametrize("check", CHECKS)
def test_on_a_gpu(check):
    CHECKS[check]("cuda")


@pytest.mark.gpu
def test_dense_pairs_of_one_gpu_fit_and_others_do_not():
    average, weight = torch.zeros(4, 5, device="cuda"), torch.nn.Parameter(torch.zeros(4, 5, device="cuda"))
    assert cuda.fits(average, weight)
    assert cuda.fits(average.bfloat16(), weight)
    assert not cuda.fits(average.cpu(), weight)
    assert not cuda.fits(average.t().contiguous().t(), weight)
    assert not cuda.fits(average[:, ::2], weight[:, ::2].detach())
    assert not cuda.fits(average, weight.detach().int())


@pytest.fixture
def captured():
    """A captured call of two lanes: averages, weights, rates and the graph, which reads the kernel's table."""
    lanes, weights = (
        [random_tensors("cuda", torch.float32, seed) for seed in (0, 1)],
        random_tensors("cuda", torch.bfloat16, 2),
    )
    kernel, rates = cuda.FusedCUDA(lanes, weights), torch.tensor([0.25, 1.0], device="cuda")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        kernel(rates, [seeded] * 2, 0)
    yield lanes, weights, rates, graph
    del kernel  # a graph keeps no tensor alive: until here its replays read the kernel's table


@pytest.mark.gpu
def test_a_replayed_graph_moves_by_the_rates_and_weights_of_that_time(captured):
    lanes, weights, rates, graph = captured
    for values in ([0.25, 1.0], [0.5, 0.125]):
        rates.copy_(torch.tensor(values))
        weights[0].add_(1)
        expected = [looped(lane, weights, rate) for lane, rate in zip(lanes, values, strict=True)]
        graph.replay()
        assert all(map(same_bits, lanes, expected))


@pytest.mark.gpu
def test_a_number_as_rate_is_refused_while_a_graph_is_captured():
    average, weight = torch.zeros(3, device="cuda"), torch.ones(3, device="cuda")
    kernel, graph = cuda.FusedCUDA([[average]], [weight]), torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        weight.add_(1)  # of an empty graph torch warns
        with pytest.raises(RateError, match="expected a tensor on the device"):
            kernel([0.5], [seeded], 0)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_an_update_waits_for_nothing_and_launches_at_most_five_kernels(dtype):
    weights = [torch.nn.Parameter(torch.randn(1000, 800, device="cuda")) for _ in range(150)]
    kernel = cuda.FusedCUDA([[weight.detach().to(dtype, copy=True) for weight in weights]], weights)
    generator = seeded("cuda")

    def update(rate):
        kernel.prepare(moved=True, hold=False)
        kernel([rate], [lambda _: generator], 0)

    update(0.1)
    torch.cuda.synchronize()
    activities = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities, acc_events=True) as profile:
        with torch.profiler.record_function("update"):
            update(0.2)
        torch.cuda.synchronize()
    events = [event for event in profile.events() if event.device_type == torch.autograd.DeviceType.CPU]
    (span,) = [event.time_range for event in events if event.name == "update"]
    inside = [event.name for event in events if span.start <= event.time_range.start <= span.end]
    assert not [name for name in inside if "Synchronize" in name]
    assert 1 <= len([name for name in inside if "LaunchKernel" in name]) <= 5
