"""A framework that is missing or too old is named, with what to install."""

from __future__ import annotations

import importlib
import subprocess
import sys
from importlib.metadata import MetadataPathFinder

import pytest

import polyak

FRAMEWORKS = {
    "accelerate": "accelerate",
    "ignite": "pytorch-ignite",
    "lightning": "lightning",
    "transformers": "transformers",
}


@pytest.fixture(params=FRAMEWORKS)
def integration(request, monkeypatch):
    name = f"polyak.integrations.{request.param}"
    for module in [key for key in sys.modules if key.partition(".")[0] == "polyak" and key.startswith(name)]:
        monkeypatch.delitem(sys.modules, module)
    return name, FRAMEWORKS[request.param]


def test_a_framework_that_is_too_old_is_named(integration, monkeypatch, tmp_path):
    name, package = integration
    about = tmp_path / f"{package.replace('-', '_')}-1.2.3.dist-info"
    about.mkdir()
    (about / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {package}\nVersion: 0.1.3\n", encoding="utf-8")
    monkeypatch.syspath_prepend(str(tmp_path))  # found before the one that is installed
    extra = name.rpartition(".")[2]
    with pytest.raises(polyak.MissingExtraError, match=rf"{package}>=.*, and 0\.1\.3 is installed.*polyak\[{extra}\]"):
        importlib.import_module(name)


def test_a_framework_that_is_missing_is_named(integration, monkeypatch):
    name, package = integration
    found = MetadataPathFinder.find_distributions

    def hidden(context=None):
        return [] if context is not None and context.name == package else found(context)

    monkeypatch.setattr(MetadataPathFinder, "find_distributions", hidden)
    extra = name.rpartition(".")[2]
    with pytest.raises(polyak.MissingExtraError, match=rf"{package}>=.*, which is not installed.*polyak\[{extra}\]"):
        importlib.import_module(name)


def test_importing_polyak_imports_no_framework():
    names = {"accelerate", "ignite", "lightning", "transformers"}
    code = f"import sys, polyak, polyak.integrations; print(*{names} & {{*sys.modules}})"
    told = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True, timeout=100).stdout
    assert told.strip() == ""
