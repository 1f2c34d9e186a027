"""Errors that polyak raises on purpose, as the command line tells them: one line, and exit code 2."""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING

import typer

from polyak.errors import PolyakError

if TYPE_CHECKING:
    from collections.abc import Iterator

__all__ = ["told"]


@contextmanager
def told() -> Iterator[None]:
    """Tell an error of polyak's on standard error and exit with 2."""
    try:
        yield
    except PolyakError as error:
        typer.echo(f"polyak: {error}", err=True)
        raise typer.Exit(2) from error
