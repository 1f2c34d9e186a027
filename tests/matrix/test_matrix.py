from __future__ import annotations

import io
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image
from rich.console import Console

import polyak

from . import hard
from .cell import EXACT, Cell
from .measure import measure
from .page import summary
from .subjects import LIBRARIES
from .table import terminal

pytestmark = pytest.mark.parity

ROOT = Path(__file__).parents[2]
PLUGIN = """
from typing import Literal
import numpy as np
import polyak

class Root(polyak.Strategy):
    name: Literal["scratch_root"] = "scratch_root"

    def rate(self, clock):
        return clock.n**-0.5

class Late(polyak.Strategy):
    name: Literal["scratch_late"] = "scratch_late"

    def rate(self, clock):
        return 0.5

    def slots(self):
        return ("before",)

    def moves(self, n, rate):
        return (polyak.Move("average", "before", 1.0), polyak.Move("before", "weights", rate))

    def shares(self, rates):
        updates, start = super().shares(rates[:-1])
        return polyak.Shares(np.append(updates, 0.0), start)

class Demanding(Root):
    name: Literal["scratch_demanding"] = "scratch_demanding"
    power: float

@polyak.hookimpl
def polyak_strategies():
    return [Root, Late, Demanding]
"""


@pytest.fixture
def plugin(tmp_path: Path) -> Path:
    """A distribution that offers a strategy, as `pip install` leaves it."""
    site = tmp_path / "site"
    about = site / "scratch_plugin-1.2.3.dist-info"
    about.mkdir(parents=True)
    (site / "scratch_plugin.py").write_text(PLUGIN)
    (about / "METADATA").write_text("Metadata-Version: 2.1\nName: scratch-plugin\nVersion: 1.2.3\n")
    (about / "entry_points.txt").write_text("[polyak]\nscratch = scratch_plugin\n")
    return site


@pytest.mark.slow
def test_the_command_writes_page_picture_and_numbers_and_a_plugin_joins(tmp_path: Path, plugin: Path):
    out = tmp_path / "docs"
    strategies = ["--strategies", "swa", "scratch_root", "scratch_late", "scratch_demanding"]
    restricted = [*strategies, "--architectures", "mlp_tiny", "--steps", "5", "--out", str(out)]
    environment = {
        **os.environ,
        "COLUMNS": "80",
        "PYTHONPATH": os.pathsep.join([str(plugin), os.environ.get("PYTHONPATH", "")]),
    }
    ran = subprocess.run(
        [sys.executable, "-m", "tests.matrix", *restricted],
        cwd=ROOT, env=environment, capture_output=True, text=True, check=False,
    )  # fmt: skip

    assert ran.returncode == 0, ran.stderr
    assert re.search(r"scratch_late +mlp_tiny +float64 +\S+", ran.stdout)
    assert re.search(r"tied weights [^\n]* ✓", ran.stdout)
    assert max(map(len, ran.stdout.partition("written:")[0].splitlines())) <= 160  # the summary is not wrapped
    page = (out / "matrix.md").read_text()
    assert "| `scratch_root` | mlp_tiny |" in page
    assert "| `scratch_demanding` | mlp_tiny | *needs power* |" in page
    assert "scratch-plugin 1.2.3" in page
    cells = json.loads((out / "assets" / "matrix.json").read_text())["cells"]
    assert {cell["strategy"] for cell in cells if cell["error"] is not None} == {"swa", "scratch_root", "scratch_late"}
    assert all(cell["error"] < 1e-6 for cell in cells if cell["error"] is not None)
    with Image.open(out / "assets" / "matrix.png") as picture:
        assert picture.width > 1000
        assert len(picture.convert("RGB").getcolors(1 << 24)) > 50
    names = ["assets", "hard-cases.md", "matrix.json", "matrix.md", "matrix.png"]
    assert sorted(path.name for path in out.rglob("*")) == names


def test_a_cell_is_a_number_or_says_why_not():
    cells = {cell.reference: cell for cell in measure("swa", "mlp_tiny", steps=5)}

    assert set(cells) == {EXACT, *(library.distribution for library in LIBRARIES)}
    assert cells["torch-ema"] == Cell("swa", "mlp_tiny", "torch-ema", remark="no such strategy")
    assert cells[EXACT].error < 1e-6
    for reference in {*cells} - {"torch-ema", EXACT}:
        cell = cells[reference]
        assert cell.error is not None
        assert cell.error < 1e-6
        assert cell.speed is not None
        assert cell.speed > 0
        assert not cell.remark


@pytest.mark.parametrize("strategy", ["lawa", "dema", "tail", "power", "ema_tf", "lr_weighted", "byol"])
@pytest.mark.parametrize("steps", [1, 23])
def test_every_strategy_is_compared_with_the_shares_that_it_states_itself(strategy, steps):
    exact, *_ = measure(strategy, "mlp_tiny", steps)

    assert exact.reference == EXACT
    assert exact.error < 1e-6


def test_buffers_that_a_strategy_copies_are_compared_with_those_of_the_last_step():
    exact, *_ = measure("dema", "mobilenet_v3_small", 3)

    assert exact.error < 1e-6


def test_an_average_that_is_not_what_the_shares_say_needs_an_explanation(monkeypatch):
    assert measure("dema", "mlp_tiny", 7)[0].error < 1e-6
    monkeypatch.setattr(polyak.DoubleEMA, "shares", polyak.Strategy.shares)
    wrong = measure("dema", "mlp_tiny", 7)
    assert wrong[0].odd
    assert "this needs an explanation" in summary(wrong)


@pytest.mark.parametrize("width", [80, 200])
def test_the_tables_fit_the_terminal_and_break_no_word(width):
    cells = [cell for name in ("lawa", "ema", "block_mean") for cell in measure(name, "mlp_tiny", 1)]
    console = Console(width=width, file=io.StringIO(), force_terminal=False)
    console.print(terminal(cells, console.width))
    console.print(hard.table.terminal(hard.table.cells(["tied_weights", "no_deepcopy"]), console.width))
    shown = console.file.getvalue()

    assert max(map(len, shown.splitlines())) <= width
    for word in ("block_mean", "mlp_tiny", "ema-pytorch", "difference" if width < 100 else "architecture"):
        assert word in shown


def test_tied_weights_show_the_number_and_the_reason():
    cells = {cell.reference: cell for cell in measure("ema_v3", "lm_tied", steps=5)}

    assert cells["timm"].odd
    assert cells["timm"].remark == "tied twice"
    assert not cells[EXACT].odd
    assert not cells["diffusers"].odd


def test_a_library_without_buffers_is_compared_on_parameters_alone():
    cells = {cell.reference: cell for cell in measure("ema", "mobilenet_v3_small", steps=2)}

    assert cells["torch-ema"].remark == "no buffers"
    assert not cells["torch-ema"].odd


def test_a_difference_that_nothing_explains_is_said_to_need_an_explanation():
    right = Cell("ema", "mlp_tiny", EXACT, 1e-7, 1.0, 0.1)
    wrong = Cell("ema", "mlp_tiny", "timm", 0.2, 1.0, 0.1)

    assert wrong.odd
    assert "1 differ by up to 2e-01 (timm on mlp_tiny): this needs an explanation." in summary([right, wrong])
