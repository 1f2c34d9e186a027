"""The example of a sharded model trains on two ranks, and goes on with one."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from on_ranks.start import FSDP2_TRAINS

EXAMPLE = Path(__file__).resolve().parents[2] / "examples" / "fsdp2.py"


def run(ranks, folder, *options):
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
    told = subprocess.run(
        [*torchrun, str(EXAMPLE), "--folder", str(folder), *options],
        capture_output=True,
        text=True,
        check=False,
        timeout=200,
        env={**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
    )
    assert told.returncode == 0, told.stderr
    return told.stdout


@pytest.mark.skipif(not FSDP2_TRAINS, reason="the FSDP2 of torch 2.6 does not train on CPUs")
def test_two_ranks_train_and_one_goes_on(tmp_path):
    first = run(2, tmp_path / "checkpoint", "--steps", "60")
    assert "steps 1 to 60 on 2 rank(s), 60 updates averaged" in first
    held, everything = map(int, re.search(r"holds (\d+) of (\d+) bytes", first).groups())
    assert held < 0.52 * everything
    then = run(1, tmp_path / "checkpoint", "--steps", "60", "--resume")
    assert "steps 61 to 120 on 1 rank(s), 120 updates averaged" in then
    averaged = float(re.search(r"([\d.]+)% averaged", then).group(1))
    assert averaged < 12  # of ten digits, half of the errors of the first steps
