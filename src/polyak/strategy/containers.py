"""Settings that hold other values: mappings, lists and sets that cannot be changed in place, and their hashes."""

from __future__ import annotations

import math
from decimal import Decimal
from typing import Any, NoReturn

from pydantic import BaseModel
from typing_extensions import override

from polyak.errors import ArgumentError, FrozenError
from polyak.errors.formatting import type_name

__all__ = ["frozen", "hashable"]


class _FrozenDict(dict[Any, Any]):
    """A setting that is a mapping."""

    @override
    def __reduce__(self) -> tuple[type, tuple[dict[Any, Any]]]:
        return _FrozenDict, ({**self},)


class _FrozenList(list[Any]):
    """A setting that is a list."""

    @override
    def __reduce__(self) -> tuple[type, tuple[list[Any]]]:
        return _FrozenList, ([*self],)


class _FrozenSet(set[Any]):
    """A setting that is a set."""

    @override
    def __reduce__(self) -> tuple[type, tuple[set[Any]]]:
        return _FrozenSet, ({*self},)


def _refuse(self: object, *_: object, **__: object) -> NoReturn:
    kind = type(self).__name__.removeprefix("_Frozen").lower()
    message = f"settings are frozen, and a {kind} among them too; make another object with another {kind}"
    raise FrozenError(message)


_CHANGES: dict[type, str] = {
    _FrozenDict: "__setitem__ __delitem__ __ior__ clear pop popitem setdefault update",
    _FrozenList: "__setitem__ __delitem__ __iadd__ __imul__ append clear extend insert pop remove reverse sort",
    _FrozenSet: (
        "__iand__ __ior__ __isub__ __ixor__ add clear difference_update discard intersection_update pop remove "
        "symmetric_difference_update update"
    ),
}
for _kind, _names in _CHANGES.items():
    for _name in _names.split():
        setattr(_kind, _name, _refuse)


def frozen(value: Any) -> Any:  # noqa: ANN401 - a setting of any type
    """Return a setting whose containers cannot be changed in place.

    Raises:
        ValueError: If there is a NaN in it.
    """
    if isinstance(value, (float, Decimal)) and math.isnan(value):
        message = "got nan; expected a number. NaN is unequal to itself, so no saved setting could be compared with it"
        raise ValueError(message)
    if isinstance(value, BaseModel):
        for part in vars(value).values():
            frozen(part)
    if isinstance(value, dict):
        return _FrozenDict({key: frozen(part) for key, part in value.items()})
    if type(value) is tuple:
        return tuple(map(frozen, value))
    if isinstance(value, list):
        return _FrozenList(map(frozen, value))
    return _FrozenSet(value) if isinstance(value, set) else value


def hashable(name: str, value: Any) -> object:  # noqa: ANN401 - a setting of any type
    """Return a hashable value, the same for equal settings.

    Raises:
        ArgumentError: If the setting ``name`` holds what has no hash.
    """
    if isinstance(value, dict):
        return frozenset((key, hashable(name, part)) for key, part in value.items())
    if isinstance(value, (list, tuple)):
        return tuple(hashable(name, part) for part in value)
    if isinstance(value, (set, frozenset)):
        return frozenset(value)
    if isinstance(value, BaseModel) and value.model_config.get("frozen"):
        return type(value), hashable(name, vars(value))
    try:
        hash(value)
    except TypeError as error:
        way = "model_config = ConfigDict(frozen=True)" if isinstance(value, BaseModel) else "a __hash__"
        message = (
            f"the setting {name} holds an object of the class {type_name(value)}, which can be changed and has no "
            f"hash; give that class {way}"
        )
        raise ArgumentError(message) from error
    return value
