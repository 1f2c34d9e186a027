"""Who may compute with an average, and what may be done to the model meanwhile."""

from __future__ import annotations

import asyncio
import threading
import warnings
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrize
from torch.nn.utils.parametrizations import weight_norm

import polyak
from interrupts import AtOperation
from models import ZOO, Conv, Shapes, Tied, average_bits, bits, drifting, mlp, model_bits
from polyak.tensors import owner


def moved(build=mlp, **options):
    model = build()
    averager = polyak.average(model, "ema", decay=0.5, **options)
    for _ in drifting(model, 2):
        averager.update()
    return model, averager, (model_bits(model), average_bits(averager))


def now(model, averager):
    return model_bits(model), average_bits(averager)


def holds_average(model, averager):
    stored = averager.averages
    return all(torch.equal(p, stored[name].to(p.dtype)) for name, p in model.named_parameters() if name in stored)


# Whose average it is


@pytest.mark.parametrize("dtype", ["auto", "float64"])
@pytest.mark.parametrize("order", [(0, 1, 2), (1, 0, 2), (2, 0, 1), (0, 2, 1)])
def test_contexts_of_one_averager_are_left_in_any_order(order, dtype):
    model, averager, before = moved(dtype=dtype)
    contexts = [averager.applied() for _ in range(3)]
    for context in contexts:
        context.__enter__()
    for number in order:
        assert averager.is_applied
        assert holds_average(model, averager)
        contexts[number].__exit__(None, None, None)
    assert not averager.is_applied
    assert now(model, averager) == before
    with averager.applied():
        assert holds_average(model, averager)
    assert now(model, averager) == before


def test_another_task_is_refused_and_enters_once_the_first_has_left():
    model, averager, before = moved()

    async def first(inside, leave):
        with averager.applied():
            inside.set()
            await leave.wait()
            assert holds_average(model, averager)

    async def second():
        with averager.applied():
            await asyncio.sleep(0)
            return holds_average(model, averager)

    async def both():
        inside, leave = asyncio.Event(), asyncio.Event()
        task = asyncio.create_task(first(inside, leave))
        await inside.wait()
        with pytest.raises(polyak.AppliedError, match="another task of this event loop"):
            await second()
        with pytest.raises(polyak.AppliedError, match="average the average"):
            averager.update()
        leave.set()
        await task
        return await second()

    assert asyncio.run(both())
    assert now(model, averager) == before


def test_tasks_that_evaluate_together_never_see_raw_weights_nor_lose_them():
    model, averager, before = moved()

    async def evaluate():
        for _ in range(20):
            try:
                with averager.applied():
                    for _ in range(3):
                        await asyncio.sleep(0)
                        assert holds_average(model, averager)
            except polyak.AppliedError:
                await asyncio.sleep(0)

    async def all_of_them():
        await asyncio.gather(*(evaluate() for _ in range(4)))

    asyncio.run(all_of_them())
    assert not averager.is_applied
    assert now(model, averager) == before


def test_another_averager_of_the_model_is_refused_to_another_task():
    model, averager, _ = moved()
    other, elsewhere = polyak.average(model[0]), polyak.average(mlp())

    async def enter(one):
        with one.applied():
            return True

    async def run():
        with averager.applied():
            with pytest.raises(polyak.AppliedError, match="another task"):
                await asyncio.create_task(enter(other))
            return await asyncio.create_task(enter(elsewhere))

    assert asyncio.run(run())


def test_an_event_loop_that_runs_inside_of_a_context_nests():
    model, averager, before = moved()

    async def evaluate():
        with averager.applied():
            await asyncio.sleep(0)
            assert holds_average(model, averager)

    async def two():
        await asyncio.gather(evaluate(), evaluate())

    with averager.applied():
        asyncio.run(two())
        assert holds_average(model, averager)
    assert now(model, averager) == before


def test_an_asynchronous_generator_that_another_task_closes_restores_the_weights():
    model, averager, before = moved()

    async def predictions():
        with averager.applied():
            yield 1
            yield 2

    async def run():
        running = predictions()
        await anext(running)
        await asyncio.create_task(running.aclose())

    asyncio.run(run())
    assert not averager.is_applied
    assert now(model, averager) == before


@pytest.mark.parametrize("averagers", [1, 2])
def test_threads_that_evaluate_wait_for_each_other(averagers):
    model, averager, before = moved()
    others = [averager, polyak.average(model, "ema", decay=0.9)][:averagers]

    def evaluate(number):
        own = others[number % averagers]
        for _ in range(25):
            with own.applied(), own.applied():
                assert holds_average(model, own)
        return True

    with ThreadPoolExecutor(4) as pool:
        assert [*pool.map(evaluate, range(4))] == [True] * 4
    assert not averager.is_applied
    assert now(model, averager) == before


def in_a_thread(call):
    """Return what a call raises in another thread, or None."""
    raised: list[BaseException | None] = []

    def run():
        try:
            call()
        except BaseException as error:  # noqa: BLE001 - the caller looks at it
            raised.append(error)
        else:
            raised.append(None)

    thread = threading.Thread(target=run, daemon=True)  # one that hangs keeps no process from ending
    thread.start()
    thread.join(60)
    assert raised, "the call has not returned"
    return raised[0]


def enter(averager):
    with averager.applied():
        pass


def test_threads_inside_of_a_context_compute_with_the_average():
    model, averager, _ = moved()
    x = torch.ones(1, 3)
    expected = averager(x)
    with torch.no_grad(), averager.applied(), ThreadPoolExecutor(2) as pool:
        assert all(torch.equal(y, expected) for y in pool.map(model, [x] * 4))


def test_a_thread_that_is_inside_of_a_context_is_refused_the_model_of_another_thread():
    mine, averager, before = moved()
    _, other, _ = moved()

    def both():
        with other.applied(), averager.applied():
            pass

    with averager.applied():
        error = in_a_thread(both)
        assert isinstance(error, polyak.AppliedError)
        assert "is inside another applied() itself" in str(error)
        assert holds_average(mine, averager)
    assert not other.is_applied
    assert now(mine, averager) == before


def test_an_event_loop_is_not_stopped_for_another_thread():
    _, averager, _ = moved()

    async def evaluate():
        enter(averager)

    with averager.applied():
        error = in_a_thread(lambda: asyncio.run(evaluate()))
    assert isinstance(error, polyak.AppliedError)
    assert "event loop, which would stop" in str(error)


def test_a_context_that_a_thread_left_open_is_not_waited_for_and_may_be_closed_elsewhere():
    model, averager, before = moved()
    context = averager.applied()
    assert in_a_thread(context.__enter__) is None
    with pytest.raises(polyak.AppliedError, match="ended without leaving it"):
        enter(averager)
    context.__exit__(None, None, None)
    assert now(model, averager) == before
    enter(averager)


def test_a_long_wait_warns_and_names_the_thread(monkeypatch):
    monkeypatch.setattr(owner, "_PATIENCE", 0.0)
    _, averager, _ = moved()
    warned = threading.Event()
    messages = []

    def note(message, *_, **__):
        messages.append(message)
        warned.set()

    with monkeypatch.context() as patch, ThreadPoolExecutor(1) as pool:
        patch.setattr(warnings, "warn", note)
        with averager.applied():
            waiting = pool.submit(enter, averager)
            assert warned.wait(60)
        waiting.result(60)
    assert "waits for thread 'MainThread'" in messages[0]


def test_ctrl_c_while_a_thread_waits_leaves_the_other_ones_average_in(monkeypatch):
    model, averager, before = moved()

    def interrupted(*_, **__):
        raise KeyboardInterrupt

    with averager.applied():
        inside = model_bits(model)
        with monkeypatch.context() as patch:
            patch.setattr(owner.Owner, "wait", interrupted)
            assert isinstance(in_a_thread(lambda: enter(averager)), KeyboardInterrupt)
        assert (model_bits(model), averager.is_applied) == (inside, True)
    assert now(model, averager) == before
    enter(averager)


# Graphs


def loss_of(model):
    return model(torch.ones(2, 3)).square().sum()


def versions(model):
    return [tensor._version for tensor in (*model.parameters(), *model.buffers())]


@pytest.mark.parametrize("kind", ZOO.values(), ids=str)
def test_autograd_counts_after_a_context_as_before_it(kind):
    model, averager, _ = moved(kind.build)
    before = versions(model)
    with averager.applied():
        pass
    assert versions(model) == before


def test_a_graph_recorded_inside_is_refused_afterwards_however_many_steps_later():
    model, averager, before = moved()
    with averager.applied():
        loss = loss_of(model)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward(retain_graph=True)
    with averager.applied(), pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward(retain_graph=True)
    assert now(model, averager) == before
    for _ in drifting(model, 3):
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            loss.backward(retain_graph=True)


def test_a_graph_recorded_before_is_refused_inside_and_valid_afterwards():
    model, averager, _ = moved()
    expected = torch.autograd.grad(loss_of(model), list(model.parameters()))
    loss = loss_of(model)
    with averager.applied():
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            loss.backward(retain_graph=True)
        loss_of(model).backward()
    model.zero_grad()
    loss.backward()
    assert [bits(p.grad) for p in model.parameters()] == [bits(grad) for grad in expected]


def test_graphs_of_two_averagers_belong_to_their_own_values():
    model, averager, _ = moved()
    other = polyak.average(model, "ema", decay=0.9)
    first, second = averager.applied(), other.applied()
    first.__enter__()
    of_first = loss_of(model)
    second.__enter__()
    of_second = loss_of(model)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        of_first.backward(retain_graph=True)
    first.__exit__(None, None, None)
    of_second.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        of_first.backward(retain_graph=True)
    second.__exit__(None, None, None)
    for loss in (of_first, of_second):
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            loss.backward(retain_graph=True)


@pytest.mark.parametrize("build", [Tied, Shapes, Conv])
def test_ctrl_c_in_a_swap_leaves_autograds_counts_alone(build):
    model, averager, _ = moved(build)
    before = versions(model)
    enter(averager)  # plans
    with AtOperation() as counter:
        enter(averager)
    for k in range(0, counter.seen, 7):
        with pytest.raises(KeyboardInterrupt), AtOperation(k):
            enter(averager)
        assert versions(model) == before


# Writes


def step(model):
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    loss_of(model).backward()
    optimizer.step()


def load(model):
    model.load_state_dict(mlp().state_dict())


def assign(model):
    model.load_state_dict({name: tensor + 1 for name, tensor in model.state_dict().items()}, assign=True)


def one(model):
    with torch.no_grad():
        model[2].bias.zero_()


@pytest.mark.parametrize("write", [step, load, assign, one])
@pytest.mark.parametrize("dtype", ["auto", "float64"])
def test_parameters_that_are_written_inside_are_warned_of(write, dtype):
    model, averager, (own, _) = moved(dtype=dtype)
    objects = [id(p) for p in model.parameters()]
    with (
        pytest.warns(polyak.PolyakWarning, match=r"parameters were written inside \(.*2\.bias\)") as caught,
        averager.applied(),
    ):
        write(model)
    assert caught[0].filename == __file__
    assert model_bits(model) == own
    assert [id(p) for p in model.parameters()] == objects
    averager.update()


class ScheduleFree(torch.optim.SGD):
    """Evaluates at another point than it trains at, as facebookresearch's schedule-free optimisers do."""

    def moved(self, weight):
        with torch.no_grad():
            for param in self.param_groups[0]["params"]:
                param.lerp_(torch.ones_like(param), weight)

    def eval(self):
        self.moved(0.5)

    def train(self):
        self.moved(-1.0)


def test_an_optimiser_that_is_put_in_eval_mode_inside_is_warned_of_and_may_be_so_around():
    model, averager, _ = moved()
    optimizer = ScheduleFree(model.parameters(), lr=0.1)
    with pytest.warns(polyak.PolyakWarning, match="parameters were written inside"), averager.applied():
        optimizer.eval()
    before = [param.detach().clone() for param in model.parameters()]
    optimizer.eval()
    with averager.applied():
        assert holds_average(model, averager)
    optimizer.train()
    assert all(torch.allclose(param, own) for param, own in zip(model.parameters(), before, strict=True))


def test_a_write_inside_does_not_replace_an_exception():
    model, averager, (own, _) = moved()

    def fail():
        one(model)
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError), averager.applied():
        fail()
    assert model_bits(model) == own


def test_a_write_inside_of_the_inner_of_two_averagers_is_warned_of_once():
    model, averager, (own, _) = moved()
    other = polyak.average(model, "ema")
    with averager.applied(), pytest.warns(polyak.PolyakWarning, match="written inside"), other.applied():
        one(model)
    assert model_bits(model) == own


def test_evaluating_and_batch_norm_are_nothing_to_warn_of():
    model, averager, _ = moved(Conv)
    x = torch.randn(4, 3, 8, 8)
    with averager.applied():
        model.eval()(x)
    before = averager.averages["norm.running_mean"].clone()
    with averager.applied():
        model.train()(x)
    # What the statistics became is the average's.
    assert not torch.equal(averager.averages["norm.running_mean"], before)


# Layers that put other tensors in the place of their weights


class Packed(nn.Linear):
    """Packs its weight at the first forward, as 4-bit layers do."""

    def __init__(self, how):
        super().__init__(4, 4)
        self.how = how

    def forward(self, x):
        if self.weight.shape == (4, 4) and self.weight.dtype == torch.float32 and not self.training:
            packed = self.weight.detach().to(torch.float16)
            if self.how == "data":
                self.weight.data = packed.view(torch.uint8).view(-1, 2).float()
            elif self.how == "dtype":
                self.weight.data = packed
            elif self.how == "parameter":
                self.weight = nn.Parameter(packed.view(torch.uint8).view(-1, 2), requires_grad=False)
            else:
                self.weight.data = self.weight.data.t()
            return x
        return super().forward(x)


@pytest.mark.parametrize("how", ["data", "dtype", "parameter", "view"])
@pytest.mark.parametrize("dtype", ["auto", "float64"])
def test_a_layer_that_repacks_its_weight_gets_it_back_and_our_error(how, dtype):
    model, averager, before = moved(lambda: nn.Sequential(Packed(how), nn.Linear(4, 2)), dtype=dtype)
    weight = model[0].weight
    model.eval()
    with pytest.raises(polyak.AppliedError, match=r"another shape or dtype inside \(0\.weight\)"), averager.applied():
        model(torch.ones(1, 4))
    assert model[0].weight is weight
    assert now(model, averager) == before
    assert not averager.is_applied
    averager.update()


def test_a_model_that_is_halved_inside_gets_its_float32_weights_back():
    model, averager, before = moved()
    with pytest.raises(polyak.AppliedError, match="another shape or dtype"), averager.applied():
        model.half()
    assert now(model, averager) == before


def test_an_exception_of_a_layer_that_has_repacked_its_weight_stays_the_exception():
    model, averager, before = moved(lambda: nn.Sequential(Packed("data")))
    model.eval()

    def fail():
        model(torch.ones(1, 4))
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError), averager.applied():
        fail()
    assert now(model, averager) == before


def test_memory_of_the_same_form_inside_is_followed():
    model, averager, before = moved()
    with averager.applied():
        for p in model.parameters():
            p.data = p.data.clone()
    assert now(model, averager) == before


# Weights that parametrizations keep computed


def normed():
    return nn.Sequential(weight_norm(nn.Linear(3, 4)), nn.Linear(4, 2))


@torch.no_grad()
def test_cached_parametrizations_are_those_of_the_values_that_the_model_has():
    model, averager, before = moved(normed)
    other = polyak.average(model, "ema", decay=0.9)
    x = torch.ones(1, 3)
    own = model(x)
    with averager.applied():
        averaged = model(x)
    with parametrize.cached():
        assert torch.equal(model(x), own)
        with averager.applied():
            assert torch.equal(model(x), averaged)
            with other.applied():
                assert torch.equal(model(x), own)
            assert torch.equal(model(x), averaged)
        assert torch.equal(model(x), own)
        averager.copy_to()
        assert torch.equal(model(x), averaged)
    assert now(model, averager)[1] == before[1]
    assert not parametrize._cache


@torch.no_grad()
def test_a_cache_that_begins_or_ends_inside_of_a_context_stays_of_its_values():
    model, averager, _ = moved(normed)
    x = torch.ones(1, 3)
    own = model(x)
    with averager.applied():
        averaged = model(x)
    context = averager.applied()
    context.__enter__()
    with parametrize.cached():
        assert torch.equal(model(x), averaged)
        context.__exit__(None, None, None)
        assert torch.equal(model(x), own)
    context = averager.applied()
    with parametrize.cached():
        model(x)
        context.__enter__()
        model(x)
    context.__exit__(None, None, None)
    with parametrize.cached():
        assert torch.equal(model(x), own)


def test_gradients_through_a_cached_weight_do_not_notice_an_evaluation():
    def gradients(*, evaluate):
        torch.manual_seed(0)
        model = normed()
        averager = polyak.average(model, "ema", decay=0.5)
        with parametrize.cached():
            loss = loss_of(model)
            if evaluate:
                with torch.no_grad(), averager.applied():
                    model(torch.ones(1, 3))
            (loss + model(torch.full((2, 3), 0.3)).square().sum()).backward()
        return [bits(p.grad) for p in model.parameters()]

    assert gradients(evaluate=True) == gradients(evaluate=False)


def test_two_averagers_and_a_cache_are_left_in_any_order():
    model, averager, before = moved(normed)
    other = polyak.average(model, "ema", decay=0.9)
    x = torch.ones(1, 3)
    with torch.no_grad(), ExitStack() as stack:
        with other.applied():
            of_other = model(x)
        stack.enter_context(parametrize.cached())
        model(x)
        first, second = averager.applied(), other.applied()
        first.__enter__()
        model(x)
        second.__enter__()
        first.__exit__(None, None, None)
        assert torch.equal(model(x), of_other)
        second.__exit__(None, None, None)
    assert now(model, averager) == before
