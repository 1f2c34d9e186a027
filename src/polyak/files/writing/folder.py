"""A folder as Hugging Face, diffusers and PEFT load it: weights in shards, and the other files of an input."""

from __future__ import annotations

import json
import math
import shutil
from typing import TYPE_CHECKING, Any

from polyak.files.writing.safetensors import SafetensorsOutput

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence
    from pathlib import Path

    import torch

    from polyak.files.checkpoint import Checkpoint

__all__ = ["FolderOutput"]

_KEPT = (
    ".json", ".jsonl", ".py", ".txt", ".md", ".model", ".jinja", ".tiktoken", ".vocab", ".spm", ".bpe", ".yaml", ".yml",
)  # fmt: skip
_NEVER = {"trainer_state.json", "zero_to_fp32.py", "latest"}
_NAMES = {"LICENSE", "NOTICE", "USE_POLICY"}
_DEEPEST = 3


class FolderOutput:
    """A folder with room for its tensors.

    Args:
        folder: The folder, which is empty.
        tensors: Name, dtype and shape of each tensor.
        texts: Metadata as long as those that ``finish`` gets; every file has them.
        model: The input whose other files are copied, and whose weights are named alike.
        shard_size: The largest file, in bytes.
        edits: Changes of its tables: file, key and value; of files that it has.
    """

    ordered = False

    def __init__(
        self,
        folder: Path,
        tensors: Sequence[tuple[str, torch.dtype, tuple[int, ...]]],
        texts: Mapping[str, str],
        model: Checkpoint,
        shard_size: int,
        edits: Mapping[str, Mapping[str, Any]],
    ) -> None:
        self._outputs: list[SafetensorsOutput] = []
        self._of: dict[str, tuple[SafetensorsOutput, str]] = {}
        self._indices: dict[Path, dict[str, Any]] = {}
        if model.path.is_dir():
            _copy_others(model.path, folder, {file.path.name for file in model.raw_files()})
        for name, changes in edits.items():
            _edit(folder / name, changes)
        abouts = {name: (dtype, shape) for name, dtype, shape in tensors}
        files = {stem: [name for name in names if name in abouts] for stem, names in model.files.items()}
        placed = {name for names in files.values() for name in names}
        if rest := [name for name in abouts if name not in placed]:
            files.setdefault(next(iter(files), "model"), []).extend(rest)
        for stem, names in files.items():
            self._add(folder, stem, {name: abouts[name] for name in names}, texts, shard_size)

    def write(self, name: str, offset: int, data: memoryview) -> None:
        """Write bytes of a tensor."""
        output, own = self._of[name]
        output.write(own, offset, data)

    def finish(self, texts: Mapping[str, str]) -> None:
        """Write the headers and the indices; the metadata are as long as those that room was made for."""
        for output in self._outputs:
            output.finish(texts)
        for path, index in self._indices.items():
            path.write_text(
                json.dumps({**index, "metadata": {**index["metadata"], **texts}}, indent=2), encoding="utf-8"
            )

    def close(self) -> None:
        """Close all files; idempotent."""
        for output in self._outputs:
            output.close()

    def _add(
        self,
        folder: Path,
        stem: str,
        abouts: Mapping[str, tuple[torch.dtype, tuple[int, ...]]],
        texts: Mapping[str, str],
        shard_size: int,
    ) -> None:
        part, _, file = stem.rpartition("/")
        (folder / part).mkdir(parents=True, exist_ok=True)
        shards = [*_shards(abouts, shard_size)]
        table: dict[str, str] = {}
        total = 0
        for number, names in enumerate(shards, 1):
            own = {name: name.removeprefix(f"{part}/") if part else name for name in names}
            label = (
                f"{file}.safetensors" if len(shards) == 1 else f"{file}-{number:05d}-of-{len(shards):05d}.safetensors"
            )
            output = SafetensorsOutput(folder / part / label, [(own[name], *abouts[name]) for name in names], texts)
            self._outputs.append(output)
            self._of |= {name: (output, own[name]) for name in names}
            table |= {own[name]: label for name in names}
            total += sum(_size(*abouts[name]) for name in names)
        if len(shards) > 1:
            index = {"metadata": {"total_size": total}, "weight_map": table}
            self._indices[folder / part / f"{file}.safetensors.index.json"] = index


def _edit(file: Path, changes: Mapping[str, Any]) -> None:
    if file.is_file():
        table = {**json.loads(file.read_text(encoding="utf-8")), **changes}
        file.write_text(json.dumps(table, indent=2) + "\n", encoding="utf-8")


def _shards(abouts: Mapping[str, tuple[torch.dtype, tuple[int, ...]]], most: int) -> Iterator[list[str]]:
    names: list[str] = []
    size = 0
    for name, about in abouts.items():
        if names and size + _size(*about) > most:
            yield names
            names, size = [], 0
        names.append(name)
        size += _size(*about)
    if names:
        yield names


def _size(dtype: torch.dtype, shape: tuple[int, ...]) -> int:
    return math.prod(shape) * dtype.itemsize


def _copy_others(source: Path, target: Path, weights: set[str], depth: int = 0) -> None:
    """Copy configs, tokenizers, code and texts; never weights, nor what only a resume needs."""
    for path in sorted(source.iterdir()):
        if path.name in _NEVER or path.name in weights or path.name.startswith("."):
            continue
        if path.is_dir() and depth < _DEEPEST and not _is_of_a_run(path):
            _copy_others(path, target / path.name, weights, depth + 1)
        elif path.is_file() and (path.suffix in _KEPT or path.stem in _NAMES) and not path.name.endswith(".index.json"):
            target.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, target / path.name)


def _is_of_a_run(folder: Path) -> bool:
    return folder.name.startswith(("checkpoint-", "global_step", "runs", "__pycache__"))
