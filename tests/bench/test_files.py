"""`polyak bench files`: every method makes the same average, and the report says how fast and in how much memory."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from polyak.bench.file_methods import METHODS
from polyak.bench.files import FilesReport, measure_files
from polyak.errors import ConfigError


@pytest.mark.parametrize("kind", ["safetensors", "pt"])
def test_all_methods_make_one_average(kind, tmp_path):
    from safetensors.torch import save_file

    paths = [tmp_path / f"{i}.{kind}" for i in range(3)]
    for path in paths:
        state = {"w": torch.randn(50, 3), "b": torch.randn(7)}
        save_file(state, path) if kind == "safetensors" else torch.save(state, path)
    made = {}
    for name, method in METHODS.items():
        out = tmp_path / f"out.{kind}"
        method(paths, out)
        if name != "read":
            made[name] = load_file(out) if kind == "safetensors" else torch.load(out, weights_only=True)
    for name, state in made.items():
        assert all(torch.allclose(state[key], made["polyak"][key], atol=1e-6) for key in ("w", "b")), name


@pytest.mark.slow
def test_the_report_has_every_method_hot_and_some_cold(tmp_path):
    report = measure_files(size=2, files=2, rounds=1)
    hot = [(row.format, row.method) for row in report.rows if not row.cold]
    assert hot == [(kind, method) for kind in ("safetensors", "pt") for method in METHODS]
    assert {row.method for row in report.rows if row.cold} == {"read", "polyak", "polyak, sha256"}
    assert all(row.rate > 0 for row in report.rows)
    (polyak,) = [row for row in report.rows if (row.format, row.method, row.cold) == ("pt", "polyak", False)]
    assert report.against(polyak, "polyak") == 1
    assert math.isnan(report.against(polyak, "nothing"))
    if Path("/proc/self/status").exists():
        assert polyak.peak < 64
    report.write(tmp_path / "r.json")
    assert FilesReport.model_validate_json((tmp_path / "r.json").read_text()) == report


def test_numbers_out_of_range():
    with pytest.raises(ConfigError, match="rounds: got 0"):
        measure_files(rounds=0)
