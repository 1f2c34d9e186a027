"""Calls with arguments that a function does not take, and the line of the user's code that made a call."""

from __future__ import annotations

import sys
import warnings
from functools import wraps
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn, ParamSpec, TypeVar

from polyak.errors import ArgumentError, PolyakWarning
from polyak.errors.formatting import listed, shown

if TYPE_CHECKING:
    from collections.abc import Callable
    from types import FrameType

__all__ = ["explained", "refuse_arguments", "users_level", "warn_user"]

_P = ParamSpec("_P")
_R = TypeVar("_R")
_HERE = str(Path(__file__).parents[1])
_BETWEEN = frozenset({"torch", "contextlib"})  # these call hooks and contexts


def explained(hint: str) -> Callable[[Callable[_P, _R]], Callable[_P, _R]]:
    """Return a decorator that adds a hint where a call has arguments that the function does not take.

    Args:
        hint: A sentence that shows the right call.

    Raises:
        ArgumentError: If an argument of the decorated function is missing, unknown or too many.
    """

    def decorate(function: Callable[_P, _R]) -> Callable[_P, _R]:
        @wraps(function)
        def call(*args: _P.args, **kwargs: _P.kwargs) -> _R:
            try:
                return function(*args, **kwargs)
            except TypeError as error:
                if error.__traceback__ is None or error.__traceback__.tb_next is not None:
                    raise  # from within the function
                message = f"{error}. {hint}"
            raise ArgumentError(message)

        return call

    return decorate


def refuse_arguments(more: tuple[Any, ...], unknown: dict[str, Any], takes: str, instead: str) -> NoReturn:
    """Refuse arguments of ``update()``, which has no room for a decorator's frame: it is called once per step.

    Args:
        more: The positional ones.
        unknown: The named ones.
        takes: The arguments that it takes.
        instead: The call that serves those who want more.

    Raises:
        ArgumentError: Always.
    """
    got = listed([*map(shown, more), *(f"{name}={shown(value)}" for name, value in unknown.items())])
    message = f"update() takes {takes}; got {got}. {instead}"
    raise ArgumentError(message)


def users_level() -> int:
    """Return the ``stacklevel`` at which a warning of the caller's points at the user's line."""
    frame, level = sys._getframe(1), 1  # noqa: SLF001 - as the module warnings does
    while frame.f_back is not None and _is_between(frame):
        frame, level = frame.f_back, level + 1
    return level


def warn_user(message: str, category: type[Warning] = PolyakWarning) -> None:
    """Warn at the user's line: the nearest one that is neither polyak's nor torch's."""
    warnings.warn(message, category, users_level())


def _is_between(frame: FrameType) -> bool:
    if frame.f_code.co_filename.startswith(_HERE):
        return True
    return str(frame.f_globals.get("__name__")).partition(".")[0] in _BETWEEN
