"""The architecture's page and CONTRIBUTING.md say what the code is."""

from __future__ import annotations

import re
import runpy
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
DRAW = runpy.run_path(str(ROOT / "docs" / "design" / "draw.py"))
PAGES = {"docs/design/architecture.md": ROOT / "src" / "polyak", "CONTRIBUTING.md": ROOT}


def test_the_picture_is_drawn_from_this_code():
    assert DRAW["PICTURE"].read_text(encoding="utf-8") == DRAW["drawn"]()


def test_every_package_is_in_the_picture_and_no_arrow_runs_up():
    rows = DRAW["layers"]()
    row_of = {name: number for number, row in enumerate(rows) for name in row}
    package = ROOT / "src" / "polyak"
    entries = {path.stem for path in package.glob("*.py")} | {
        path.parent.name for path in package.glob("*/__init__.py")
    }
    assert entries - {"__init__", "__main__"} == {*row_of}
    assert all(row_of[name] < row_of[other] for name, other in DRAW["arrows"]())
    assert len(entries) <= 24
    assert len(rows) <= 12


@pytest.mark.parametrize(("page", "base"), PAGES.items(), ids=PAGES)
def test_every_file_that_a_page_names_exists(page, base):
    text = re.sub(r"^```.*?^```", "", (ROOT / page).read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)
    named = [name for name in re.findall(r"`([\w./-]+)`", text) if "/" in name and name != ".nox/"]
    assert named
    missing = [name for name in named if not (base / name).exists() and not (ROOT / name).exists()]
    assert missing == []
