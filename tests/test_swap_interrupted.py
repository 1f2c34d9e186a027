"""Ctrl-C at any moment of a swap or an update leaves the old values or the new ones."""

from __future__ import annotations

import pytest
import torch

import polyak
from interrupts import AtOperation, at_line
from models import ZOO, Tied, average_bits, drifting, mlp, model_bits
from polyak.engine import binding, core, engine
from polyak.engine.plan import plan, tensor_update
from polyak.kernels import threads
from polyak.kernels.cpu import fused as cpu
from polyak.kernels.eager import foreach
from polyak.tensors import swap
from swaps import moved_once

MOVING = (tensor_update, foreach, cpu, threads)


OPTIONS = [{}, {"kernel": "loop"}, {"dtype": "float64"}, {"buffers": "skip"}]


# Ctrl-C in the middle


def _operations(action):
    with AtOperation() as counter:
        action()
    return counter.seen


def _swap_in_and_out(averager):
    with averager.applied():
        pass


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("kind", ["mlp", "tied", "shapes", "buffers", "mixed_dtypes"])
def test_ctrl_c_at_any_operation_of_a_swap_leaves_model_and_average_as_they_were(kind, options, when):
    model, averager = moved_once(ZOO[kind].build, **options)
    own, stored = model_bits(model), average_bits(averager)
    _swap_in_and_out(averager)  # the first one also looks whether the memory can be written
    total = _operations(lambda: _swap_in_and_out(averager))
    assert total > 8
    for k in range(total):
        with pytest.raises(KeyboardInterrupt), AtOperation(k, when):
            _swap_in_and_out(averager)
        assert model_bits(model) == own, f"operation {k}"
        assert average_bits(averager) == stored, f"operation {k}"
        assert not averager.is_applied
    averager.update()


@pytest.mark.parametrize("modules", [(swap,), (swap, binding, engine)], ids=["swap.py", "all"])
@pytest.mark.parametrize("options", OPTIONS[:3], ids=str)
def test_ctrl_c_at_any_line_of_a_swap_leaves_model_and_average_as_they_were(options, modules):
    model, averager = moved_once(Tied, **options)
    own, stored = model_bits(model), average_bits(averager)
    with at_line(modules) as lines:
        _swap_in_and_out(averager)
    assert len(lines) > 50
    wrong = []
    for k, line in enumerate(lines):
        with pytest.raises(KeyboardInterrupt), at_line(modules, k):
            _swap_in_and_out(averager)
        if (model_bits(model), average_bits(averager), averager.is_applied) != (own, stored, False):
            wrong.append(line)
            model, averager = moved_once(Tied, **options)
            own, stored = model_bits(model), average_bits(averager)
    assert not wrong


def _whole(averager, old, new, n):
    return (average_bits(averager), averager.n, len(averager.profile())) in [(old, n, n), (new, n + 1, n + 1)]


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("options", [*OPTIONS, {"dtype": "float64", "kernel": "loop"}], ids=str)
@pytest.mark.parametrize("kind", ["mlp", "tied", "buffers", "mixed_dtypes", "complex"])
@pytest.mark.parametrize("decay", [0.7, 0.0])
def test_ctrl_c_at_any_operation_of_an_update_leaves_the_old_or_the_new_average(kind, options, when, decay):
    model = ZOO[kind].build()
    # The fused kernel is no operation of torch; it is interrupted line by line below.
    averager = polyak.average(model, "ema", decay=decay, **{"kernel": "foreach", **options})
    for _ in drifting(model, 2):
        averager.update()
    for _ in drifting(model, 1, seed=3):
        pass
    state = averager.state_dict()
    old = average_bits(averager)
    averager.load_state_dict(state)
    averager.averaged_state_dict()
    total = _operations(averager.update)
    new = average_bits(averager)
    assert old != new
    seen = set()
    for k in range(total):
        averager.load_state_dict(state)
        averager.averaged_state_dict()  # plans anew, outside of what is interrupted
        with pytest.raises(KeyboardInterrupt), AtOperation(k, when):
            averager.update()
        assert _whole(averager, old, new, 2), f"operation {k} of {total}"
        seen.add(averager.n)
    assert seen == ({2, 3} if when == "after" else seen | {2})


@pytest.mark.parametrize(
    "options",
    [*OPTIONS, {"dtype": "bfloat16"}, {"kernel": "foreach"}, {"kernel": "foreach", "dtype": "bfloat16"}],
    ids=str,
)
@pytest.mark.parametrize("modules", [MOVING[:1], MOVING, (*MOVING, engine, core, binding, plan)], ids=lambda m: len(m))
def test_ctrl_c_at_any_line_of_an_update_leaves_the_old_or_the_new_average(options, modules):
    model, averager = moved_once(Tied, steps=2, **options)
    for _ in drifting(model, 1, seed=3):
        pass
    state, old = averager.state_dict(), average_bits(averager)
    with at_line(modules) as lines:
        averager.update()
    new, wrong = average_bits(averager), []
    for k, line in enumerate(lines):
        averager.load_state_dict(state)
        averager.averaged_state_dict()
        with pytest.raises(KeyboardInterrupt), at_line(modules, k):
            averager.update()
        moved = averager.n == 3
        # Stochastic rounding may draw again after an interruption: then each value is one of the two neighbours.
        whole = _close(averager, new) if moved and options.get("dtype") == "bfloat16" else _whole(averager, old, new, 2)
        wrong += [] if whole else [line]
    assert not wrong


def _close(averager, new):
    for name, tensor in averager.averages.items():
        wanted = torch.frombuffer(bytearray(new[name][-2 * tensor.numel() :]), dtype=torch.bfloat16).view(tensor.shape)
        up, down = (torch.nextafter(wanted, torch.tensor(end).bfloat16()) for end in (torch.inf, -torch.inf))
        if not ((tensor >= down) & (tensor <= up)).all():
            return False
    return len(averager.profile()) == averager.n


@pytest.mark.parametrize("when", ["before", "after"])
def test_ctrl_c_in_the_first_update_leaves_the_start_or_the_first_weights(when):
    model = Tied()
    averager = polyak.average(model, "swa")
    for _ in drifting(model, 1):
        pass
    state, old = averager.state_dict(), average_bits(averager)
    total = _operations(averager.update)
    new = average_bits(averager)
    for k in range(total):
        averager.load_state_dict(state)
        with pytest.raises(KeyboardInterrupt), AtOperation(k, when):
            averager.update()
        assert _whole(averager, old, new, 0)


@pytest.mark.parametrize("when", ["before", "after"])
def test_ctrl_c_in_copy_to_leaves_the_own_weights_or_the_whole_average(when):
    model, averager = moved_once()
    own, stored = model_bits(model), average_bits(averager)
    averager.copy_to(mlp())
    another = mlp()
    for k in range(_operations(lambda: averager.copy_to(another))):
        other = mlp()
        other.load_state_dict(model.state_dict())
        averager.copy_to(another)  # so that as much is planned before each as before the counted one
        with pytest.raises(KeyboardInterrupt), AtOperation(k, when):
            averager.copy_to(other)
        assert model_bits(other) in (own, stored)
        assert average_bits(averager) == stored
