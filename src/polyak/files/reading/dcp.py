"""Folders of ``torch.distributed.checkpoint``: the chunks of each tensor; their metadata are not executed."""

from __future__ import annotations

import io
import math
from collections.abc import Mapping
from typing import IO, TYPE_CHECKING, Any, cast

import torch

from polyak.errors.formatting import shown
from polyak.files.reading.dictionary import choose, recorded_step
from polyak.files.reading.found import Found
from polyak.files.reading.inside import inside
from polyak.files.reading.machine import interpret
from polyak.files.reading.meanings import Global, Instance, Memory, View
from polyak.files.reading.raw import Box, Part, RawFile, Stored
from polyak.files.reading.streams import Bounded, Window
from polyak.files.reading.torch_file import is_zip, read_archive

if TYPE_CHECKING:
    from pathlib import Path

    from polyak.files.reading.meanings import Saved

__all__ = ["METADATA", "join", "read_dcp"]

METADATA = ".metadata"
_HUGE = 2**62


def read_dcp(folder: Path, key: str | None) -> Found:
    """Return the contents of a folder.

    Args:
        folder: The folder.
        key: The path of keys to the weights. Defaults to the one that is usual.

    Raises:
        ConfigError: If there are several candidates for the weights.
        StateError: If a file is missing, or a pickle is malicious.
        ValueError: If it is damaged.
    """
    raw = RawFile(folder / METADATA)
    try:
        root = interpret(Bounded(cast("IO[bytes]", io.BufferedReader(Window(raw, 0, raw.size)))), _no_storage)
    finally:
        raw.close()
    state = _state(root)
    abouts = _mapping(state.get("state_dict_metadata"), "its tensors")
    chunks = _chunks(_mapping(state.get("storage_data"), "where its tensors are"))
    tree = _tree(abouts, state.get("planner_data"))
    chosen = choose(tree, repr(str(folder)), key)
    files: dict[str, RawFile] = {}
    tensors = {}
    for name, view in chosen.tensors.items():
        found = chunks.get(view.memory.key, [])
        tensors[name] = _joined(folder, name, view, found, files)
    step = _step(folder, chosen.path, chunks, files)
    return Found("DCP", tensors, step, notes=chosen.notes, key=chosen.key)


def join(name: str, dtype: torch.dtype, shape: tuple[int, ...], boxes: list[Box]) -> Stored:
    """Return a tensor as its boxes: as ranges of the flat tensor if they are, else whole.

    Raises:
        ValueError: If the boxes do not cover it, each value once.
    """
    if sum(math.prod(box.shape) for box in boxes) != math.prod(shape):
        message = f"the parts of the tensor {shown(name)} do not cover it, each value once"
        raise ValueError(message)
    for box in boxes:
        ends = [start + size for start, size in zip(box.starts, box.shape, strict=True)]
        if any(end > size for end, size in zip(ends, shape, strict=True)):
            message = f"a part of the tensor {shown(name)} lies outside of it"
            raise ValueError(message)
    parts = [_range(box, shape) for box in boxes if 0 not in box.shape]
    ranges = sorted((part for part in parts if part is not None), key=lambda part: part.begin)
    end = 0
    for part in ranges:
        if part.begin != end:
            break
        end = part.end
    if len(ranges) == len(parts) and end == math.prod(shape):
        return Stored(dtype, shape, tuple(ranges))
    _check_disjoint(name, boxes)
    return Stored(dtype, shape, boxes=tuple(boxes))


def _range(box: Box, shape: tuple[int, ...]) -> Part | None:
    """Return a box as a range of the flat tensor, if it is one and lies in the file like that."""
    inner = 1
    whole = True
    for size, own, step in zip(reversed(shape), reversed(box.shape), reversed(box.stride), strict=True):
        if own > 1 and (step != inner or not whole):
            return None
        whole = whole and own == size
        inner *= own
    begin = 0
    for start, size in zip(box.starts, shape, strict=True):
        begin = begin * size + start
    return Part(box.file, box.offset, begin, begin + math.prod(box.shape))


def _check_disjoint(name: str, boxes: list[Box]) -> None:
    for i, one in enumerate(boxes):
        for other in boxes[:i]:
            pairs = zip(one.starts, one.shape, other.starts, other.shape, strict=True)
            if all(a < c + d and c < a + b for a, b, c, d in pairs):
                message = f"parts of the tensor {shown(name)} overlap"
                raise ValueError(message)


def _joined(
    folder: Path, name: str, view: View, chunks: list[tuple[tuple[int, ...], Any]], files: dict[str, RawFile]
) -> Stored:
    boxes: dict[tuple[int, ...], Box] = {}
    for starts, info in chunks:
        file, offset, length = _place(folder, info, files)
        if length > file.size - offset or not is_zip_at(file, offset):
            message = f"a part of the tensor {shown(name)} is missing or cut off in {file.path.name!r}"
            raise ValueError(message)
        archive = read_archive(file, offset, length)
        if not isinstance(archive.value, View) or archive.value.dtype != view.dtype:
            message = f"a part of the tensor {shown(name)} is no tensor of {view.dtype}"
            raise ValueError(message)
        part = archive.value
        begin = archive.stored(part)
        at = begin.parts[0].offset if begin.parts else begin.boxes[0].offset
        if len(part.shape) != len(view.shape):
            message = f"a part of the tensor {shown(name)} has shape {part.shape}, and it has {view.shape}"
            raise ValueError(message)
        boxes[starts or (0,) * len(view.shape)] = Box(
            file, at, starts or (0,) * len(view.shape), part.shape, part.stride
        )
    return join(name, view.dtype, view.shape, [*boxes.values()])


def _step(
    folder: Path, path: list[Mapping[Any, Any]], chunks: Mapping[str, Any], files: dict[str, RawFile]
) -> int | None:
    """Return the step that was saved with the weights, which is a small archive of its own."""
    step = recorded_step(path)
    name = step.memory.key if isinstance(step, View) else step if isinstance(step, str) else ""
    for _, info in chunks.get(name, [])[:1]:
        file, offset, length = _place(folder, info, files)
        if length <= file.size - offset and is_zip_at(file, offset):
            value = read_archive(file, offset, length).value
            return value if type(value) is int else None
    return None


def is_zip_at(file: RawFile, offset: int) -> bool:
    """Return whether an archive begins at an offset."""
    return file.read(4, offset) == b"PK\x03\x04" if offset else is_zip(file)


def _place(folder: Path, info: Saved, files: dict[str, RawFile]) -> tuple[RawFile, int, int]:
    state = _state(info)
    path, offset, length = state.get("relative_path"), state.get("offset"), state.get("length")
    if state.get("transform_descriptors"):
        message = "its parts are compressed or encrypted; load and save it by torch.distributed.checkpoint without that"
        raise ValueError(message)
    if type(offset) is not int or type(length) is not int or min(offset, length) < 0 or not isinstance(path, str):
        message = f"a part is said to be at {shown(path)}, byte {shown(offset)}"
        raise ValueError(message)
    if path not in files:
        files[path] = RawFile(inside(folder, path))
    return files[path], offset, length


def _chunks(storage: Mapping[Any, Any]) -> dict[str, list[tuple[tuple[int, ...], Any]]]:
    chunks: dict[str, list[tuple[tuple[int, ...], Any]]] = {}
    for index, info in storage.items():
        state = _state(index)
        starts = state.get("offset")
        if not isinstance(state.get("fqn"), str) or not (starts is None or _are_sizes(starts)):
            message = "it does not say which tensor a part belongs to"
            raise ValueError(message)
        chunks.setdefault(state["fqn"], []).append((tuple(starts or ()), info))
    return chunks


def _tree(abouts: Mapping[Any, Any], paths: Saved) -> dict[Any, Any]:
    """Return the nested dictionaries that were saved."""
    tree: dict[Any, Any] = {}
    for name, about in abouts.items():
        if not isinstance(name, str):
            message = "a tensor has a name that is no text"
            raise ValueError(message)  # noqa: TRY004 - a damaged file
        path = paths.get(name) if isinstance(paths, Mapping) else None
        path = path if isinstance(path, tuple) and path and all(type(one) in {str, int} for one in path) else (name,)
        table = tree
        for one in path[:-1]:
            table = table.setdefault(one, {})
            if not isinstance(table, dict):
                message = f"{shown(name)} lies inside a tensor"
                raise ValueError(message)  # noqa: TRY004 - a damaged file
        table[path[-1]] = _Saved(name) if isinstance(found := _view(name, about), Instance) else found
    return tree


class _Saved(str):
    """The name of what is no tensor."""

    __slots__ = ()


def _view(name: str, about: Saved) -> Saved:
    state = about.state if isinstance(about, Instance) and isinstance(about.state, dict) else {}
    if "size" not in state:
        return about
    shape, properties = state["size"], getattr(state.get("properties"), "state", None)
    kind = properties[0] if isinstance(properties, tuple) and properties else None
    dtype = getattr(torch, kind.name, None) if isinstance(kind, Global) and kind.module == "torch" else None
    if not isinstance(dtype, torch.dtype) or not _are_sizes(shape) or math.prod(max(1, n) for n in shape) >= _HUGE:
        message = f"what it says of the tensor {shown(name)} is incomplete"
        raise ValueError(message)
    return View(Memory(name, dtype, math.prod(shape)), dtype, 0, tuple(shape), ())


def _are_sizes(value: Saved) -> bool:
    return isinstance(value, (tuple, list)) and all(type(n) is int and 0 <= n < _HUGE for n in value)


def _state(value: Saved) -> Mapping[str, Any]:
    return _mapping(value.state if isinstance(value, Instance) else None, "what it describes")


def _mapping(value: Saved, what: str) -> Mapping[Any, Any]:
    if not isinstance(value, Mapping):
        message = f"its metadata do not say {what}"
        raise ValueError(message)  # noqa: TRY004 - a damaged file
    return value


def _no_storage(saved: Saved) -> Memory:
    message = f"its metadata name {shown(saved)} as a storage"
    raise ValueError(message)
