"""A rank that dies is named by all others, within their patience, and nothing is changed."""

from __future__ import annotations

import pytest

from on_ranks import dying
from on_ranks.start import free_port, run


@pytest.mark.parametrize(
    "acts",
    ["EACH", *(pytest.param(acts, marks=pytest.mark.distributed) for acts in ("UPDATE", "SAVE", "APPLIED", "OTHERS"))],
)
def test_a_rank_that_is_killed_is_named_by_all_others_and_nothing_is_changed(acts, tmp_path):
    run(5, [dying.killed], tmp_path, getattr(dying, acts), [free_port() for _ in range(3)], dying=[0, 2, 4])


@pytest.mark.parametrize("check", ["unwritten", "unmeasured"])
def test_a_rank_that_is_killed_leaves_no_part_of_a_snapshot_or_of_statistics(check, tmp_path):
    run(2, [getattr(dying, check)], tmp_path, dying=[1])


def test_a_rank_that_is_only_late_is_not_called_dead(tmp_path):
    run(2, [dying.late], tmp_path)
