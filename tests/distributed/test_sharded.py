"""Averages of sharded models, on real ranks over gloo; one start of processes runs many checks."""

from __future__ import annotations

import pytest

from on_ranks import averaging
from on_ranks.start import run


def test_two_ranks_average_their_shards():
    run(2, averaging.ALL)


@pytest.mark.distributed
def test_four_ranks_average_on_meshes_of_two_dimensions():
    run(4, averaging.FOUR)
