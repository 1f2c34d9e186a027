"""Nobody is timed who does not compute the average."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import polyak
from polyak.bench.entrants import DECAY, Entrant, entrants, polyaks, start
from polyak.bench.field import Field, distinct, moved_bytes
from polyak.bench.gpt import GPT
from polyak.bench.host import without_kernels
from polyak.bench.settings import Settings
from polyak.errors import MissingExtraError


@pytest.fixture
def model():
    return nn.Sequential(nn.Linear(8, 4), nn.BatchNorm1d(4))


def entrant(name: str, update, make=None) -> Entrant:
    def made(model, dtype):
        return start(model, "ema", dtype, nonfinite="propagate")

    return Entrant(name, "library", make or made, update, lambda averager, _: averager.averages)


@pytest.mark.parity
def test_everybody_computes_the_average(model):
    field = Field(model, entrants(Settings(strategies=("all",))))
    field.check()

    assert field.absent == {}
    assert {"polyak auto", "polyak loop", "polyak foreach", "timm-v3", "torch-swa", "diffusers"} <= field.updates.keys()


def test_who_does_nothing_or_something_else_is_left_out_and_the_reason_is_told(model):
    def wrong(averager, _):
        averager.update()
        averager.averages["0.weight"].add_(0.01)

    field = Field(model, [entrant("idle", lambda *_: None), entrant("wrong", wrong), *polyaks(Settings())])
    field.check()

    assert field.absent.keys() == {"idle", "wrong"}
    assert "does not compute the average" in field.absent["idle"]
    assert "polyak auto" in field.updates


def test_who_cannot_run_here_is_left_out_with_what_it_said(model):
    def missing(*_):
        message = "pip install something"
        raise MissingExtraError(message)

    def leaving(*_):
        raise SystemExit(1)

    late = entrant("late", missing)
    field = Field(model, [entrant("early", lambda *_: None, missing), entrant("rude", lambda *_: None, leaving), late])
    field.check()

    assert field.absent["early"] == field.absent["late"] == "MissingExtraError: pip install something"
    assert field.absent["rude"] == "SystemExit: 1"
    assert field.updates == {}


def test_a_warning_of_polyak_becomes_a_remark(model):
    def warned(averager, _):
        averager.update()
        import warnings

        warnings.warn("took another kernel", polyak.PolyakWarning, stacklevel=1)

    field = Field(model, [entrant("warned", warned)])
    field.check()

    assert field.remarks == {"warned": "took another kernel"}


@pytest.mark.parity
def test_a_library_that_moves_tied_weights_twice_is_timed_and_marked():
    tied = GPT(words=16, length=4, width=8, depth=1, heads=2)
    field = Field(tied, entrants(Settings(against=("timm-v3", "torch"), kernels=("auto",))))
    field.check()

    assert field.remarks == {"timm-v3": "moves tied weights twice"}
    assert field.absent == {}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_an_average_that_is_rounded_at_random_is_near_enough(dtype):
    field = Field(nn.Linear(64, 64).to(dtype), polyaks(Settings(kernels=("auto", "loop"))), dtype)
    field.check()

    assert field.absent == {}


def test_what_an_update_moves_is_a_weight_read_and_an_average_read_and_written():
    assert moved_bytes(nn.Linear(9, 10)) == 100 * (4 + 8)
    assert moved_bytes(nn.Linear(9, 10).bfloat16()) == 100 * (2 + 8)
    assert moved_bytes(nn.Linear(9, 10).bfloat16(), torch.bfloat16) == 100 * (2 + 4)


@pytest.mark.parity
def test_without_kernels_nothing_moves_and_afterwards_everything_does(model):
    names = ("polyak foreach", "polyak auto", "timm-v3", "torch", "ema-pytorch", "diffusers")
    field = Field(model, [one for one in entrants(Settings()) if one.name in names])
    field.check()
    assert field.updates.keys() == {*names}
    before = {**vars(torch)}
    with torch.no_grad():
        for tensor in distinct(model):
            tensor.add_(1.0)
    unmoved = {name: field.unmoved(name) for name in names}

    with without_kernels():
        for update in field.updates.values():
            update()
        assert [name for name, same in unmoved.items() if not same()] == []
    for update in field.updates.values():
        update()

    assert [name for name, same in unmoved.items() if same()] == []
    assert vars(torch)["_foreach_lerp_"] is before["_foreach_lerp_"]


def test_without_kernels_restores_them_after_an_exception():
    original = torch._foreach_lerp_

    def fail():
        assert torch._foreach_lerp_ is not original
        1 / 0  # noqa: B018

    with pytest.raises(ZeroDivisionError), without_kernels():
        fail()
    assert torch._foreach_lerp_ is original


def test_the_decay_is_one_at_which_an_average_that_stands_still_is_seen():
    assert 0.5 < DECAY < 0.99
