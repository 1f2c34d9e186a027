"""Packages that only some features need."""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING

from polyak.errors import MissingExtraError

if TYPE_CHECKING:
    from collections.abc import Iterator

__all__ = ["needed_for"]


@contextmanager
def needed_for(feature: str, package: str) -> Iterator[None]:
    """Return a context to import a package in.

    Args:
        feature: The feature that needs it, as the message begins.
        package: Its name, as pip knows it.

    Raises:
        MissingExtraError: If it cannot be imported.
    """
    try:
        yield
    except ImportError as error:
        message = f"{feature} needs {package}, which cannot be imported ({error}): pip install {package}"
        raise MissingExtraError(message) from error
