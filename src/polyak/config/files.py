"""Config files: TOML, YAML and JSON, whole or absent."""

from __future__ import annotations

import json
import os
import re
import tomllib
from collections import Counter
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import tomli_w
import yaml

from polyak.config.yaml12 import dump_yaml, load_yaml
from polyak.errors import ConfigError, MissingFileError
from polyak.errors.formatting import brief, listed, shown
from polyak.io import atomic

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

__all__ = ["SUFFIXES", "read", "render", "write"]

SUFFIXES = (".toml", ".yaml", ".yml", ".json")
_LONGEST_PATH = 400
_LARGEST = 256 * 1024  # bytes: a config of thousands of names, read in a second
_PART = r"""(?:[\w-]+|"[^"\n]*"|'[^'\n]*')[ \t]*"""
_LONG_KEY = re.compile(rf"(?<![\w-]){_PART}(?:\.[ \t]*{_PART}){{32}}")  # which tomllib reads in quadratic time


def read(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Return the table in a config file; ``$schema``, which only editors read, is dropped.

    Time and memory are bounded, whatever the file holds.

    Raises:
        ConfigError: If the file is missing, malformed, too large, no regular file, of another type, or holds no table.
    """
    file = _path(path)
    suffix = _suffix(file)
    text = _text(file)
    try:
        data = {".toml": _toml, ".json": _json}.get(suffix, load_yaml)(text)
    except (ValueError, yaml.YAMLError) as error:
        message = brief(f"the config file {_named(file)} is not valid {suffix[1:].upper()}: {error}")
        raise ConfigError(message) from error
    except RecursionError:
        message = f"the config file {_named(file)} has too many values within one another; expected two or three levels"
        raise ConfigError(message) from None
    if not isinstance(data, Mapping):
        what = "nothing" if data is None else shown(data)
        message = f"the config file {_named(file)} holds {what}; expected a table with 'strategy' and options"
        raise ConfigError(message)
    if not isinstance(schema := data.get("$schema", ""), str):
        message = f"the config file {_named(file)} has the $schema {shown(schema)}; expected a text"
        raise ConfigError(message)
    return {key: value for key, value in data.items() if key != "$schema"}


def _text(file: Path) -> str:
    try:
        with atomic.open_regular(file) as opened:
            content = opened.read(_LARGEST + 1)
            size = os.fstat(opened.fileno()).st_size
        text = content.decode("utf-8-sig") if len(content) <= _LARGEST else ""
    except (OSError, ValueError) as error:  # ValueError: no UTF-8, or a path with a null byte
        message = brief(f"the config file {_named(file)} cannot be read: {getattr(error, 'strerror', None) or error}")
        raise (MissingFileError if isinstance(error, FileNotFoundError) else ConfigError)(message) from error
    if len(content) > _LARGEST:
        message = (
            f"the config file {_named(file)} has {size:,} bytes; expected a config of at most {_LARGEST // 1024} KiB"
        )
        raise ConfigError(message)
    return text


def _toml(text: str) -> Any:  # noqa: ANN401 - whatever the file holds
    if found := _LONG_KEY.search(text):
        line = text.count("\n", 0, found.start()) + 1
        message = f"the key {shown(found.group())} has too many parts (at line {line})"
        raise ValueError(message)
    return tomllib.loads(text)


def _json(text: str) -> Any:  # noqa: ANN401 - as above
    return json.loads(text, object_pairs_hook=_once)


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    table = dict(pairs)
    if len(table) < len(pairs):
        twice, _ = Counter(key for key, _ in pairs).most_common(1)[0]
        message = f"the key {shown(twice)} is given twice"
        raise ValueError(message)
    return table


def render(path: str | os.PathLike[str], data: Mapping[str, Any]) -> str:
    """Return the text of a config file for data of plain types.

    Raises:
        ConfigError: If the file type is another, or TOML, which has no null, and the strategy needs one.
    """
    suffix = _suffix(_path(path))
    options = {key: value for key, value in data.items() if value is not None}
    if suffix == ".json":
        return json.dumps(options, indent=2) + "\n"
    if suffix != ".toml":
        return dump_yaml(options)
    if nulls := [*_nulls(options["strategy"])]:
        message = f"TOML has no null, and the strategy has {listed(nulls)} = None; write a .yaml or .json file instead"
        raise ConfigError(message)
    return tomli_w.dumps(options)


def _nulls(value: object, where: str = "") -> Iterator[str]:
    """Return the places of nulls in plain types."""
    parts = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, part in parts:
        place = f"{where}.{key}" if where else str(key)
        if part is None:
            yield place
        yield from _nulls(part, place)


def write(path: str | os.PathLike[str], text: str) -> None:
    """Write a text file so that it is never seen in part: to a scratch file first, then renamed.

    Raises:
        WriteError: If it cannot be written, as on a full disk.
    """
    atomic.write_whole(_path(path), lambda scratch: scratch.write_text(text, encoding="utf-8"))


def _path(path: str | os.PathLike[str]) -> Path:
    return atomic.as_path(path, "a config file")


def _named(file: Path) -> str:
    name = str(file)
    return repr(name) if len(name) <= _LONGEST_PATH else shown(name)


def _suffix(file: Path) -> str:
    suffix = file.suffix.lower()
    if suffix not in SUFFIXES:
        expected = ", ".join(SUFFIXES)
        message = f"the config file {_named(file)} has the type {shown(suffix or '(none)')}; expected one of {expected}"
        raise ConfigError(message)
    return suffix
