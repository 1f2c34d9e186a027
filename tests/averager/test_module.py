"""The averaged module: in step with the average, and none of the model's."""

from __future__ import annotations

import copy
import pickle
import threading

import pytest
import torch
from torch import nn

import polyak
from evaluations import used
from models import ZOO, Conv, Recurrent, drifting, mlp, model_bits

# The module


@pytest.mark.parametrize("kind", ZOO.values(), ids=str)
def test_the_module_is_in_eval_mode_and_kept_in_step(kind):
    model = kind.build()
    averager = polyak.average(model, "ema", decay=0.5)
    module, x = averager.module, kind.example()
    assert not any(part.training for part in module.modules())
    assert type(module) is type(model)
    for _ in drifting(model, 3):
        averager.update()
        assert averager.module is module
        model.eval()
        with torch.no_grad():
            result = module(x)
            if kind.name != "shapes":  # whose overlapping parameters cannot hold two averages at once
                with averager.applied():
                    assert torch.equal(model(x), result)
        model.train()


def test_the_module_costs_no_memory_where_the_average_is_stored_alike():
    averager = used(mlp())
    for name, parameter in averager.module.named_parameters():
        assert parameter.data_ptr() == averager.averages[name].data_ptr()


def test_the_module_has_the_models_dtype_and_follows_a_wider_average():
    model = mlp().bfloat16()
    averager = used(model, decay=0.5)
    module = averager.module
    for _ in drifting(model, 2):
        averager.update()
    averager(torch.ones(1, 3, dtype=torch.bfloat16))
    for name, parameter in module.named_parameters():
        assert parameter.dtype == torch.bfloat16
        assert torch.equal(parameter, averager.averages[name].bfloat16())


def test_the_module_stays_in_step_after_a_load():
    model = mlp()
    averager = used(model, decay=0.5)
    module, state, x = averager.module, averager.state_dict(), torch.ones(1, 3)
    expected = module(x).clone()
    for _ in drifting(model, 2):
        averager.update()
    assert not torch.equal(module(x), expected)
    averager.load_state_dict(state)
    assert torch.equal(module(x), expected)
    assert averager.module is module
    for _ in drifting(model, 1, seed=5):
        averager.update()
    assert torch.equal(module(x), averager(x))
    assert not torch.equal(module(x), expected)


def test_the_module_is_no_part_of_the_model_s_training():
    model = Conv()
    averager = used(model)
    before = model_bits(model)
    averager(torch.randn(2, 3, 8, 8))
    averager.module(torch.randn(2, 3, 8, 8))
    assert model_bits(model) == before
    assert model.training
    assert averager(torch.randn(2, 3, 8, 8)).grad_fn is None


def test_a_call_passes_all_arguments_on():
    class Two(nn.Linear):
        def forward(self, x, *, scale):
            return super().forward(x) * scale

    averager = polyak.average(Two(2, 2))
    x = torch.ones(1, 2)
    assert torch.equal(averager(x, scale=2.0), 2 * averager(x=x, scale=1.0))


def test_the_module_follows_a_part_of_the_model_that_was_replaced():
    model = mlp()
    averager = used(model)
    x = torch.ones(2, 3)
    averager(x)
    model[1] = nn.Sigmoid()
    model.eval()
    with averager.applied(), torch.no_grad():
        expected = model(x)
    assert torch.equal(averager(x), expected)


def test_the_module_shares_the_parameters_of_the_model_that_are_not_averaged():
    model = mlp()
    averager = used(model, exclude="2.*")
    assert torch.equal(averager.module[2].weight, model[2].weight)
    assert averager.module[2].weight.data_ptr() == model[2].weight.data_ptr()
    model[2].weight = nn.Parameter(torch.zeros(2, 5))
    model[2].bias = nn.Parameter(torch.ones(2))
    assert averager(torch.ones(1, 3)).tolist() == [[1.0, 1.0]]


def test_a_compiled_module_is_compiled_once_and_in_step_with_updates_and_loads():
    torch.compiler.reset()  # torch compiles a function anew only so many times, and other tests count
    model, graphs, x = mlp(), [], torch.ones(1, 3)
    averager = used(model, decay=0.5)

    def backend(graph, _):
        graphs.append(graph)
        return graph.forward

    compiled = torch.compile(averager.module, backend=backend)
    start, state = compiled(x).clone(), averager.state_dict()
    for _ in drifting(model, 3):
        averager.update()
        assert torch.equal(compiled(x), averager(x))
    averager.load_state_dict(state)
    assert torch.equal(compiled(x), start)
    assert len(graphs) == 1
    torch.compiler.reset()


def test_the_module_can_be_exported():
    averager, x = used(mlp()), torch.ones(1, 3)
    exported = torch.export.export(averager.module, (x,)).module()
    assert torch.equal(exported(x), averager(x))


def test_a_pickled_module_stands_for_itself():
    model, x = mlp(), torch.ones(1, 3)
    averager = used(model, decay=0.5)
    expected = averager(x).clone()
    copies = pickle.loads(pickle.dumps(averager.module)), copy.deepcopy(averager.module)
    for _ in drifting(model, 2):
        averager.update()
    for module in copies:
        assert torch.equal(module(x), expected)


def test_a_tie_made_after_the_module_was_disturbs_nothing():
    model = nn.Sequential(nn.Linear(2, 2, bias=False), nn.Linear(2, 2, bias=False))
    averager = used(model, decay=0.5)
    old = averager.module
    model[1].weight = model[0].weight
    averager.update()
    x = torch.ones(1, 2)
    with averager.applied(), torch.no_grad():
        expected = model(x)
    assert torch.equal(averager(x), expected)
    assert averager.module[0].weight is averager.module[1].weight
    old(x)


def test_a_mapping_has_no_module_and_says_so():
    averager = polyak.average({"w": torch.ones(2)})
    with pytest.raises(polyak.ModelError, match="no forward"):
        averager.module  # noqa: B018 - reading it raises
    with averager.applied():
        pass


class Stubborn(nn.Module):
    """Cannot be deep-copied or pickled, and refers to its parts from lists, dictionaries and bound methods."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(3, 3)
        self.norm = nn.BatchNorm1d(3)
        self.lock = threading.Lock()
        self.generator = torch.Generator()
        self.parts = [self.layer, {"norm": self.norm}]
        self.run = self._run

    def _run(self, x):
        with self.lock:
            return self.parts[1]["norm"](self.parts[0](x))

    def forward(self, x):
        return self.run(x)

    def __deepcopy__(self, memo):
        raise RuntimeError(memo)


def cached():
    model = mlp()
    model.cache = model[0].weight * 2  # a tensor with a history, which deepcopy refuses
    return model


def used_weight_norm():
    model = ZOO["old_weight_norm"].build()
    model(torch.ones(1, 3)).sum().backward()
    return model


@pytest.mark.parametrize("build", [Stubborn, cached, used_weight_norm, Recurrent], ids=lambda build: build.__name__)
def test_models_that_resist_copying_compute_with_the_average(build):
    model = build()
    x = torch.randn(4, 3) if build is not Recurrent else torch.randn(2, 5, 3)
    averager = polyak.average(model, "ema", decay=0.5)
    for _ in drifting(model, 3):
        averager.update()
    before = model_bits(model)
    model.eval()
    with torch.no_grad():
        result = averager(x)
        assert not torch.equal(result, model(x))
        with averager.applied():
            assert torch.equal(model(x), result)
    assert model_bits(model) == before
