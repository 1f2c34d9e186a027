"""A process that is killed while it saves."""

from __future__ import annotations

import os
import random
import signal
import time

import pytest
import torch

import polyak


@pytest.mark.filterwarnings(
    "ignore::FutureWarning", "ignore:TypedStorage is deprecated"
)  # torch's own, in old releases
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
