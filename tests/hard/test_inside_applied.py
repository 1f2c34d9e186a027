"""Who may compute with an average: tasks, threads and event loops."""

from __future__ import annotations

import asyncio
import threading
import warnings
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

import polyak
from holding import enter, holds_average, moved, now
from models import mlp, model_bits
from polyak.tensors import owner

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
