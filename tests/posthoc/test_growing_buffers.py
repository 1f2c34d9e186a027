"""Recording a model whose buffers come, go or change shape: copies are the last ones, averages are refused at once."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import polyak


def record(folder, before, after, **options):
    """Record ten updates, with another value of a buffer from the sixth on, and synthesize."""
    model = nn.Linear(2, 2)
    model.register_buffer("late", before)
    averager = polyak.average(model, "ema", decay=0.5, **options)
    with polyak.posthoc.Recorder(averager, folder, every=2):
        for step in range(10):
            if step == 5:
                model.late = after
            averager.update()
    return polyak.posthoc.synthesize(folder, "swa").state_dict


def test_a_copy_may_change_its_shape_and_is_the_last_one(tmp_path):
    assert record(tmp_path, torch.arange(2), torch.arange(5))["late"].tolist() == [0, 1, 2, 3, 4]


@pytest.mark.filterwarnings("ignore:late changed shape:polyak.PolyakWarning")
@pytest.mark.parametrize("before", [None, torch.ones(2)])
@pytest.mark.parametrize("after", [None, torch.ones(3)])
def test_an_average_that_comes_goes_or_changes_shape_is_refused_while_it_is_recorded(before, after, tmp_path):
    if before is after:
        assert "late" not in record(tmp_path, before, after)
        return
    with pytest.raises(polyak.MismatchError, match=r"late (came, went or changed shape|is no longer)"):
        record(tmp_path, before, after)


def test_a_copy_that_the_model_drops_is_refused(tmp_path):
    with pytest.raises(polyak.MismatchError, match="late is no longer in the model"):
        record(tmp_path, torch.arange(2), None)
