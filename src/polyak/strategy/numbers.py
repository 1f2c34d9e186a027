"""Numbers and truth values that are taken as such only: the JSON schema and the code accept the same."""

from __future__ import annotations

import math
from contextlib import suppress
from numbers import Integral, Real
from operator import index
from typing import TYPE_CHECKING, Annotated, Any, Final

from pydantic import Field
from pydantic_core import PydanticKnownError, core_schema

from polyak.errors import ArgumentError, ConfigError
from polyak.errors.formatting import shown

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

__all__ = ["LARGEST", "Count", "Steps", "as_integer", "as_number", "given_integer", "given_positive", "plain"]

LARGEST: Final = 2**63 - 1
"""The largest integer that a tensor of 64 bits holds."""
Count = Annotated[int, Field(gt=0, lt=2**63)]
"""How many there are of something: at least one, and an integer of 64 bits."""
Steps = Annotated[int, Field(ge=0, lt=2**63)]
"""A number of steps, or the step at which something begins."""

_VALUES = {"default", "expected", "metadata", "serialization"}  # parts of a core schema that are not schemas
_TINY, _HUGE = 1e-30, 1e30
_INTEGER: Final = "int_type"
_NUMBER: Final = "float_type"
_FINITE: Final = "finite_number"
_TRUTH: Final = "bool_type"


def as_integer(value: object) -> int | None:
    """Return an integer of Python, numpy or torch as Python's, and None for any other value, booleans included."""
    if type(value) is int:
        return value
    if not _is_truth(value):
        with suppress(TypeError, RuntimeError):  # RuntimeError: a tensor without a value, as on the meta device
            return index(value)  # type: ignore[arg-type]  # suppressed where it has none
    return None


def as_number(value: object) -> float | None:
    """Return a finite number of Python, numpy or torch as a float, and None for any other value, booleans included."""
    if isinstance(value, (str, bytes, bytearray)) or _is_truth(value):
        return None
    with suppress(TypeError, ValueError, RuntimeError, OverflowError):
        number = float(value)  # type: ignore[arg-type]  # suppressed where it is none
        return number if math.isfinite(number) else None
    return None


def given_integer(name: str, value: object, least: int, most: int = LARGEST) -> int:
    """Return an integer that a user gave as Python's.

    Raises:
        ArgumentError: If ``value`` is not an integer.
        ConfigError: If it is out of its range.
    """
    number = as_integer(value)
    if number is None or not least <= number <= most:
        message = f"{name}: got {shown(value)}; expected an integer from {least} to {most:,}"
        raise (ArgumentError if number is None else ConfigError)(message)
    return number


def given_positive(name: str, value: object) -> float:
    """Return a positive number that a user gave as a float; products and quotients of a few of them are finite.

    Raises:
        ConfigError: If ``value`` is not a finite number above 0, or far from any quantity.
    """
    number = as_number(value)
    if number is None or not _TINY <= number <= _HUGE:
        message = f"{name}: got {shown(value)}; expected a positive number, from {_TINY:g} to {_HUGE:g}"
        raise ConfigError(message)
    return number


def plain(schema: Any, *, keys: bool = False) -> Any:  # noqa: ANN401 - a core schema is nested dicts and lists
    """Return a core schema that takes numbers only as numbers, and truth values only as truth values.

    Args:
        schema: A core schema, or a part of one.
        keys: Whether it is the schema of a mapping's keys, which files write as texts.
    """
    if isinstance(schema, (list, tuple)):
        return type(schema)(plain(part, keys=keys) for part in schema)
    if not isinstance(schema, dict):
        return schema
    if (check := (_KEY_CHECKS if keys else _CHECKS).get(schema.get("type", ""))) is not None:
        return core_schema.no_info_before_validator_function(check, schema)
    return {
        name: part if name in _VALUES else plain(part, keys=keys or name == "keys_schema")
        for name, part in schema.items()
    }


def _is_truth(value: object) -> bool:
    return isinstance(value, bool) or str(getattr(value, "dtype", "")) in {"bool", "torch.bool"}


def _integer(value: Any) -> Any:  # noqa: ANN401 - a validator takes whatever the user wrote
    if isinstance(value, (str, bytes)) or _is_truth(value):
        raise PydanticKnownError(_INTEGER)
    whole = isinstance(value, float) and value.is_integer()  # pydantic takes those up to 2**63 only
    return int(value) if whole or isinstance(value, Integral) else value


def _number(value: Any) -> Any:  # noqa: ANN401 - as above
    if isinstance(value, (str, bytes)) or _is_truth(value):
        raise PydanticKnownError(_NUMBER)
    if not isinstance(value, Real):
        return value
    try:
        number = float(value)
    except OverflowError:
        raise PydanticKnownError(_FINITE) from None
    return value if isinstance(value, (int, float)) else number


def _truth(value: Any) -> Any:  # noqa: ANN401 - as above
    if type(value).__name__ not in {"bool", "bool_"}:  # Python's, and numpy's under both of its names
        raise PydanticKnownError(_TRUTH)
    return bool(value)


def _key(value: Any) -> Any:  # noqa: ANN401 - as above
    if _is_truth(value):
        raise PydanticKnownError(_NUMBER)
    return value


_KEY_CHECKS: Mapping[str, Callable[[Any], Any]] = {"int": _key, "float": _key}
_CHECKS: Mapping[str, Callable[[Any], Any]] = {"int": _integer, "float": _number, "bool": _truth}
