"""Ranks that disagree are named, and engines that hide their weights refused."""

from __future__ import annotations

import pytest
from torch import nn

import polyak
from on_ranks import trouble
from on_ranks.start import run


def test_ranks_that_disagree_are_named(tmp_path):
    run(2, trouble.ALL, tmp_path)


def test_averages_of_one_process_are_in_sync_and_need_no_broadcast():
    averager = polyak.average(nn.Linear(2, 1), "ema")
    averager.update()
    polyak.distributed.verify_in_sync(averager)
    polyak.distributed.broadcast(averager)
    assert averager.n == 1


class Engine(nn.Module):
    """As DeepSpeed's looks from outside."""

    def __init__(self, module):
        super().__init__()
        self.module = module

    def zero_optimization_stage(self):
        return 2


def test_deepspeed_is_refused_with_the_way_out(monkeypatch):
    import sys
    import types

    monkeypatch.setitem(sys.modules, "deepspeed", types.ModuleType("deepspeed"))
    model = nn.Linear(2, 1)
    with pytest.raises(polyak.ModelError, match=r"DeepSpeed's engine.*fully_shard.*engine\.module"):
        polyak.average(Engine(model), "ema")
    polyak.average(model, "ema").update()
    model.weight.ds_status = "NOT_AVAILABLE"
    with pytest.raises(polyak.ModelError, match="ZeRO-3"):
        polyak.average(nn.Sequential(model), "ema")
