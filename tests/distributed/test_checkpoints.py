"""Checkpoints that load on another number of ranks and in another layout than they were written in."""

from __future__ import annotations

import os
import random
import signal
import time

import pytest
import torch

import polyak
from on_ranks import checkpoints
from on_ranks.start import run

NO_GROUP = pytest.mark.filterwarnings("ignore:torch.distributed is disabled", "ignore::FutureWarning")


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


@NO_GROUP
@pytest.mark.parametrize("times", [10, pytest.param(50, marks=pytest.mark.distributed)])
def test_a_process_killed_in_the_middle_of_a_save_loses_nothing(times, tmp_path):
    averager = polyak.average({"w": torch.arange(1000.0)}, "ema", decay=0.5)
    folder, random_times = tmp_path / "average", random.Random(0)
    averager.update()
    polyak.distributed.save(averager, folder)
    seen = averager.n
    for _ in range(times):
        ready, tell = os.pipe()
        child = os.fork()
        if not child:
            while True:
                averager.update()
                polyak.distributed.save(averager, folder)
                os.write(tell, b".")
        os.read(ready, 1)
        time.sleep(random_times.random() * 0.03)
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        os.close(tell)
        finished = 1 + len(os.read(ready, 10_000))
        os.close(ready)
        polyak.distributed.load(averager, folder)
        # Nothing that was finished is lost, and nothing half done is found.
        assert averager.n in {seen + finished, seen + finished + 1}
        seen = averager.n
