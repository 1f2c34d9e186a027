"""Packages that only some features need."""

from __future__ import annotations

import re
from contextlib import contextmanager
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING

from polyak.errors import MissingExtraError

if TYPE_CHECKING:
    from collections.abc import Iterator

__all__ = ["needed_for", "require"]


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


def require(feature: str, package: str, oldest: str, extra: str) -> None:
    """Refuse a package that is missing or older than what was tested.

    Args:
        feature: The feature that needs it, as the message begins.
        package: Its name, as pip knows it.
        oldest: The oldest version that the tests run with.
        extra: The extra of polyak that brings it.

    Raises:
        MissingExtraError: If it is missing or older.
    """
    needs = f"{feature} needs {package}>={oldest}"
    try:
        installed = version(package)
    except PackageNotFoundError as error:
        message = f"{needs}, which is not installed: pip install 'polyak[{extra}]'"
        raise MissingExtraError(message) from error
    if _numbers(installed) < _numbers(oldest):
        message = f"{needs}, and {installed} is installed: pip install -U 'polyak[{extra}]'"
        raise MissingExtraError(message)


def _numbers(release: str) -> list[int]:
    """Return the numbers that a version begins with."""
    return [int(part) for part in re.findall(r"\d+", release.partition("+")[0])[:3]]
