"""A progress bar for long work: on a terminal only, and only where rich is installed."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, TypeVar

if TYPE_CHECKING:
    from collections.abc import Iterable

__all__ = ["track"]

T = TypeVar("T")


def track(items: Iterable[T], what: str) -> Iterable[T]:
    """Return the items, shown with a progress bar on standard error where that is a terminal."""
    if not sys.stderr.isatty():
        return items
    try:
        from rich.console import Console
        from rich.progress import track as rich_track
    except ImportError:
        return items
    return rich_track(items, description=what, console=Console(stderr=True))
