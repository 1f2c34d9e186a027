"""YAML as editors read it: the core schema of YAML 1.2, in bounded time and memory."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any, ClassVar

import yaml
from typing_extensions import override

from polyak.errors.formatting import shown

if TYPE_CHECKING:
    from collections.abc import Hashable

__all__ = ["dump_yaml", "load_yaml"]

_MOST = 20_000  # values, those behind aliases counted each time
_DEEPEST = 32

# PyYAML follows YAML 1.1, in which 1e-3 is a text, 010 is 8, 1:30 is 90 and yes is true.
_CORE = {
    "null": (r"~|null|Null|NULL|", ["~", "n", "N", ""]),
    "bool": (r"true|True|TRUE|false|False|FALSE", list("tTfF")),
    "int": (r"[-+]?[0-9]+|0o[0-7]+|0x[0-9a-fA-F]+", list("-+0123456789")),
    "float": (
        r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)",
        list("-+.0123456789"),
    ),
    "merge": (r"<<", ["<"]),
}


class _Loader(yaml.SafeLoader):
    """Counts what it composes, and refuses what grows, what is too deep and what is given twice."""

    yaml_implicit_resolvers: dict[Any, list[tuple[str, Any]]] = {}  # noqa: RUF012 - the stubs declare it so
    yaml_constructors: ClassVar[dict[str | None, Any]] = {}

    def __init__(self, text: str) -> None:
        super().__init__(text)
        self._seen = self._depth = 0
        self._sizes: dict[str, int] = {}

    @override
    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        event: Any = self.peek_event()  # type: ignore[no-untyped-call]  # the stubs lack its types
        anchor, mark, before = event.anchor, event.start_mark, self._seen
        if self.check_event(yaml.AliasEvent):
            self._count(self._sizes.get(anchor, _MOST + 1), mark)
            return super().compose_node(parent, index)
        self._count(1, mark)
        self._depth += 1
        if self._depth > _DEEPEST:
            raise yaml.MarkedYAMLError(problem=f"more than {_DEEPEST} values within one another", problem_mark=mark)
        node = super().compose_node(parent, index)
        self._depth -= 1
        if anchor is not None:
            self._sizes[anchor] = self._seen - before
        return node

    def _count(self, values: int, mark: yaml.Mark) -> None:
        self._seen += values
        if self._seen > _MOST:
            problem = f"more than {_MOST:,} values, with those behind aliases, or an alias of what it stands in"
            raise yaml.MarkedYAMLError(problem=problem, problem_mark=mark)

    @override
    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        seen = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode) and key.tag != "tag:yaml.org,2002:merge":
                if key.value in seen:
                    raise yaml.MarkedYAMLError(
                        problem=f"the key {shown(key.value)} is given twice", problem_mark=key.start_mark
                    )
                seen.add(key.value)
        return super().construct_mapping(node, deep)

    def construct_core_int(self, node: yaml.ScalarNode) -> int:
        """Return an integer as YAML 1.2 writes it."""
        text = self.construct_scalar(node)
        base = {"0o": 8, "0x": 16}.get(text[:2], 10)
        return int(text, base)


class _Dumper(yaml.SafeDumper):
    """Quotes what either version of YAML would read as something else."""


for _name, (_pattern, _first) in _CORE.items():
    _tag = f"tag:yaml.org,2002:{_name}"
    _Loader.add_implicit_resolver(_tag, re.compile(rf"(?:{_pattern})\Z"), _first)
    if _name != "merge":
        _Dumper.add_implicit_resolver(_tag, re.compile(rf"(?:{_pattern})\Z"), _first)
for _name in ("null", "bool", "float", "str", "seq", "map"):
    _tag = f"tag:yaml.org,2002:{_name}"
    _Loader.add_constructor(_tag, yaml.SafeLoader.yaml_constructors[_tag])
_Loader.add_constructor("tag:yaml.org,2002:int", _Loader.construct_core_int)
_Loader.yaml_constructors[None] = yaml.SafeLoader.yaml_constructors[None]  # which refuses every other tag


def load_yaml(text: str) -> Any:  # noqa: ANN401 - whatever the file holds
    """Return the values of a YAML text.

    Raises:
        yaml.YAMLError: If it is malformed, has a key twice, or its aliases stand for too much.
    """
    loader = _Loader(text)
    try:
        return loader.get_single_data()
    finally:
        loader.dispose()


def dump_yaml(data: Any) -> str:  # noqa: ANN401 - plain types
    """Return plain types as YAML."""
    text: str = yaml.dump(data, Dumper=_Dumper, sort_keys=False, allow_unicode=True)
    return text
