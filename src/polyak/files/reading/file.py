"""A single file: which format it has, and where its tensors lie."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import TYPE_CHECKING

from polyak.errors import ConfigError, StateError
from polyak.errors.formatting import shortened, shown
from polyak.files.reading.dictionary import choose, recorded_step
from polyak.files.reading.found import Found
from polyak.files.reading.meanings import View
from polyak.files.reading.raw import RawFile, Stored
from polyak.files.reading.refusals import mistaken_for
from polyak.files.reading.safetensors import is_safetensors, read_safetensors
from polyak.files.reading.torch_file import is_zip, read_archive, read_legacy

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from polyak.files.reading.meanings import Saved
    from polyak.files.reading.torch_file import Archive

__all__ = ["read_file"]

_PARTITIONED = "param_shapes"  # what DeepSpeed keeps of the whole tensors
_SHOWN = 6
_STEPS = ("step", "global_step", "iter_num")


def read_file(path: Path, key: str | None) -> Found:
    """Return the contents of a file, of which only the header is read.

    Args:
        path: The file.
        key: The path of keys to the weights in a dictionary. Defaults to the one that is usual.

    Raises:
        MissingFileError: If there is no such file.
        StateError: If it is damaged, malicious or no checkpoint.
        ConfigError: If it holds several candidates for the weights.
    """
    file = RawFile(path)
    where = repr(str(path))
    try:
        if reason := mistaken_for(file):
            message = f"{where} cannot be read: {reason}"
            raise StateError(message)  # noqa: TRY301 - reported with the others
        return _read(file, where, key)
    except (StateError, ConfigError) as error:
        file.close()
        if where in str(error):
            raise
        message = f"{where} is refused: {error}"
        raise type(error)(message) from error
    except (ValueError, RecursionError, OverflowError, MemoryError, TypeError, KeyError) as error:
        file.close()
        reason = str(error) if type(error) is ValueError else f"{type(error).__name__}: {error}"
        message = f"{where} is damaged or no checkpoint: {reason}"
        raise StateError(message) from error


def _read(file: RawFile, where: str, key: str | None) -> Found:
    if is_zip(file):
        return _from_archive(read_archive(file), "torch", where, key)
    if is_safetensors(file) or file.path.suffix == ".safetensors":
        found = read_safetensors(file)
        found.step = _step_in(found.texts)
        return found if key is None else _under(found, where, key)
    return _from_archive(read_legacy(file), "torch (legacy)", where, key)


def _from_archive(archive: Archive, kind: str, where: str, key: str | None) -> Found:
    chosen = choose(archive.value, where, key)
    tensors = {name: archive.stored(view) for name, view in chosen.tensors.items()}
    whole = {name: shape for found in chosen.path for name, shape in _whole_shapes(found.get(_PARTITIONED))}
    if parts := [name for name, view in chosen.tensors.items() if whole.get(name, view.shape) != view.shape]:
        message = (
            f"{where} is of one rank of DeepSpeed's ZeRO stage 3: {shown(parts[0])} has the shape "
            f"{chosen.tensors[parts[0]].shape} in it, and {whole[parts[0]]} in the model. Gather the weights first, by "
            "zero_to_fp32.py in the folder of the checkpoint"
        )
        raise StateError(message)
    step = recorded_step(chosen.path)
    if isinstance(step, View):
        step = _value(archive.stored(step))
    number = int(step) if isinstance(step, (int, float)) and not isinstance(step, bool) and step == step // 1 else None
    if archive.foreign:
        names = shortened(sorted(archive.foreign), _SHOWN, ", ")
        chosen.notes.append(f"it names classes, of which nothing was loaded or called: {names}")
    return Found(kind, tensors, number, archive.texts, chosen.notes, chosen.key)


def _whole_shapes(saved: Saved) -> Iterator[tuple[str, tuple[int, ...]]]:
    for table in saved if isinstance(saved, list) else [saved]:
        if isinstance(table, Mapping):
            yield from ((name, shape) for name, shape in table.items() if isinstance(shape, tuple))


def _value(stored: Stored) -> Saved:
    from polyak.files.reading.values import read_values

    values = read_values(stored, 0, 1) if stored.shape in {(), (1,)} else None
    return None if values is None or values.is_complex() else values.item()


def _step_in(texts: Saved) -> int | None:
    for name in _STEPS:
        if name in texts and texts[name].isdecimal():
            return int(texts[name][:18])
    for name in ("polyak", "polyak_snapshot"):
        try:
            step = json.loads(texts[name]).get("step")
        except (KeyError, ValueError, AttributeError, RecursionError):
            continue
        if type(step) is int:
            return step
    return None


def _under(found: Found, where: str, key: str) -> Found:
    """Return the tensors whose names begin with a key, without it."""
    inside = {name[len(key) + 1 :]: stored for name, stored in found.tensors.items() if name.startswith(f"{key}.")}
    if not inside:
        message = f"{where} has no tensor whose name begins with {key + '.'!r}; leave key out to take all"
        raise ConfigError(message)
    found.tensors, found.key = inside, key
    return found
