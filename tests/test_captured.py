"""Updates inside compiled steps: the rate is read from a tensor, and the host's part is called beside."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch

import polyak
from models import ZOO, average_bits, drifting, mlp

READY = {"capturable": True, "nonfinite": "propagate"}


@pytest.fixture(autouse=True)
def _fresh_compiler():
    torch.compiler.reset()
    yield
    torch.compiler.reset()


@pytest.mark.parametrize("strategy", ["ema", "swa", "ema_debiased"])
@pytest.mark.parametrize("kind", ["mlp", "tied", "conv", "complex", "mixed_dtypes"])
def test_a_compiled_update_equals_the_plain_one_bit_for_bit_and_is_compiled_once(kind, strategy):
    model, graphs = ZOO[kind].build(), []

    def backend(graph, _):
        graphs.append(graph)
        return graph.forward

    captured = polyak.average(model, strategy, **READY)
    plain = polyak.average(model, strategy, nonfinite="propagate", kernel="loop")

    @torch.compile(backend=backend, fullgraph=True)
    def step():
        captured.update()

    for _ in drifting(model, 5):
        captured.advance()
        step()
        plain.update()
        assert (captured.n, captured.rate) == (plain.n, plain.rate)
    assert average_bits(captured) == average_bits(plain)
    assert len(graphs) == 1


def test_a_whole_step_is_one_graph_with_the_update_in_it():
    model, graphs = mlp(), []

    def backend(graph, _):
        graphs.append(graph)
        return graph.forward

    averager = polyak.average(model, "ema", decay=0.5, **READY)

    @torch.compile(backend=backend, fullgraph=True)
    def step(x):
        weights = dict(model.named_parameters())
        loss = lambda weights: torch.func.functional_call(model, weights, (x,)).square().sum()
        gradients = torch.func.grad(loss)({name: weight.detach() for name, weight in weights.items()})
        with torch.no_grad():
            for name, weight in weights.items():
                weight.sub_(0.1 * gradients[name])
        averager.update()

    expected = averager.averages["0.weight"].clone()
    for _ in range(4):
        averager.advance()
        step(torch.ones(2, 3))
        expected.lerp_(model[0].weight.detach(), 0.5)
    assert torch.equal(averager.averages["0.weight"], expected)
    assert not averager.averages["0.weight"].requires_grad
    assert len(graphs) == 1


def test_a_step_of_an_optimiser_may_be_compiled_with_it():
    # torch itself cuts such a graph inside of its optimisers.
    model = mlp()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    averager = polyak.average(model, "ema", decay=0.5, **READY)
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)

    @torch.compile(backend="eager")
    def step():
        optimizer.step()
        averager.update()

    expected = averager.averages["0.weight"].clone()
    for number in range(1, 5):
        averager.advance()
        step()
        expected.lerp_(model[0].weight.detach(), 0.5)
        assert averager.n == number
    assert torch.equal(averager.averages["0.weight"], expected)


def test_a_step_that_is_not_due_moves_nothing():
    model = mlp()
    averager = polyak.average(model, "ema", decay=0.5, every=3, **READY)
    alike = polyak.average(model, "ema", decay=0.5, every=3)
    step = torch.compile(averager.update, backend="eager", fullgraph=True)
    for _ in drifting(model, 7):
        averager.advance()
        step()
        alike.update()
        assert average_bits(averager) == average_bits(alike)
    assert averager.n == 2


@pytest.fixture
def _eager_steps():
    torch.compiler.set_stance("force_eager")
    yield
    torch.compiler.set_stance("default")


@pytest.mark.usefixtures("_eager_steps")
@pytest.mark.parametrize("every", [1, 2])
def test_a_compiled_step_that_runs_eagerly_counts_once(every):
    model = mlp()
    averager = polyak.average(model, "swa", every=every, **READY)
    alike = polyak.average(model, "swa", every=every)
    step = torch.compile(averager.update, backend="eager")
    for _ in drifting(model, 5):
        averager.advance()
        step()
        alike.update()
        assert (averager.n, average_bits(averager)) == (alike.n, average_bits(alike))


@pytest.mark.usefixtures("_eager_steps")
def test_a_compiled_bank_that_runs_eagerly_counts_once():
    model, wanted = mlp(), {"a": {"name": "ema", "decay": 0.5}, "b": "swa"}
    bank, alike = polyak.bank(model, wanted, **READY), polyak.bank(model, wanted)
    step = torch.compile(bank.update, backend="eager")
    for _ in drifting(model, 3):
        bank.advance()
        step()
        alike.update()
        for name in wanted:
            assert (bank[name].n, average_bits(bank[name])) == (alike[name].n, average_bits(alike[name]))


@pytest.mark.usefixtures("_eager_steps")
def test_an_announced_update_inside_applied_is_refused_where_it_runs_eagerly():
    model = mlp()
    averager = polyak.average(model, "ema", **READY)
    averager.advance()
    before = average_bits(averager)
    with averager.applied(), pytest.raises(polyak.AppliedError, match="leave applied"):
        averager.update()
    assert average_bits(averager) == before


def test_an_announcement_is_used_up_by_one_update():
    model = mlp()
    averager, alike = polyak.average(model, "swa", **READY), polyak.average(model, "swa")
    updates = [torch.compile(averager.update, backend="eager", fullgraph=True), averager.update]
    for (number, _), update in zip(enumerate(drifting(model, 6)), updates * 3, strict=True):
        if number % 2 == 0:
            averager.advance()
        update()
        alike.update()
        assert (averager.n, average_bits(averager)) == (alike.n, average_bits(alike))


def test_a_compiled_update_that_nobody_announced_is_made_and_warned_of_once():
    model = mlp()
    averager, alike = polyak.average(model, "swa", **READY), polyak.average(model, "swa")

    @torch.compile(backend="eager")
    def step():
        averager.update()

    def one():
        step()
        alike.update()
        assert (averager.n, average_bits(averager)) == (alike.n, average_bits(alike))

    moments = drifting(model, 6)
    next(moments)
    with pytest.warns(polyak.PolyakWarning, match=r"advance\(\) was not called before the step"):
        one()
    for number, _ in enumerate(moments):  # a second warning would be an error
        if number in {1, 2}:
            averager.advance()
        one()


def test_one_graph_of_a_step_that_nobody_announced_is_refused_by_the_compiler():
    averager = polyak.average(mlp(), "ema", **READY)
    step = torch.compile(averager.update, backend="eager", fullgraph=True)
    with pytest.raises(torch._dynamo.exc.Unsupported, match="by_host"):
        step()
    assert averager.n == 0


def test_outside_of_a_graph_update_does_all_of_it():
    model = mlp()
    averager, alike = polyak.average(model, "ema", **READY), polyak.average(model, "ema")
    for _ in drifting(model, 3):
        averager.update()
        alike.update()
    assert average_bits(averager) == average_bits(alike)


def test_the_rate_is_a_tensor_that_is_written_in_place():
    averager = polyak.average(mlp(), "ema", decay=0.75, **READY)
    (rate,) = averager.updater._captured._rates.values()
    where = rate.data_ptr()
    averager.advance()
    assert (rate.item(), rate.data_ptr()) == (0.25, where)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (
            {"capturable": True, "nonfinite": "skip"},
            "nonfinite='skip', which counts an update after a look at its weights",
        ),
        ({**READY, "dtype": "bfloat16"}, r"an average in a short dtype \(0.weight\)"),
    ],
)
def test_what_no_graph_records_is_refused(options, says):
    with pytest.raises(polyak.ConfigError, match=says):
        polyak.average(mlp(), "ema", **options)


def test_advance_is_refused_where_nothing_is_captured():
    with pytest.raises(polyak.ConfigError, match="build the averager with capturable=True"):
        polyak.average(mlp(), "ema").advance()


def test_tensors_that_were_replaced_since_are_refused():
    model = mlp()
    averager = polyak.average(model, "ema", **READY)
    averager.advance()
    model[0].weight = torch.nn.Parameter(torch.ones(5, 3))
    with pytest.raises(polyak.MismatchError, match="a graph keeps those that it was captured with"):
        averager.advance()
    assert averager.n == 1


def test_a_step_that_is_not_due_copies_nothing_and_meets_no_infinity():
    model = ZOO["conv"].build()
    averager = polyak.average(model, "ema", decay=0.5, every=2, **READY)
    step = torch.compile(averager.update, backend="eager", fullgraph=True)
    weight = next(model.parameters())
    for _ in drifting(model, 4):
        averager.advance()
        if averager.state_dict()["step"] % 2:
            before, kept = average_bits(averager), weight.detach().clone()
            weight.data.fill_(torch.inf)
            step()
            weight.data.copy_(kept)
            assert average_bits(averager) == before
        else:
            step()


def test_a_copied_or_unpickled_averager_goes_on():
    model = mlp()
    averager = polyak.average(model, "ema", **READY)
    copied = copy.deepcopy(averager)
    step = torch.compile(copied.update, backend="eager", fullgraph=True)
    copied.advance()
    step()
    assert copied.n == 1
    unpickled = pickle.loads(pickle.dumps(averager))
    unpickled.update(model)
    unpickled.advance()
    assert unpickled.n == 2


def test_what_changes_no_tensor_is_no_reason_to_refuse():
    model = mlp()
    averager = polyak.average(model, "ema", **READY)
    averager.update(mlp())
    averager.advance()
    model.add_module("probe", torch.nn.Identity())
    averager.averaged_state_dict()
    del model.probe
    averager.advance()
    assert averager.n == 3


def test_memory_that_moved_is_refused():
    model = mlp()
    averager = polyak.average(model, "ema", **READY)
    averager.advance()
    model[0].weight.data = torch.ones(5, 3)
    with pytest.raises(polyak.MismatchError, match="replaced or moved"):
        averager.advance()


def test_a_resumed_averager_goes_on_in_a_step_that_is_compiled_after_it():
    model = mlp()
    first, alike = polyak.average(model, "swa", **READY), polyak.average(model, "swa")
    for _ in drifting(model, 3):
        first.update()
        alike.update()
    resumed = polyak.average(model, "swa", **READY)
    resumed.load_state_dict(first.state_dict())
    step = torch.compile(resumed.update, backend="eager", fullgraph=True)
    for _ in drifting(model, 3, seed=7):
        resumed.advance()
        step()
        alike.update()
    assert (resumed.n, average_bits(resumed)) == (alike.n, average_bits(alike))


def test_a_bank_is_compiled_too():
    model = mlp()
    wanted = {"a": {"name": "ema", "decay": 0.5}, "b": "swa"}
    bank, alike = polyak.bank(model, wanted, **READY), polyak.bank(model, wanted)
    step = torch.compile(bank.update, backend="eager", fullgraph=True)
    for _ in drifting(model, 3):
        bank.advance()
        step()
        alike.update()
    for name in wanted:
        assert average_bits(bank[name]) == average_bits(alike[name])


@pytest.mark.gpu
def test_a_cuda_graph_moves_the_average_by_the_rate_of_each_replay():
    model = mlp().cuda()
    captured = polyak.average(model, "swa", **READY)
    plain = polyak.average(model, "swa", nonfinite="propagate")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured.update()
    for _ in drifting(model, 5):
        captured.advance()
        graph.replay()
        plain.update()
    assert average_bits(captured) == average_bits(plain)
