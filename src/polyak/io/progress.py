"""A progress bar for long work: on a terminal only, and only where rich is installed."""

from __future__ import annotations

import sys
from contextlib import contextmanager
from importlib.util import find_spec
from typing import TYPE_CHECKING, TypeVar

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

__all__ = ["track", "transfer"]

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


@contextmanager
def transfer(total: int, what: str) -> Iterator[Callable[[int], None]]:
    """Show how many bytes of so many were done, how fast, and how long the rest takes; on a terminal only.

    Args:
        total: The bytes.
        what: What is done with them.
    """
    if not sys.stderr.isatty() or find_spec("rich") is None:
        yield lambda _: None
        return
    from rich import progress
    from rich.console import Console

    columns = (
        progress.TextColumn("{task.description}"), progress.BarColumn(), progress.DownloadColumn(binary_units=True),
        progress.TransferSpeedColumn(), progress.TimeRemainingColumn(),
    )  # fmt: skip
    with progress.Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task(what, total=total)
        yield lambda size: bar.advance(task, size)
