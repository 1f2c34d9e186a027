"""Numbers and truth values that are taken as such only: the JSON schema and the code accept the same."""

from __future__ import annotations

from numbers import Integral, Real
from typing import TYPE_CHECKING, Annotated, Any, Final

from pydantic import Field
from pydantic_core import PydanticKnownError, core_schema

from polyak.errors import ConfigError
from polyak.errors.formatting import shown

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

__all__ = ["Count", "Steps", "check_integer", "plain"]

Count = Annotated[int, Field(gt=0, lt=2**63)]
"""How many there are of something: at least one, and an integer of 64 bits."""
Steps = Annotated[int, Field(ge=0, lt=2**63)]
"""A number of steps, or the step at which something begins."""

_VALUES = {"default", "expected", "metadata", "serialization"}  # parts of a core schema that are no schemas
_INTEGER: Final = "int_type"
_NUMBER: Final = "float_type"
_FINITE: Final = "finite_number"
_TRUTH: Final = "bool_type"


def check_integer(name: str, value: object, least: int, most: int = 2**63 - 1) -> None:
    """Refuse what is no integer in a range.

    Raises:
        ConfigError: If ``value`` is none.
    """
    if not isinstance(value, Integral) or isinstance(value, bool) or not least <= int(value) <= most:
        message = f"{name}: got {shown(value)}; expected an integer from {least} to {most:,}"
        raise ConfigError(message)


def plain(schema: Any) -> Any:  # noqa: ANN401 - a core schema is nested dicts and lists
    """Return a core schema whose numbers and truth values are taken as such only."""
    if isinstance(schema, (list, tuple)):
        return type(schema)(map(plain, schema))
    if not isinstance(schema, dict):
        return schema
    if (check := _CHECKS.get(schema.get("type", ""))) is not None:
        return core_schema.no_info_before_validator_function(check, schema)
    return {key: part if key in _VALUES else plain(part) for key, part in schema.items()}


def _is_truth(value: object) -> bool:
    return isinstance(value, bool) or type(value).__name__ in {"bool", "bool_"}  # numpy's, under both of its names


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
    if not _is_truth(value):
        raise PydanticKnownError(_TRUTH)
    return bool(value)


_CHECKS: Mapping[str, Callable[[Any], Any]] = {"int": _integer, "float": _number, "bool": _truth}
