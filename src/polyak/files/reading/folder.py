"""Folders of weights: of Hugging Face, of diffusers, of adapters, whole or in shards."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from polyak.errors import MissingFileError, StateError
from polyak.errors.formatting import listed, shortened, shown
from polyak.files.reading.dcp import METADATA, join, read_dcp
from polyak.files.reading.file import read_file
from polyak.files.reading.found import Found
from polyak.files.reading.inside import inside
from polyak.files.reading.raw import Box, RawFile, Stored

if TYPE_CHECKING:
    from pathlib import Path

__all__ = ["ADAPTER", "PIPELINE", "read_folder", "read_table"]

PIPELINE = "model_index.json"
ADAPTER = "adapter_config.json"
_STEMS = ("model", "pytorch_model", "diffusion_pytorch_model", "adapter_model", "consolidated")
_TYPES = (".safetensors", ".bin", ".pt", ".pth")
_NOT_WEIGHTS = (
    "optimizer", "scheduler", "rng_state", "scaler", "training_args", "trainer_state", "random_states", "sampler",
    "custom_checkpoint", "dl_state",
)  # fmt: skip
_LARGEST = 1 << 26  # bytes of an index
_SHOWN = 6
_SHARDING = "DCP_SHARDING_INFO"


def read_folder(folder: Path, key: str | None) -> Found:
    """Return the contents of a folder.

    Raises:
        ConfigError: If a file in it holds several candidates for the weights.
        StateError: If it holds no weights, a shard is missing, or an index points elsewhere.
        ValueError: If an index is damaged.
    """
    if (folder / METADATA).exists():
        return read_dcp(folder, key)
    if (folder / PIPELINE).is_file():
        return _pipeline(folder, key)
    if indices := _indices(folder):
        return _sharded(folder, indices[0], key)
    weights = _weights(folder)
    shards = [path for path in weights if path.suffix == ".safetensors"]
    if len(shards) > 1 and (found := _rank_sharded(shards)) is not None:
        return found
    chosen = _single(folder, weights)
    found = read_file(chosen, key)
    if others := [path.name for path in weights if path != chosen]:
        found.notes.append(f"{chosen.name!r} was read, and {listed(map(repr, others))} in the same folder was not")
    return _as_folder(found, {_output_stem(chosen.stem): [*found.tensors]})


def read_table(file: Path) -> dict[str, Any]:
    """Return the table in a JSON file; empty if there is none.

    Raises:
        ValueError: If it is damaged.
    """
    if not file.is_file():
        return {}
    raw = RawFile(file)
    try:
        if raw.size > _LARGEST:
            message = f"{file.name!r} has {raw.size} bytes, too many for a table"
            raise ValueError(message)
        found = json.loads(raw.read(raw.size, 0))
    finally:
        raw.close()
    if not isinstance(found, dict):
        message = f"{file.name!r} is no table"
        raise ValueError(message)  # noqa: TRY004 - a damaged file
    return found


def _as_folder(found: Found, files: dict[str, list[str]]) -> Found:
    found.format = f"folder of {found.format}"
    found.files = files
    return found


def _output_stem(stem: str) -> str:
    return "model" if stem in {"pytorch_model", "consolidated"} or stem not in _STEMS else stem


def _indices(folder: Path) -> list[Path]:
    usual = [folder / f"{stem}{kind}.index.json" for stem in _STEMS for kind in _TYPES]
    found = [path for path in usual if path.is_file()]
    return found or sorted(path for path in folder.glob("*.index.json") if path.is_file())


def _weights(folder: Path) -> list[Path]:
    files = sorted(path for path in folder.iterdir() if path.suffix in _TYPES and path.is_file())
    return [path for path in files if not path.name.startswith(_NOT_WEIGHTS)]


def _single(folder: Path, weights: list[Path]) -> Path:
    stems = ("adapter_model", *_STEMS) if (folder / ADAPTER).is_file() else _STEMS
    usual = [folder / f"{stem}{kind}" for stem in stems for kind in _TYPES]
    chosen = next((path for path in usual if path in weights), None)
    if chosen is not None or len(weights) == 1:
        return chosen or weights[0]
    if weights:
        names = shortened([path.name for path in weights], _SHOWN, ", ")
        ranks = any("rank" in path.name for path in weights)
        cure = "Gather the shards of all ranks first" if ranks else "Give the files themselves"
        message = f"{str(folder)!r} holds several files of weights and no index: {names}. {cure}"
        raise StateError(message)
    below = sorted(path.name for path in folder.iterdir() if path.is_dir() and _is_checkpoint(path))
    if below:
        names = shortened(below, _SHOWN, ", ")
        message = f"{str(folder)!r} holds checkpoints and is none itself: {names}. Give them: {folder}/*"
        raise StateError(message)
    message = (
        f"{str(folder)!r} holds no weights; expected model.safetensors, pytorch_model.bin, an index of shards, "
        f".metadata (torch.distributed.checkpoint) or {PIPELINE} (diffusers)"
    )
    raise MissingFileError(message)


def _is_checkpoint(folder: Path) -> bool:
    return (folder / METADATA).exists() or (folder / PIPELINE).exists() or bool(_indices(folder) or _weights(folder))


def _sharded(folder: Path, index: Path, key: str | None) -> Found:
    table = read_table(index).get("weight_map")
    if not isinstance(table, Mapping) or not table:
        message = f"{index.name!r} has no weight_map"
        raise ValueError(message)
    shards: dict[str, Found] = {}
    tensors: dict[str, Stored] = {}
    for name, file in table.items():
        path = inside(folder, file)
        if file not in shards:
            if not path.exists():
                message = f"the shard {shown(file)} that {index.name!r} names is missing in {str(folder)!r}; fetch it"
                raise MissingFileError(message)
            shards[file] = read_file(path, key)
        if name not in shards[file].tensors:
            message = f"the shard {shown(file)} lacks the tensor {shown(name)} that {index.name!r} names"
            raise ValueError(message)
        tensors[name] = shards[file].tensors[name]
    first = next(iter(shards.values()))
    notes = [note for found in shards.values() for note in found.notes]
    if unlisted := [name for found in shards.values() for name in found.tensors if name not in table]:
        notes.append(f"{index.name!r} does not name {shortened(unlisted, _SHOWN, ', ')}, which were skipped")
    found = Found(f"{len(shards)} shards of {first.format}", tensors, first.step, first.texts, notes)
    return _as_folder(found, {_output_stem(index.name.partition(".")[0]): [*tensors]})


def _rank_sharded(shards: list[Path]) -> Found | None:
    found = [read_file(path, None) for path in shards]
    tables = [json.loads(one.texts.get(_SHARDING, "null")) for one in found]
    if not all(isinstance(table, dict) for table in tables):
        return None
    boxes: dict[str, list[Box]] = {}
    dtypes = {}
    for one, table in zip(found, tables, strict=True):
        for name, stored in one.tensors.items():
            about = table.get(name)
            starts = about.get("saved_offsets") if isinstance(about, dict) else None
            if (
                not isinstance(starts, list)
                or len(starts) != len(stored.shape)
                or not all(type(n) is int and n >= 0 for n in starts)
            ):
                message = f"it does not say where the part of {shown(name)} belongs"
                raise ValueError(message)
            (part,) = stored.parts
            boxes.setdefault(name, []).append(
                Box(part.file, part.offset, tuple(starts), stored.shape, _steps(stored.shape))
            )
            dtypes[name] = stored.dtype
    tensors = {}
    for name, own in boxes.items():
        ends = [[start + size for start, size in zip(box.starts, box.shape, strict=True)] for box in own]
        tensors[name] = join(name, dtypes[name], tuple(map(max, zip(*ends, strict=True))), own)
    made = Found(f"{len(shards)} shards of ranks of safetensors", tensors)
    return _as_folder(made, {"model": [*tensors]})


def _steps(shape: tuple[int, ...]) -> tuple[int, ...]:
    steps, step = [], 1
    for size in reversed(shape):
        steps.append(step)
        step *= size
    return tuple(reversed(steps))


def _pipeline(folder: Path, key: str | None) -> Found:
    """Return all parts of a diffusers pipeline; the names of tensors begin with the part's, and a slash."""
    tensors: dict[str, Stored] = {}
    files: dict[str, list[str]] = {}
    notes: list[str] = []
    for name, about in read_table(folder / PIPELINE).items():
        part = folder / name
        if name.startswith("_") or not isinstance(about, list) or None in about[:1] or not part.is_dir():
            continue
        inside(folder, name)
        if not (_indices(part) or _weights(part)):
            continue  # a scheduler or a tokenizer
        found = read_folder(part, key)
        tensors |= {f"{name}/{own}": stored for own, stored in found.tensors.items()}
        files |= {f"{name}/{stem}": [f"{name}/{own}" for own in names] for stem, names in found.files.items()}
        notes += [f"{name}: {note}" for note in found.notes]
    if not tensors:
        message = f"{str(folder)!r} is a pipeline of diffusers, and none of its parts has weights here"
        raise MissingFileError(message)
    made = Found("diffusers pipeline", tensors, notes=notes)
    made.files = files
    return made
