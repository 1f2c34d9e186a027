"""Whether a compiler makes kernels on this machine; where it stops doing so, kernels of plain torch go on."""

from __future__ import annotations

from contextlib import contextmanager
from functools import cache
from importlib.util import find_spec
from typing import TYPE_CHECKING

from polyak.errors.calls import warn_user

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

__all__ = ["CompilerError", "compiling", "works"]

_BROKEN: set[str] = set()


class CompilerError(Exception):
    """A compiler that worked raised something; from now on it is not asked any more."""


@contextmanager
def compiling(compiler: str) -> Iterator[None]:
    """Turn whatever a compiler or its cache raises into one warning and a CompilerError.

    Raises:
        CompilerError: If anything is raised inside.
    """
    try:
        yield
    except Exception as error:
        _give_up(compiler, error)
        raise CompilerError(compiler) from error


def works(compiler: str, try_out: Callable[[], bool]) -> bool:
    """Return whether a compiler makes kernels that run on this machine; warn once if it is installed and does not."""
    return compiler not in _BROKEN and _tried(compiler, try_out)


@cache
def _tried(compiler: str, try_out: Callable[[], bool]) -> bool:
    try:
        if find_spec(compiler) is None:
            return False
    except ValueError:  # it is imported, and has no spec
        return False
    try:
        return try_out()
    except Exception as error:  # noqa: BLE001 - whatever a compiler can raise, averaging goes on without it
        _give_up(compiler, error.__cause__ if isinstance(error, CompilerError) else error)
        return False


def _give_up(compiler: str, error: BaseException | None) -> None:
    if compiler in _BROKEN:
        return
    _BROKEN.add(compiler)
    said = str(error).partition("\n")[0]
    message = (
        f"{compiler} is installed but compiles no kernel ({type(error).__name__}: {said}); "
        'kernels of plain torch are used, which are slower. Silence this with kernel="foreach".'
    )
    warn_user(message)
