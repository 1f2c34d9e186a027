"""Averages of sharded models, on real ranks over gloo; one start of processes runs many checks."""

from __future__ import annotations

import pytest

from on_ranks import averaging, snapshots
from on_ranks.start import run


def test_two_ranks_average_their_shards():
    run(2, averaging.ALL)


def test_two_ranks_record_their_shards(tmp_path):
    run(2, snapshots.ALL, tmp_path)


def test_ranks_of_a_stage_record_and_save_it_without_rank_0(tmp_path):
    run(3, [snapshots.a_stage_of_a_pipeline_is_recorded_saved_and_loaded_by_its_own_ranks], tmp_path)


@pytest.mark.distributed
def test_four_ranks_average_on_meshes_of_two_dimensions():
    run(4, averaging.FOUR)
