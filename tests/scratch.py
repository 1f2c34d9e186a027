"""Distributions made for one test: real metadata in a folder on the path, found as pip's are."""

from __future__ import annotations

import importlib
import os
import sys
from contextlib import contextmanager
from textwrap import dedent
from typing import TYPE_CHECKING

from polyak.registry import shared_registry

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

STRATEGY = """
from typing import Literal
import polyak

class {cls}(polyak.Strategy):
    name: Literal[{name!r}] = {name!r}
    power: float = 0.5

    def rate(self, clock):
        return clock.n**-self.power
"""
OFFER = """
@polyak.hookimpl
def polyak_strategies():
    return [{cls}]
"""


def defining(name: str, cls: str = "Half") -> str:
    """Return the source of a strategy that nobody offers yet."""
    return STRATEGY.format(name=name, cls=cls)


def offering(name: str, cls: str = "Half") -> str:
    """Return the source of a plugin that offers one strategy."""
    return defining(name, cls) + OFFER.format(cls=cls)


@contextmanager
def installed(site: Path) -> Iterator[Path]:
    """Find what is installed in a folder from here on, and forget all of it afterwards."""
    before = set(sys.modules)
    sys.path.insert(0, str(site))
    importlib.invalidate_caches()
    shared_registry.cache_clear()
    try:
        yield site
    finally:
        sys.path.remove(str(site))
        shared_registry.cache_clear()
        for name in sys.modules.keys() - before:
            if str(site) in str(getattr(sys.modules[name], "__file__", "")):
                del sys.modules[name]


def environment(site: Path) -> dict[str, str]:
    """Return the environment of a process that finds what is installed in a folder."""
    path = os.pathsep.join(filter(None, [str(site), os.environ.get("PYTHONPATH")]))
    return {**os.environ, "PYTHONPATH": path, "PYTHONUTF8": "1"}


def distribute(site: Path, distribution: str, source: str, *, points: str = "", version: str = "1.0") -> str:
    """Install a module of that source, with its entry point, into a folder; return the module's name."""
    module = distribution.replace("-", "_")
    (site / f"{module}.py").write_text(dedent(source), encoding="utf-8")
    info = site / f"{module}-{version}.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(
        f"Metadata-Version: 2.1\nName: {distribution}\nVersion: {version}\n", encoding="utf-8"
    )
    (info / "entry_points.txt").write_text(f"[polyak]\n{points or f'{distribution} = {module}'}\n", encoding="utf-8")
    return module
