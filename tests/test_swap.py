"""Putting the average in and out: nested, of several averagers, beside graphs, in little memory."""

from __future__ import annotations

import gc
import subprocess
import sys
from contextlib import ExitStack

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import polyak
from models import Buffers, Conv, Shapes, Tied, average_bits, bits, drifting, mlp, model_bits
from swaps import moved_once

# Leaving the context, whatever happens


def test_an_exception_inside_restores_and_goes_on():
    model, averager = moved_once()
    own, stored = model_bits(model), average_bits(averager)
    with pytest.raises(ZeroDivisionError), averager.applied():
        1 / 0  # noqa: B018 - an exception of the user's own
    assert model_bits(model) == own
    assert average_bits(averager) == stored
    assert not averager.is_applied


def test_contexts_nest_and_only_the_outermost_swaps():
    model, averager = moved_once()
    own = model_bits(model)
    with averager.applied():
        inside = model_bits(model)
        with averager.applied():
            assert model_bits(model) == inside
            assert averager.is_applied
        assert model_bits(model) == inside
        assert averager.is_applied
    assert model_bits(model) == own


def test_one_context_cannot_be_entered_twice():
    _, averager = moved_once()
    context = averager.applied()
    with context:
        pass
    with pytest.raises((RuntimeError, AttributeError)), context:
        pass


def test_a_generator_closed_early_restores_the_model():
    model, averager = moved_once()
    own = model_bits(model)

    def predictions():
        with averager.applied():
            for _ in range(3):
                yield model(torch.ones(1, 3))

    running = predictions()
    next(running)
    assert averager.is_applied
    running.close()
    assert not averager.is_applied
    assert model_bits(model) == own


def test_a_generator_forgotten_half_way_restores_the_model():
    model, averager = moved_once()
    own = model_bits(model)

    def predictions():
        with averager.applied():
            yield 1

    running = predictions()
    next(running)
    del running
    gc.collect()
    assert not averager.is_applied
    assert model_bits(model) == own


# Two averagers


@pytest.mark.parametrize("dtypes", [("auto", "auto"), ("auto", "float64"), ("float64", "auto"), ("float64", "float64")])
def test_two_averagers_of_one_model_nest(dtypes):
    model = mlp()
    slow, fast = (
        polyak.average(model, "ema", decay=decay, dtype=dtype) for decay, dtype in zip((0.9, 0.5), dtypes, strict=True)
    )
    for _ in drifting(model, 3):
        slow.update()
        fast.update()
    own, of_slow, of_fast = model_bits(model), average_bits(slow), average_bits(fast)
    with slow.applied():
        first = model_bits(model)
        with fast.applied():
            second = model_bits(model)
            assert second not in (own, first)
        assert model_bits(model) == first
    assert model_bits(model) == own
    assert (average_bits(slow), average_bits(fast)) == (of_slow, of_fast)


@pytest.mark.parametrize("dtype", ["auto", "float64"])
def test_the_outer_averager_knows_its_average_while_another_one_is_applied(dtype):
    model = mlp()
    outer, inner = (polyak.average(model, "ema", decay=decay, dtype=dtype) for decay in (0.9, 0.5))
    for _ in drifting(model, 3):
        outer.update()
        inner.update()
    expected, x = average_bits(outer), torch.ones(1, 3)
    forward = outer(x).clone()
    with outer.applied(), inner.applied():
        assert average_bits(outer) == expected
        assert {n: bits(t) for n, t in outer.state_dict()["slots"]["average"].items()} == expected
        assert torch.equal(outer(x), forward)
    assert torch.equal(outer(x), forward)


def test_no_averager_updates_while_another_one_is_applied_to_its_model():
    model = mlp()
    applied, other, part = polyak.average(model), polyak.average(model), polyak.average(model[0])
    named = polyak.average(dict(model.named_parameters()))
    with applied.applied():
        with other.applied():
            pass
        for averager in (other, part, named):
            before = average_bits(averager)
            with pytest.raises(polyak.AppliedError, match="average the average"):
                averager.update()
            assert (average_bits(averager), averager.n) == (before, 0)
    for averager in (other, part, named):
        averager.update()


def test_an_averager_of_a_mapping_refuses_updates_while_another_one_is_applied():
    weights = {"w": torch.ones(3)}
    applied, other = polyak.average(weights), polyak.average(weights)
    with applied.applied(), pytest.raises(polyak.AppliedError):
        other.update()


def test_leaving_two_averagers_in_the_wrong_order_corrupts_nothing():
    model = mlp()
    first, second = polyak.average(model, "ema", decay=0.9), polyak.average(model, "ema", decay=0.5)
    for _ in drifting(model, 3):
        first.update()
        second.update()
    before = model_bits(model), average_bits(first), average_bits(second)
    one, two = first.applied(), second.applied()
    with ExitStack() as stack:
        one.__enter__()
        two.__enter__()
        stack.callback(lambda: two.__exit__(None, None, None))
        one.__exit__(None, None, None)
    assert (model_bits(model), average_bits(first), average_bits(second)) == before


# What training sees


def test_the_optimiser_steps_the_same_objects_after_a_swap():
    model, averager = moved_once(Conv)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.1)
    objects = [id(p) for p in model.parameters()]
    model(torch.randn(2, 3, 8, 8)).sum().backward()
    with averager.applied():
        pass
    before = model_bits(model)
    optimizer.step()
    assert [id(p) for p in model.parameters()] == objects
    assert [id(p) for group in optimizer.param_groups for p in group["params"]] == objects
    assert all(model_bits(model)[name] != before[name] for name, _ in model.named_parameters())


def test_a_graph_recorded_before_applied_still_backpropagates_after_it():
    model, averager = moved_once(Conv)
    model.eval()
    x = torch.randn(2, 3, 8, 8)
    expected = torch.autograd.grad(model(x).square().sum(), list(model.parameters()))
    loss = model(x).square().sum()
    with averager.applied(), torch.no_grad():
        model(x)
    loss.backward()
    assert [bits(p.grad) for p in model.parameters()] == [bits(grad) for grad in expected]


def test_a_graph_recorded_inside_applied_backpropagates_inside_it():
    model, averager = moved_once()
    with averager.applied():
        model(torch.ones(2, 3)).square().sum().backward()
    other = mlp()
    other.load_state_dict(averager.averaged_state_dict())
    other(torch.ones(2, 3)).square().sum().backward()
    for (_, parameter), (_, same) in zip(model.named_parameters(), other.named_parameters(), strict=True):
        assert torch.equal(parameter.grad, same.grad)


def test_a_compiled_forward_sees_the_applied_average_and_is_not_compiled_again():
    torch.compiler.reset()  # torch compiles a function anew only so many times, and other tests count
    model, averager = moved_once()
    graphs = []

    def backend(graph, _):
        graphs.append(graph)
        return graph.forward

    compiled = torch.compile(model, backend=backend)
    x = torch.ones(2, 3)
    with torch.no_grad():
        own = compiled(x)
        with averager.applied():
            averaged = compiled(x)
        assert torch.equal(compiled(x), own)
    assert torch.equal(averaged, averager(x))
    assert not torch.equal(averaged, own)
    assert len(graphs) == 1
    torch.compiler.reset()


@pytest.mark.parametrize("around", [torch.inference_mode, torch.no_grad, torch.enable_grad], ids=lambda m: m.__name__)
def test_a_swap_under_any_grad_mode_restores_the_model(around):
    model, averager = moved_once(Buffers)
    own, stored = model_bits(model), average_bits(averager)
    with around(), averager.applied():
        model(torch.ones(1, 3))
    assert model_bits(model) == own
    assert average_bits(averager) == stored
    averager.update()
    model(torch.ones(1, 3)).sum().backward()


def test_a_model_of_inference_tensors_swaps_and_updates():
    with torch.inference_mode():
        model = mlp()
    averager = polyak.average(model, "ema", decay=0.5)
    with torch.inference_mode():
        for _ in drifting(model, 1):
            averager.update()
    own, stored = model_bits(model), average_bits(averager)
    with averager.applied():
        assert model_bits(model) == stored
    assert model_bits(model) == own
    averager.update()


# Odd memory


def test_an_expanded_buffer_is_averaged_and_swapped_through_its_one_value():
    model, averager = moved_once(Buffers)
    stride = model.expanded.stride()
    expected = averager.averages["expanded"].clone()
    with averager.applied():
        assert torch.equal(model.expanded, expected)
    assert model.expanded.stride() == stride == (1, 0)


def test_overlapping_views_get_their_own_bits_back():
    model, averager = moved_once(Shapes)
    own, stored = model_bits(model), average_bits(averager)
    for _ in range(3):
        with averager.applied():
            pass
    assert model_bits(model) == own
    assert average_bits(averager) == stored


class _Peak(TorchDispatchMode):
    """Measures the most bytes that storages made inside it took at one time."""

    def __init__(self) -> None:
        super().__init__()
        self.peak = 0
        self._alive: dict[int, tuple[object, int]] = {}

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        known = {t.untyped_storage()._cdata for t in args if isinstance(t, torch.Tensor)}
        result = function(*args, **(kwargs or {}))
        if isinstance(result, torch.Tensor) and result.untyped_storage()._cdata not in known:
            reference = torch._C._WeakTensorRef(result)
            self._alive[id(reference)] = (reference, result.untyped_storage().nbytes())
        alive = {key: value for key, value in self._alive.items() if not value[0].expired()}
        self._alive = alive
        self.peak = max(self.peak, sum(size for _, size in alive.values()))
        return result


def _layers(dtype=torch.float32):
    return nn.Sequential(*(nn.Linear(64, 64, bias=False) for _ in range(8))).to(dtype)


def test_a_swap_needs_one_tensors_worth_of_extra_memory():
    model, averager = moved_once(_layers)
    one = model[0].weight.nbytes
    with _Peak() as memory, averager.applied():
        pass
    assert 0 < memory.peak <= one


def test_a_swap_of_a_differently_stored_average_needs_one_copy_of_the_model():
    model, averager = moved_once(lambda: _layers(torch.bfloat16))
    size = sum(p.nbytes for p in model.parameters())
    with _Peak() as memory, averager.applied():
        pass
    assert size <= memory.peak <= size + model[0].weight.nbytes


def test_an_update_in_one_dtype_needs_no_extra_memory_for_the_model():
    _, averager = moved_once(_layers, nonfinite="propagate")
    with _Peak() as memory:
        averager.update()
    assert memory.peak == 0


@pytest.mark.parametrize("times", [1, 9])
def test_a_model_that_cannot_be_made_ready_gets_its_own_weights_back_all_the_same(times, monkeypatch):
    model, averager = moved_once(Tied)
    own, stored = model_bits(model), average_bits(averager)
    failures = iter([RuntimeError("a rank is gone")] * times)

    def unready(_):
        for failure in failures:
            raise failure

    def evaluate():
        with averager.applied():
            assert model_bits(model) != own
            monkeypatch.setattr(averager.plan.adapter, "before_swap", unready)

    with pytest.raises(RuntimeError, match="a rank is gone"):
        evaluate()
    assert (model_bits(model), average_bits(averager), averager.is_applied) == (own, stored, False)


LEFT_OPEN = """
import sys, threading
from contextlib import ExitStack
import torch, polyak
model = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.BatchNorm1d(2))
averager = polyak.average(model, "ema", decay=0.5)
model[0].weight.data.add_(1)
averager.update()
def generator():
    with averager.applied():
        yield
def thread():
    global kept
    kept = averager.applied()
    kept.__enter__()
if sys.argv[1] == "context":
    kept = averager.applied()
    kept.__enter__()
elif sys.argv[1] == "stack":
    kept = ExitStack()
    kept.enter_context(averager.applied())
elif sys.argv[1] == "generator":
    kept = generator()
    next(kept)
elif sys.argv[1] == "thread":
    one = threading.Thread(target=thread)
    one.start()
    one.join()
else:
    sys.modules["kept"] = averager.applied()
    sys.modules["kept"].__enter__()
assert averager.is_applied
"""


@pytest.mark.parametrize("how", ["context", "stack", "generator", "thread", "module"])
def test_left_open_until_the_interpreter_exits_it_prints_nothing(how):
    done = subprocess.run(
        [sys.executable, "-c", LEFT_OPEN, how], capture_output=True, text=True, timeout=100, check=False
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
