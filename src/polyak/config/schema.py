"""The JSON schema that editors complete configs from: every strategy that is installed, by its name."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from pydantic_core import core_schema

from polyak.registry import registry

if TYPE_CHECKING:
    from pydantic import GetJsonSchemaHandler
    from pydantic.json_schema import JsonSchemaValue
    from pydantic_core import CoreSchema

    from polyak.registry import Strategies
    from polyak.strategy.base import Strategy

__all__ = ["OneOfTheInstalled", "for_files"]

_DRAFT = "https://json-schema.org/draft/2020-12/schema"


class OneOfTheInstalled:
    """Describes a strategy: the name of an installed one, or a mapping of its name and settings.

    As metadata of a field it holds in any model that has a config as a field, too.
    """

    def __get_pydantic_json_schema__(self, _: CoreSchema, handler: GetJsonSchemaHandler) -> JsonSchemaValue:
        strategies = registry().strategies()
        classes = [*dict.fromkeys(strategies.values())]
        # As one union, so that pydantic refers to each of them by name.
        references = handler(core_schema.union_schema([cls.__pydantic_core_schema__ for cls in classes]))["anyOf"]
        branches, short = [], []
        for cls, reference in zip(classes, references, strict=True):
            own = handler.resolve_ref_schema(reference)
            names = _names(cls, strategies)
            own["description"] = own.get("description", "").split("\n\n")[0]
            own["properties"]["name"] = {"enum": names}
            branches.append({**reference, "required": sorted({"name", *reference.get("required", [])})})
            short += names if {*own.get("required", [])} <= {"name"} else []
        return {"anyOf": [{"enum": short, "type": "string"}, {"oneOf": branches}]}


def for_files(schema: dict[str, Any]) -> dict[str, Any]:
    """Return the schema of a config file, which may name the schema it follows."""
    rest = {**schema}
    whole = rest.pop("anyOf")[0] if "anyOf" in rest else {}  # the other branches are a strategy alone
    made = {**whole, **rest}
    return {"$schema": _DRAFT, **made, "properties": {**made["properties"], "$schema": {"type": "string"}}}


def _names(cls: type[Strategy], strategies: Strategies) -> list[str]:
    keys = [key for key, offered in strategies.items() if offered is cls]
    return [*keys, *(full for key in keys if (full := f"{strategies.distribution(key)}:{key}") if ":" not in key)]
