"""The examples of files run as they are, and say the same of one run in every layout."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONIOENCODING": "utf-8"}


def said(script, folder, *options):
    command = [sys.executable, str(EXAMPLES / script), *options]
    run = subprocess.run(command, cwd=folder, capture_output=True, check=False, encoding="utf-8", env=ENVIRONMENT)
    assert (run.returncode, run.stderr) == (0, "")
    return run.stdout


@pytest.mark.slow
def test_three_layouts_have_one_average_that_is_better_than_the_last_checkpoint(tmp_path):
    out = said("average_files.py", tmp_path, "--seeds", "2")
    losses = {
        label.strip(): float(loss) for label, loss in re.findall(r"^(.{36})\s*([\d.]+)   [\d.]+$", out, re.MULTILINE)
    }
    averages = {loss for label, loss in losses.items() if label.startswith("average of the last 5")}
    assert len(averages) == 1
    assert averages.pop() < losses["the last checkpoint"]
    assert "for 2 of 2 seeds" in out
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_the_soup_says_what_it_gains(tmp_path):
    out = said("soup_of_ten.py", tmp_path, "--seeds", "1", "--plot", "soup.png")
    assert re.search(r"^seed 0 .*\(\d+\)$", out, re.MULTILINE)
    assert len(re.findall(r"^gain of the (?:greedy|uniform) soup: [+-]", out, re.MULTILINE)) == 2
    assert (tmp_path / "soup.png").stat().st_size > 1000
