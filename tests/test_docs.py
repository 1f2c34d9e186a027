"""What the README, the documentation and the docstrings show is run, and prints what they say it prints."""

from __future__ import annotations

import inspect
import re
import sys
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING

import pytest
from sybil.document import Document, PythonDocStringDocument
from sybil.parsers.rest import DocTestParser

import polyak
from blocks import Blocks
from polyak import errors
from polyak.cli import app

if TYPE_CHECKING:
    from collections.abc import Iterator

ROOT = Path(__file__).resolve().parents[1]
# What needs the trainers of other libraries is run in tests/integrations.
TRAINERS = {ROOT / "src" / "polyak" / "integrations", ROOT / "docs" / "trainers"}
SOURCES = sorted(
    path
    for path in (ROOT / "src" / "polyak").rglob("*.py")
    if ">>> " in path.read_text(encoding="utf-8") and TRAINERS.isdisjoint(path.parents)
)
DOCS = sorted((ROOT / "docs").rglob("*.md"))
# A reader of these copies one block; a page of the documentation is read from its top.
ALONE = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted(ROOT.glob("plugins/*/README.md"))]
BUILT_IN = [cls for name, cls in polyak.strategies().items() if polyak.strategies().distribution(name) == "polyak"]
SLOW = {"coming-from.md"}  # imports the libraries one comes from


def _name(path: Path) -> str:
    return str(path.relative_to(ROOT))


def _read(*names: str) -> str:
    return "\n".join((ROOT / name).read_text(encoding="utf-8") for name in names)


def _pages() -> Iterator[object]:
    for path in (*ALONE, *DOCS):
        if "```python" in path.read_text(encoding="utf-8") and TRAINERS.isdisjoint(path.parents):
            yield pytest.param(path, id=_name(path), marks=[pytest.mark.slow] if path.name in SLOW else [])


@pytest.mark.parametrize("path", list(_pages()))
def test_every_block_of_a_page_runs_and_prints_what_the_page_says(path, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    script = ModuleType("__main__")  # as which a reader runs it; classes can be pickled by its name
    monkeypatch.setitem(sys.modules, "__main__", script)
    document = Document.parse(str(path), Blocks(alone=path in ALONE))
    document.namespace = vars(script)
    examples = list(document.examples())
    assert examples
    for example in examples:
        example.evaluate()


@pytest.mark.parametrize("path", SOURCES, ids=_name)
def test_every_example_of_a_docstring_runs_and_prints_what_it_says(path):
    examples = list(PythonDocStringDocument.parse(str(path), DocTestParser()).examples())
    assert examples
    for example in examples:
        example.evaluate()


@pytest.mark.parametrize("path", [*ALONE, ROOT / "CHANGELOG.md", *DOCS], ids=_name)
def test_every_relative_link_and_picture_leads_to_a_file(path):
    text = re.sub(r"```.*?```", "", path.read_text(encoding="utf-8"), flags=re.DOTALL)
    targets = re.findall(r"\]\(([^)#\s]+)[^)]*\)", text)
    missing = [t for t in targets if not re.match(r"https?:", t) and not (path.parent / t).is_file()]
    assert missing == []


@pytest.mark.parametrize("strategy", BUILT_IN, ids=lambda cls: cls.__name__)
def test_every_built_in_strategy_is_documented_with_its_settings_and_source(strategy):
    name = strategy.model_fields["name"].default
    (row,) = re.findall(rf"^\| `{name}` \|.*$", _read("README.md"), flags=re.MULTILINE)
    section = re.search(rf"^## `{name}`.*?(?=^## |\Z)", _read("docs/strategies.md"), flags=re.MULTILINE | re.DOTALL)
    assert section is not None
    for setting in strategy.model_fields.keys() - {"name"}:
        assert f"`{setting}" in row
        assert f"`{setting}" in section.group()
    for fact in ("Equation", "When", "Source", "Often confused with"):
        assert f"**{fact}**" in section.group()
    assert f"::: polyak.{strategy.__name__}\n" in _read("docs/reference/strategies.md")


def test_every_public_name_is_in_the_reference():
    reference = _read(*(_name(path) for path in DOCS if path.parent.name == "reference"))
    listed = set(re.findall(r"^(?:::: +| +heading: )([\w.]+)$", reference, flags=re.MULTILINE))
    assert "polyak.errors" in listed
    public = {name for name, value in vars(polyak).items() if name[0] != "_" and not inspect.ismodule(value)}
    assert public >= {"average", "Conversion", "EMAV1"}
    unlisted = {name for name in public if f"polyak.{name}" not in listed and name not in errors.__all__}
    assert unlisted <= {"TYPE_CHECKING", "Any", "annotations", "package_hint"}


def test_every_option_of_average_is_in_the_quickstart():
    options = inspect.signature(polyak.average).parameters.keys() - {"model", "strategy", "settings"}
    assert [option for option in sorted(options) if f"`{option}" not in _read("docs/quickstart.md")] == []


def test_every_test_that_the_laws_name_exists():
    named = re.findall(r"`(tests/[\w/]+\.py)(?:::(\w+))?`", _read("docs/design/laws.md"))
    assert named
    for file, test in named:
        assert not test or f"def {test}(" in _read(file)
        assert (ROOT / file).is_file()


def test_every_nox_session_and_every_command_that_is_named_exists():
    text = _read("README.md", "CONTRIBUTING.md", *map(_name, DOCS))
    named = re.findall(r"noxfile\.py -s ((?:[a-z]+ ?)+)", text)
    sessions = re.findall(r"@nox\.session.*\ndef (\w+)\(", _read("noxfile.py"))
    assert {name for names in named for name in names.split()} <= {*sessions}
    commands = re.findall(r"(?:`|\$ )polyak ([a-z]+)", text)
    assert commands
    assert {*commands} <= {command.name for command in app.registered_commands}
