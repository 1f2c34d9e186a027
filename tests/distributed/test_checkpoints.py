"""Checkpoints that load on another number of ranks and in another layout than they were written in."""

from __future__ import annotations

import pytest

from on_ranks import checkpoints
from on_ranks.start import run

NO_GROUP = pytest.mark.filterwarnings("ignore:torch.distributed is (disabled|unavailable)", "ignore::FutureWarning")


@NO_GROUP
def test_what_two_ranks_write_one_reads_and_the_reverse(tmp_path):
    checkpoints.writes(0, tmp_path, "plain")
    run(2, checkpoints.TWO, tmp_path, [("plain", "fsdp"), ("plain", "ddp")], ["fsdp", "ddp"])
    for written_by in ("fsdp", "ddp"):
        checkpoints.reads(0, tmp_path, written_by, "plain")


@NO_GROUP
@pytest.mark.distributed
def test_what_two_ranks_one_and_four_write_the_others_read(tmp_path):
    checkpoints.writes(0, tmp_path, "plain")
    run(2, [checkpoints.read_and_written], tmp_path, [], ["fsdp", "ddp"])
    read = [("fsdp", "tp_fsdp"), ("ddp", "hsdp"), ("plain", "fsdp"), ("fsdp", "ddp")]
    run(4, [checkpoints.read_and_written], tmp_path, read, ["tp_fsdp", "hsdp"])
    for written_by in ("tp_fsdp", "hsdp"):
        checkpoints.reads(0, tmp_path, written_by, "plain")
    run(2, [checkpoints.read_and_written], tmp_path, [("tp_fsdp", "fsdp"), ("hsdp", "ddp")], [])
