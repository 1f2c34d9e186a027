"""The plan is held against small sharded runs: every byte of them is counted."""

from __future__ import annotations

import pytest

from on_ranks import budgets
from on_ranks.start import run


@pytest.mark.parametrize("ranks", [1, pytest.param(2, marks=pytest.mark.distributed), 4])
def test_what_a_run_on_ranks_keeps_moves_and_writes_is_within_two_per_cent_of_its_plan(ranks, tmp_path):
    run(ranks, budgets.ALL, tmp_path)
