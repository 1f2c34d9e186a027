"""`polyak bench files`: every method makes the same average, and the report says how fast and in how much memory."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from polyak.bench.file_methods import METHODS
from polyak.bench.file_table import files_table
from polyak.bench.files import FilesReport, FilesRow, measure_files
from polyak.bench.page import main
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
    after = []
    report = measure_files(size=2, files=2, rounds=1, after=after.append)
    assert after == [report]
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


def report_of(busy):
    rows = [
        FilesRow(format="pt", method="load all", cold=False, rates=(100.0, 200.0), peak=900.0, busy=busy),
        FilesRow(format="pt", method="polyak", cold=False, rates=(300.0, 400.0), peak=16.0),
        FilesRow(format="pt", method="read", cold=True, rates=(500.0, 500.0), peak=1.0),
    ]
    return FilesReport(machine="a machine, torch 2", versions={"polyak": "1"}, files=5, size=256, rows=rows)


def test_the_table_compares_methods_of_one_format_and_names_the_machine():
    table = files_table(report_of(0.0))
    assert table.rows[1] == ("pt", "polyak", "hot", "350", "16", "2.50", "-", "-")  # 3 and 2 times as fast
    assert table.rows[2] == ("pt", "read", "cold", "500", "1", "-", "-", "1.00")
    assert any("a machine, torch 2" in note for note in table.notes)
    assert not any("Other programs" in note for note in table.notes)


def test_a_page_takes_a_busy_report_of_files_only_when_told_to(tmp_path):
    pytest.importorskip("matplotlib")
    page, file = tmp_path / "page.md", tmp_path / "files.json"
    page.write_text("<!-- bench: files -->\nold\n<!-- /bench -->\n<!-- bench: machine -->\nkept\n<!-- /bench -->\n")
    report_of(0.6).write(file)
    with pytest.raises(ConfigError, match=r"in up to 60 %.*--busy takes it"):
        main(page, file)
    assert "old" in page.read_text()
    main(page, file, busy=True)
    assert "| pt | polyak | hot | 350 | 16 | 2.50 | - | - |" in page.read_text()
    assert "kept" in page.read_text()
    assert "in up to 60 %" in page.read_text()
    assert (tmp_path / "files.png").stat().st_size > 10_000
    report_of(0.5).write(file)
    main(page, file)
    assert "Other programs" not in page.read_text()
