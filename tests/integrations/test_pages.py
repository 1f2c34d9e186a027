"""What the pages about trainers and the docstrings of the integrations show is run, and prints what they say."""

from __future__ import annotations

import sys
from pathlib import Path
from types import ModuleType

import pytest
from sybil.document import Document, PythonDocStringDocument
from sybil.parsers.rest import DocTestParser

from blocks import Blocks

ROOT = Path(__file__).resolve().parents[2]
PAGES = sorted((ROOT / "docs" / "trainers").glob("*.md"))
SOURCES = sorted(
    path
    for path in (ROOT / "src" / "polyak" / "integrations").rglob("*.py")
    if ">>> " in path.read_text(encoding="utf-8")
)


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.name)
def test_every_block_of_a_page_runs_and_prints_what_the_page_says(path, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    script = ModuleType("__main__")  # as which a reader runs it; classes can be pickled by its name
    monkeypatch.setitem(sys.modules, "__main__", script)
    document = Document.parse(str(path), Blocks(alone=False))
    document.namespace = vars(script)
    examples = list(document.examples())
    assert examples
    for example in examples:
        example.evaluate()


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: f"{path.parent.name}/{path.name}")
def test_every_example_of_a_docstring_runs_and_prints_what_it_says(path, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    examples = list(PythonDocStringDocument.parse(str(path), DocTestParser()).examples())
    assert examples
    for example in examples:
        example.evaluate()
