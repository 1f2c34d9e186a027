"""Configs: a strategy by name with its settings, and the engine's options; from and to files."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated, Any, Self

from pydantic import (
    BeforeValidator,
    SerializeAsAny,
    SerializerFunctionWrapHandler,
    ValidationError,
    field_serializer,
    model_validator,
)
from typing_extensions import override

from polyak.config.chosen import AnyStrategy, plain_mapping, whole
from polyak.config.explain import explain
from polyak.config.files import read, render, write
from polyak.config.schema import OneOfTheInstalled, for_files
from polyak.engine import Engine
from polyak.engine.options import Options
from polyak.errors import ArgumentError, ConfigError, UnknownStrategyError
from polyak.errors.formatting import brief, listed, shown
from polyak.registry import registry
from polyak.strategy import EMA
from polyak.strategy.base import Strategy, settings_of
from polyak.strategy.numbers import given_integer
from polyak.strategy.profile import Profile

if TYPE_CHECKING:
    from pydantic import GetJsonSchemaHandler
    from pydantic.json_schema import JsonSchemaValue
    from pydantic_core import CoreSchema

    from polyak.engine.averager import Averager
    from polyak.tensors.entries import Given

__all__ = ["AveragerConfig"]

_EXPECTED = "a strategy is a name, a mapping with a 'name', or a polyak.Strategy"


def _resolve(value: Any) -> Any:  # noqa: ANN401 - a validator takes whatever the user wrote
    value = plain_mapping(value)
    if isinstance(value, Mapping) and "strategy" in value and "name" not in value:
        value = AveragerConfig.model_validate(value)
    if isinstance(value, AveragerConfig):
        fields = Options.model_fields.items()
        if options := sorted(name for name, field in fields if getattr(value, name) != field.default):
            message = f"{_EXPECTED}; got a config with the options {listed(options)}: give its strategy alone"
            raise ValueError(message)
        return value.strategy
    if isinstance(value, type) and issubclass(value, Strategy):
        return value.model_validate({})
    if isinstance(value, str):
        value = {"name": value}
    if isinstance(value, Strategy):
        return value
    if not isinstance(value, Mapping):
        message = f"{_EXPECTED}; got {shown(value)}"
        raise ValueError(message)  # noqa: TRY004 - pydantic turns only these into a located error
    name = value.get("name")
    if not isinstance(name, str):
        message = f"{_EXPECTED}; got {shown(dict(value))}"
        raise ValueError(message)  # noqa: TRY004 - as above
    cls = registry().resolve(name)
    return cls.model_validate({**value, "name": cls.model_fields["name"].default})


class AveragerConfig(Options):
    """A whole averager as data: the strategy and every option, frozen, validated, in files.

    Raises:
        ConfigError: If a key or a value is wrong; it names the location (``strategy.decay``). Inside a pydantic model
            of your own it is part of the ``ValidationError`` of that model.

    Often confused with: ``polyak.Strategy``, which is the part of it that decides the rate.

    Examples:
        >>> config = AveragerConfig(strategy={"name": "ema", "decay": 0.99}, every=10)
        >>> config.strategy
        EMA(name='ema', decay=0.99)
        >>> AveragerConfig.model_validate_json(config.model_dump_json()) == config
        True
    """

    strategy: Annotated[SerializeAsAny[Strategy], BeforeValidator(_resolve), OneOfTheInstalled()] = EMA()
    """The strategy: a name, or a mapping of its name and settings."""

    @classmethod
    def of(cls, data: AnyStrategy | AveragerConfig, where: str = "the settings") -> Self:
        """Return the config in a mapping, or say in words what is wrong with it.

        Args:
            data: A mapping with "strategy" and options, or whatever names a strategy alone.
            where: What the mapping is, for messages.

        Raises:
            ArgumentError: If ``data`` is neither.
            ConfigError: If a key or a value is wrong. The message names its location and the nearest valid name.
        """
        settings = whole(data)
        if isinstance(settings, cls):
            return settings
        if not isinstance(settings, Mapping):
            message = f"{where}: got {shown(data)}; expected a strategy, or a mapping with 'strategy' and options"
            raise ArgumentError(message)
        try:
            return cls.model_validate(settings)
        except ValidationError as error:
            raise cls._refused(error, settings, where) from error

    def named(self) -> dict[str, Any]:
        """Return the options that it names itself, and its strategy."""
        return {"strategy": self.strategy, **{name: getattr(self, name) for name in self.model_fields_set}}

    @model_validator(mode="before")
    @classmethod
    def _whole(cls, data: Any) -> Any:  # noqa: ANN401 - as above
        return whole(data)

    @classmethod
    @override
    def _refused(cls, error: ValidationError, settings: Mapping[str, Any], where: str) -> ConfigError:
        settings = whole(settings)
        causes = [detail.get("ctx", {}).get("error") for detail in error.errors()]
        if any(isinstance(cause, UnknownStrategyError) for cause in causes):
            lines = explain(error, {**settings, "strategy": "ema"})  # its own settings belong to no strategy
            return UnknownStrategyError(brief("\n  ".join([f"{where} cannot be used:", *lines])))
        return ConfigError(brief("\n  ".join([f"{where} cannot be used:", *explain(error, settings)])))

    @classmethod
    @override
    def _by_name(cls, value: object) -> str:
        if hasattr(value, "parameters"):
            return "A config builds averagers: config.build(model)"
        return "Write strategy=..."

    @classmethod
    def from_file(cls, path: str | os.PathLike[str]) -> Self:
        """Return the config in a ``.toml``, ``.yaml`` or ``.json`` file.

        Raises:
            ConfigError: If the file is missing, malformed, of another type, or has a wrong key or value.
        """
        return cls.of(read(path), f"the config file {os.fspath(path)!r}")

    def to_file(self, path: str | os.PathLike[str]) -> None:
        """Write the config as ``.toml``, ``.yaml`` or ``.json``; the file is whole or absent.

        Raises:
            ConfigError: If the file type is another, the strategy's name belongs to another class, or the strategy has
                a setting that a file cannot hold.
            WriteError: If the file cannot be written, as on a full disk.
        """
        own, names = type(self.strategy), registry()
        if names.called(self.strategy) in names.strategies() and own not in names.strategies().values():
            message = (
                f"the class {own.__name__} has the name {self.strategy.name!r} of another strategy, and a file would "
                f"mean that one; give it its own:  name: Literal['my_name'] = 'my_name'"
            )
            raise ConfigError(message)
        settings_of(self.strategy)
        data, fields = self.model_dump(mode="json"), own.model_fields
        # Only a null that is no default must be written, and TOML cannot.
        defaults = {key for key, field in fields.items() if field.default is None and data["strategy"][key] is None}
        data["strategy"] = {key: value for key, value in data["strategy"].items() if key not in defaults}
        text = render(path, data)
        if self.of(data, "what would be written") != self:
            message = f"a file would not say what {own.__name__} is: {shown(self.strategy)} would come back as another"
            raise ConfigError(message)
        write(path, text)

    def build(self, model: Given, *, into: Given | None = None) -> Averager:
        """Return an averager of a model.

        Args:
            model: The model.
            into: Your own tensors that hold the average; see ``polyak.average``.

        Raises:
            ModelError: If the model has nothing that can be averaged.
            ConfigError: If a glob matches no tensor.
            MismatchError: If ``into`` does not have the model's tensors.
        """
        options = Options.model_validate(self.model_dump(include={*Options.model_fields}))
        names = registry()
        if into is not None and (self.device is not None or self.dtype != "auto"):
            message = "into= has a device and dtypes of its own; leave device= and dtype= out, or convert its tensors"
            raise ConfigError(message)
        engine = Engine(model, self.strategy, options, knows=names.knows, into=into)
        if names.listens:
            engine.updater.listeners.append(names.updated)
        return engine

    def profile(self, step: int, *, counted_from: int = 1) -> Profile:
        """Return the share of each update in the average after the optimiser step ``step``, without a model.

        Args:
            step: The optimiser step.
            counted_from: The number of the first step: 0 where the loop gives ``update(step=0)`` first.

        Examples:
            >>> AveragerConfig(strategy="swa", start=76).profile(100).effective_size
            25.0
        """
        step = given_integer("step", step, 0)
        least = self.every if given_integer("counted_from", counted_from, 0) else 0
        first = max(least, -(-self.start // self.every) * self.every)
        n = max(0, (step - first) // self.every + 1)
        cadence = {"every": self.every, "start": self.start, "first": first}
        return Profile.of(self.strategy, n, **cadence, origin=self.origin)

    # Without return_type, pydantic 2.10 looks for Any in the module of a class that derives from this one.
    @field_serializer("strategy", mode="wrap", return_type=dict[str, Any])
    def _named(self, strategy: Strategy, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        # A name that two plugins offer is written as it was chosen: "dist:name".
        computed = type(strategy).model_computed_fields
        said = {name: value for name, value in handler(strategy).items() if name not in computed}
        return {**said, "name": registry().called(strategy)}

    @classmethod
    @override
    def __get_pydantic_json_schema__(cls, schema: CoreSchema, handler: GetJsonSchemaHandler) -> JsonSchemaValue:
        # Put in the place of the definition, which a reference to it would make refer to itself.
        own = {**handler.resolve_ref_schema(handler(schema))}
        return {"anyOf": [own, *own["properties"]["strategy"]["anyOf"]]} if handler.mode == "validation" else own

    @classmethod
    @override
    def model_json_schema(cls, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """Return the JSON schema that an editor completes from: every strategy that is installed, by its name."""
        return for_files(super().model_json_schema(*args, **kwargs))
