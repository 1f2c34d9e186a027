"""Errors and warnings of polyak on the command line: one line each; exit code 2 for errors."""

from __future__ import annotations

import warnings
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import typer

from polyak.errors import PolyakError, PolyakWarning

if TYPE_CHECKING:
    from collections.abc import Iterator

__all__ = ["errors_reported"]


@contextmanager
def errors_reported() -> Iterator[None]:
    """Report polyak's errors and warnings on standard error; exit with 2 after an error."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("always", PolyakWarning)
            others = warnings.showwarning

            def show(message: Warning | str, category: type[Warning], *where: Any, **more: Any) -> None:
                if issubclass(category, PolyakWarning):
                    typer.echo(f"polyak: warning: {message}", err=True)
                else:
                    others(message, category, *where, **more)

            warnings.showwarning = show
            yield
    except PolyakError as error:
        first, *more = (line.strip() for line in [*str(error).splitlines(), *getattr(error, "__notes__", ())])
        typer.echo(f"polyak: {' '.join([first, '; '.join(more)]).strip()}", err=True)
        raise typer.Exit(2) from error
