"""Each script of examples/trainers trains, resumes, and serves its best average where polyak cannot be imported."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPTS = sorted((Path(__file__).resolve().parents[2] / "examples" / "trainers").glob("with_*.py"))


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.stem)
def test_the_best_average_has_its_recorded_score_without_polyak(script, tmp_path):
    told = subprocess.run(
        [sys.executable, str(script)], cwd=tmp_path, check=True, capture_output=True, text=True, timeout=250
    ).stdout
    recorded = float(re.search(r"the best average: ([\d.]+)", told)[1])
    served = float(re.search(r"without polyak: +([\d.]+)", told)[1])
    assert served == pytest.approx(recorded, abs=2e-6)
    assert recorded < 0.2
    assert int(re.search(r"updates: (\d+)", told)[1]) >= 150
