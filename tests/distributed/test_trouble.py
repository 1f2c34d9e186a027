"""Ranks that disagree are named; a rank that dies is told of, within the others' patience, and nothing is changed."""

from __future__ import annotations

import pytest
from torch import nn

import polyak
from on_ranks import dying, trouble
from on_ranks.start import free_port, run


def test_ranks_that_disagree_are_named(tmp_path):
    run(2, trouble.ALL, tmp_path)


@pytest.mark.parametrize("acts", ["UPDATE", "SAVE", "APPLIED", "OTHERS"])
def test_a_rank_that_is_killed_is_named_by_all_others_and_nothing_is_changed(acts, tmp_path):
    run(5, [dying.killed], tmp_path, getattr(dying, acts), [free_port() for _ in range(3)], dying=[0, 2, 4])


def test_a_rank_that_is_only_late_is_not_called_dead(tmp_path):
    run(2, [dying.late], tmp_path)


def test_averages_of_one_process_are_in_sync():
    averager = polyak.average(nn.Linear(2, 1), "ema")
    averager.update()
    polyak.distributed.verify_in_sync(averager)


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
