"""Frozen settings: pydantic models whose mistakes are errors of polyak, in words."""

from __future__ import annotations

import re
from difflib import get_close_matches
from inspect import isabstract
from typing import TYPE_CHECKING, Any, Self

from pydantic import BaseModel, ConfigDict, ValidationError, model_validator
from pydantic_core import core_schema
from typing_extensions import override

from polyak.errors import ArgumentError, ConfigError, FrozenError
from polyak.errors.formatting import brief, listed, shown
from polyak.errors.hints import habit
from polyak.strategy.containers import frozen, hashable
from polyak.strategy.numbers import plain

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Mapping

    from pydantic import GetCoreSchemaHandler
    from pydantic._internal._model_construction import ModelMetaclass
    from pydantic_core import CoreSchema, ErrorDetails
else:
    ModelMetaclass = type(BaseModel)

__all__ = ["Frozen", "line", "nearest", "similar"]

_NUMBER = r"[-+]?\d*\.?\d+(e[-+]?\d+)?"
_LONGEST = 40  # letters of a name for which similar ones are looked up


class _Direct(ModelMetaclass):
    """Turns what pydantic refuses into a ConfigError where settings are made by a call.

    Validation inside another model does not come here: pydantic collects those errors with their locations.
    """

    if not TYPE_CHECKING:  # type checkers read the fields

        def __call__(cls, *args: Any, **settings: Any) -> Any:  # noqa: ANN401, N805 - an instance of this class
            if args:
                message = f"{cls.__name__}() takes settings by name only; got {shown(args[0])}. {cls._by_name(args[0])}"
                raise ArgumentError(message)
            if isabstract(cls):
                methods = ", ".join(f"{name}()" for name in sorted(cls.__abstractmethods__))
                message = f"{cls.__name__} is abstract: it has no {methods}. Define what is missing, or use a subclass"
                raise ArgumentError(message)
            if not cls.__pydantic_complete__:
                # Types that are defined later than the class: pydantic looks for them two frames up, and this is one.
                cls.model_rebuild(raise_errors=False, _parent_namespace_depth=3)
            try:
                return super().__call__(**settings)
            except ValidationError as error:
                raise cls._refused(error, settings, f"{cls.__name__}()") from error


class Frozen(BaseModel, metaclass=_Direct):
    """Frozen settings that are validated; what a config file may not say, code may not say either.

    Numbers are numbers: neither texts nor booleans count as one, as in the JSON schema. Those of numpy are taken.

    Raises:
        ConfigError: If a setting is missing, unknown or out of its range.
        ArgumentError: If settings are given by position.
    """

    model_config = ConfigDict(
        frozen=True, extra="forbid", populate_by_name=True, use_attribute_docstrings=True, ser_json_inf_nan="constants"
    )

    @model_validator(mode="after")
    def _freeze(self) -> Self:
        for name in type(self).model_fields:
            try:
                vars(self)[name] = frozen(vars(self)[name])
            except ValueError as error:
                message = f"{name}: {error}"
                raise ValueError(message) from error
        return self

    def __hash__(self) -> int:
        own = type(self)
        return hash((own, *(hashable(f"{own.__name__}.{name}", getattr(self, name)) for name in own.model_fields)))

    @override
    def model_copy(self, *, update: Mapping[str, Any] | None = None, deep: bool = False) -> Self:
        """Return a copy with some settings replaced; unlike pydantic's, it is validated.

        Raises:
            ConfigError: If a setting is unknown or out of its range.
        """
        if not update:
            return super().model_copy(deep=deep)
        own = type(self)
        settings = {**{name: getattr(self, name) for name in own.model_fields}, **update}
        try:
            made = own.model_validate(settings)
        except ValidationError as error:
            raise self._refused(error, settings, f"{own.__name__}.model_copy()") from error
        made.model_fields_set.intersection_update({*self.model_fields_set, *update})
        return made.model_copy(deep=True) if deep else made

    @override
    def __setattr__(self, name: str, value: Any) -> None:
        try:
            super().__setattr__(name, value)
        except ValueError as error:  # pydantic's, for frozen fields and for names that are none
            raise self._frozen(name) from error

    @override
    def __delattr__(self, name: str) -> None:
        try:
            super().__delattr__(name)
        except ValueError as error:  # as above
            raise self._frozen(name) from error

    def _frozen(self, name: str) -> FrozenError:
        own = type(self)
        if name not in own.model_fields:
            message = f"{own.__name__} has no setting {shown(name)}. Known: {listed(own.model_fields)}."
        else:
            message = f"{own.__name__}.{name} is frozen; make another object: {own.__name__}({name}=...)"
        return FrozenError(message)

    @classmethod
    def _refused(cls, error: ValidationError, settings: Mapping[str, Any], where: str) -> ConfigError:  # noqa: ARG003 - subclasses look at them
        lines = [line(detail, cls._hint) for detail in error.errors()]
        return ConfigError(brief("\n  ".join([f"{where} cannot be used:", *lines])))

    @classmethod
    def _by_name(cls, value: object) -> str:  # noqa: ARG003 - subclasses look at it
        """Return the spelling of a value that was given without a name."""
        example = next((name for name in cls.model_fields if name != "name"), None)
        return f"It has no settings: {cls.__name__}()" if example is None else f"Write {example}=..."

    @classmethod
    def _hint(cls, key: str) -> str:
        return f"{nearest(key, cls.model_fields)} Known: {listed(sorted(cls.model_fields))}."

    @classmethod
    @override
    def __get_pydantic_core_schema__(cls, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        schema: CoreSchema = plain(handler(source))
        return core_schema.no_info_before_validator_function(cls._made, schema) if isabstract(cls) else schema

    @classmethod
    def _made(cls, value: object) -> object:
        """Refuse settings for an abstract class: pydantic's error for that is not a ``ValidationError``."""
        if not isinstance(value, cls):
            message = f"got {shown(value)}; expected an object of a subclass of {cls.__name__}, which is abstract"
            raise ValueError(message)  # noqa: TRY004 - pydantic turns only these into a located error
        return value


def line(detail: ErrorDetails, hint: Callable[[str], str]) -> str:
    """Describe one invalid setting.

    Args:
        detail: The error as pydantic has it.
        hint: Maps the name of an unknown setting to what could have been meant.
    """
    # pydantic names the branches of a union in the location: they are not keys of the user.
    loc = [str(part) for part in detail["loc"] if "[" not in str(part)]
    where = ".".join(part if len(part) <= _LONGEST else shown(part) for part in loc)
    kind, got = detail["type"], shown(detail["input"])
    if kind == "extra_forbidden":
        return f"{where}: there is no such setting (got {got}).{hint(str(detail['loc'][-1]))}"
    if kind == "value_error":  # a message of our own says what was got
        return f"{where}: {detail['msg'].removeprefix('Value error, ')}".removeprefix(": ")
    if kind == "missing" and loc[-1] == "name":
        return f"{where}: the class has no name; declare it as  name: Literal['my_name'] = 'my_name'"
    if kind == "missing":
        return f"{where}: it has no default and must be given"
    allowed = re.findall(r"'([^']*)'", detail["ctx"]["expected"]) if kind == "literal_error" else []
    text = isinstance(detail["input"], str) and re.fullmatch(_NUMBER, detail["input"])
    unquoted = " Write it without quotes." if text and kind != "literal_error" else ""
    return f"{where}: {detail['msg']} (got {got}).{unquoted}{similar(detail['input'], allowed)}"


def nearest(key: str, known: Collection[str]) -> str:
    """Return a hint at the setting that was probably meant; empty where none is near."""
    return habit(key, known) or similar(key, known)


def similar(got: object, known: Collection[str]) -> str:
    """Return a hint at the most similar name; empty if none is near."""
    key = got if isinstance(got, str) else ""
    near = get_close_matches(key, list(known), n=1, cutoff=0.5) if len(key) <= _LONGEST else []
    return f" Did you mean {near[0]!r}?" if near else ""
