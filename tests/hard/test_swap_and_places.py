"""Where a swap meets autocast, other averagers, replaced forwards and shared memory."""

from __future__ import annotations

import threading

import pytest
import torch
from torch import nn

import polyak


def moved(**options):
    model = nn.Linear(8, 8)
    averager = polyak.average(model, "ema", decay=0.5, **options)
    with torch.no_grad():
        model.weight.add_(torch.randn(8, 8))
    averager.update()
    return model, averager, torch.randn(4, 8)


@torch.no_grad()
def test_an_enclosing_autocast_keeps_no_casts_across_a_swap():
    model, averager, x = moved()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        raw = model(x)
    with torch.autocast("cpu", dtype=torch.bfloat16), averager.applied():
        expected = model(x)
    with torch.enable_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(model(x), raw)
        with averager.applied():
            assert torch.equal(model(x), expected)
        assert torch.equal(model(x), raw)
        averager.copy_to()
        assert torch.equal(model(x), expected)


@pytest.mark.parametrize(
    "replaced",
    [lambda model: torch.compile(model.forward, backend="eager"), lambda model: lambda x: model.weight @ x.T],
    ids=["compiled", "lambda"],
)
def test_a_forward_that_no_copy_can_have_is_refused_and_applied_works(replaced):
    model, averager, x = moved()
    model.forward = replaced(model)
    with pytest.raises(polyak.ModelError, match="function as its own `forward`"):
        averager(x)
    raw = model(x)
    with averager.applied():
        assert not torch.equal(model(x), raw)


def test_a_module_compiled_in_place_that_cannot_be_copied_computes_with_the_average():
    model, averager, x = moved()
    model.lock = threading.Lock()
    model.compile(backend="eager")
    with averager.applied():
        expected = model(x)
    torch.testing.assert_close(averager(x), expected)


def test_a_compiled_part_of_a_model_that_cannot_be_copied_computes_with_the_average():
    model = nn.Sequential(torch.compile(nn.Linear(8, 8), backend="eager"), nn.ReLU(), nn.Linear(8, 2))
    model.lock = threading.Lock()
    averager, x = polyak.average(model, "ema", decay=0.5), torch.randn(4, 8)
    with torch.no_grad():
        model[0].weight.add_(1.0)
    averager.update()
    with averager.applied():
        expected = model(x)
    torch.testing.assert_close(averager(x), expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_stochastic_rounding_does_not_depend_on_the_default_dtype(dtype):
    def averaged():
        weights = {"w": torch.ones(4096, dtype=torch.float32)}
        averager = polyak.average(weights, "ema", decay=0.9999, dtype="bfloat16")
        weights["w"].fill_(2.0)
        for _ in range(5):
            averager.update()
        return averager.averages["w"].clone()

    expected = averaged()
    torch.set_default_dtype(dtype)
    try:
        assert torch.equal(averaged(), expected)
    finally:
        torch.set_default_dtype(torch.float32)


def test_a_generator_saved_on_a_gpu_loads_where_there_is_none():
    weights = {"w": torch.ones(64)}
    averager = polyak.average(weights, "ema", decay=0.9, dtype="bfloat16")
    averager.update()
    state = averager.state_dict()
    state["generators"] = (("cuda:3", torch.zeros(16, dtype=torch.uint8)),)
    averager.load_state_dict(state)
    averager.update()
    assert torch.equal(dict(averager.state_dict()["generators"])["cuda:3"], torch.zeros(16, dtype=torch.uint8))


def test_an_average_is_no_weights_to_start_another_one_from():
    model, averager, _ = moved()
    with averager.applied(), pytest.raises(polyak.AppliedError, match="holds another average"):
        polyak.average(model, "ema")


def test_a_tie_by_memory_keeps_the_survivors_average():
    model = nn.ModuleDict({"emb": nn.Linear(1, 1, bias=False), "head": nn.Linear(1, 1, bias=False)})
    with torch.no_grad():
        model["emb"].weight.fill_(100.0)
        model["head"].weight.fill_(1.0)
    averager = polyak.average(model, "ema", decay=0.5)
    model["emb"].weight.data = model["head"].weight.data
    averager.update()
    assert averager.averages["emb.weight"].item() == 1.0


def test_a_tensor_that_needs_scratch_memory_is_moved_before_those_that_need_none(monkeypatch):
    from polyak.kernels.eager import chunked

    model = nn.ParameterDict({"a": nn.Parameter(torch.zeros(3)), "b": nn.Parameter(torch.zeros(3).bfloat16())})

    def full(*_):
        message = "out of memory"
        raise torch.OutOfMemoryError(message)

    averager = polyak.average(model, "ema", decay=0.5, kernel="foreach")
    with torch.no_grad():
        model["a"].fill_(1.0)
        model["b"].fill_(1.0)
    with monkeypatch.context() as patch:
        patch.setattr(chunked.Chunked, "__call__", full)
        with pytest.raises(torch.OutOfMemoryError):
            averager.update()
    assert averager.n == 0
    averager.update()
    assert (averager.averages["a"].tolist(), averager.averages["b"].tolist()) == ([0.5] * 3, [0.5] * 3)


def test_a_strategy_cannot_choose_what_is_the_users():
    class Odd(polyak.SWA):
        def engine(self):
            return {"every": 3}

    with pytest.raises(polyak.ConfigError, match=r"Odd.engine\(\) names 'every'"):
        polyak.average(nn.Linear(2, 2), Odd())


def test_listeners_hear_of_the_updates_of_a_deep_copy():
    import copy

    _, averager, _ = moved()
    heard = []
    averager.updater.listeners.append(lambda a, clock: heard.append(clock.n))
    copy.deepcopy(averager).update()
    assert heard == [2]


def test_the_history_of_a_changing_rate_takes_24_bytes_an_update():
    weights = {"w": torch.zeros(1)}
    averager = polyak.average(weights, "swa", nonfinite="propagate")
    for _ in range(1000):
        averager.update()
    (history,) = averager.state_dict()["history"]
    assert sum(tensor.nbytes for tensor in history.values()) == 24_000
    assert averager.profile().shares.tolist() == pytest.approx([1e-3] * 1000)


def test_a_re_planned_model_costs_no_synchronisation_per_buffer():
    from torch.utils._python_dispatch import TorchDispatchMode

    class Reads(TorchDispatchMode):
        count = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            Reads.count += func is torch.ops.aten._local_scalar_dense.default
            return func(*args, **(kwargs or {}))

    model = nn.Sequential(*(nn.BatchNorm1d(3) for _ in range(10)))
    averager = polyak.average(model, "ema", nonfinite="propagate")
    model.load_state_dict({k: v.clone() for k, v in model.state_dict().items()}, assign=True)
    with Reads():
        averager.update()
    assert Reads.count == 0


def test_an_empty_batch_is_nothing_to_recalibrate_from():
    model = nn.BatchNorm1d(2)
    polyak.recalibrate(model, [torch.ones(3, 2), torch.ones(0, 2)])
    assert model.running_mean.tolist() == [1.0, 1.0]
