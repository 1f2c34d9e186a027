"""A checkpoint that is open: what it holds, read in pieces."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Self

from polyak.errors import ArgumentError, ConfigError, MissingFileError, StateError
from polyak.errors.formatting import shown
from polyak.files.names import near, number_in, step_around, without_wrappers
from polyak.files.reading.file import read_file
from polyak.files.reading.folder import read_folder, read_table
from polyak.files.reading.own import of_averager, of_snapshot
from polyak.files.reading.values import read_values
from polyak.io.atomic import as_path

if TYPE_CHECKING:
    import os
    from collections.abc import Mapping
    from pathlib import Path

    import torch
    from torch import Tensor

    from polyak.files.reading.found import Found
    from polyak.files.reading.raw import RawFile, Stored

__all__ = ["PROVENANCE", "Checkpoint", "open_checkpoint"]

PROVENANCE = ("polyak_average", "polyak_merge", "polyak_soup")
"""Keys of the metadata under which polyak says how a file was made."""


@dataclass(frozen=True)
class Checkpoint:
    """Weights in a file or folder, of which only the headers were read.

    Attributes:
        path: The file or folder.
        format: Its format in words.
        step: The training step that it is of, or None if nothing says it.
        tied: Groups of names that share one tensor.
        notes: What a user should know: parts that were skipped, other weights in the file.
        key: The key in a dictionary in which the weights were found, with dots between.
        metadata: The texts in the file.
        config: The table in ``config.json`` or ``adapter_config.json``.
    """

    path: Path
    format: str
    step: int | None
    tied: tuple[tuple[str, ...], ...]
    notes: tuple[str, ...]
    key: str
    metadata: Mapping[str, str]
    config: Mapping[str, Any]
    tensors: Mapping[str, Stored] = field(repr=False)
    files: Mapping[str, list[str]] = field(repr=False)

    @property
    def names(self) -> list[str]:
        """The names of its tensors, those of wrappers taken away."""
        return [*self.tensors]

    def dtype(self, name: str) -> torch.dtype:
        """Return the dtype of a tensor, which is not read."""
        return self._stored(name).dtype

    def shape(self, name: str) -> tuple[int, ...]:
        """Return the shape of a tensor, which is not read."""
        return self._stored(name).shape

    def read(self, name: str, begin: int | None = None, end: int | None = None) -> Tensor:
        """Return a tensor, or some values of the flat tensor.

        Args:
            name: Its name.
            begin: The index of the first value. Defaults to the first of all.
            end: The index behind the last value. Defaults to all.

        Raises:
            ConfigError: If there is no such tensor, or the range is not inside it.
            StateError: If the file has changed or cannot be read.
        """
        stored = self._stored(name)
        values = read_values(stored, begin or 0, math.prod(stored.shape) if end is None else end)
        return values.reshape(stored.shape) if begin is None and end is None else values

    @property
    def made(self) -> tuple[str, Mapping[str, Any]] | None:
        """How polyak made it: the key in its metadata and the table there; None if polyak did not."""
        for name in PROVENANCE:
            if name in self.metadata:
                try:
                    table = json.loads(self.metadata[name])
                except (ValueError, RecursionError):
                    return None
                return (name, table) if isinstance(table, dict) else None
        return None

    def raw_files(self) -> list[RawFile]:
        """Return the files that its tensors lie in."""
        return [*{id(file): file for stored in self.tensors.values() for file in stored.files}.values()]

    def close(self) -> None:
        """Close its files; idempotent."""
        for file in self.raw_files():
            file.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _stored(self, name: str) -> Stored:
        if name not in self.tensors:
            similar = near(name, self.tensors) if isinstance(name, str) else ""
            hint = f" Did you mean {similar!r}?" if similar else ""
            message = f"{str(self.path)!r} has no tensor {shown(name)}.{hint}"
            raise ConfigError(message)
        return self.tensors[name]


def open_checkpoint(path: str | os.PathLike[str], key: str | None = None) -> Checkpoint:
    """Open a checkpoint of any known format, of which only the headers are read.

    Pickles are interpreted by a machine that knows tensors and plain containers; none is executed.

    Args:
        path: A ``.safetensors`` file, a file of ``torch.save``, or a folder of Hugging Face, diffusers, PEFT or
            ``torch.distributed.checkpoint``.
        key: The path of keys to the weights in a dictionary, with dots between, such as ``"ema"``. Defaults to the one
            that is usual.

    Raises:
        MissingFileError: If there is no such file, or a shard of it is missing.
        StateError: If it is damaged, malicious or no checkpoint.
        ConfigError: If it holds several candidates for the weights, or none under ``key``.

    Examples:
        >>> import tempfile, torch
        >>> from polyak import files
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     torch.save({"model": {"w": torch.ones(2)}, "step": 7}, f"{folder}/last.pt")
        ...     with files.open(f"{folder}/last.pt") as checkpoint:
        ...         print(checkpoint.names, checkpoint.step, checkpoint.read("w"))
        ['w'] 7 tensor([1., 1.])
    """
    where = as_path(path, "a checkpoint")
    if not (key is None or (isinstance(key, str) and key)):
        message = f"key: got {shown(key)}; expected names with dots between, such as 'ema' or 'state.model'"
        raise ArgumentError(message)
    try:
        exists = where.exists()
    except (OSError, ValueError):  # a name that is too long, or holds a null byte
        exists = False
    if not exists:
        hint = "; a pattern is expanded by a shell, or by glob.glob" if set(str(where)) & set("*?[") else ""
        message = f"there is no file or folder {shown(str(where))}{hint}"
        raise MissingFileError(message)
    if not where.is_dir():
        return _opened(where, _own(read_file(where, key), where))
    try:
        return _opened(where, read_folder(where, key))
    except (StateError, ConfigError):
        raise
    except OSError as error:
        message = f"{str(where)!r} cannot be read: {error.strerror or error}"
        raise StateError(message) from error
    except (ValueError, RecursionError, OverflowError, MemoryError, TypeError, KeyError) as error:
        reason = str(error) if type(error) is ValueError else f"{type(error).__name__}: {error}"
        message = f"{str(where)!r} is damaged or no checkpoint: {reason}"
        raise StateError(message) from error


def _own(found: Found, where: Path) -> Found:
    if found.format != "safetensors" or not {"polyak", "polyak_snapshot"} & found.texts.keys():
        return found
    try:
        return of_averager(found) if "polyak" in found.texts else of_snapshot(found, where)
    except (ValueError, RecursionError, AttributeError, TypeError) as error:
        if isinstance(error, StateError):
            raise
        message = f"{str(where)!r} is damaged: {error}"
        raise StateError(message) from error


def _opened(where: Path, found: Found) -> Checkpoint:
    if not found.tensors:
        message = f"{str(where)!r} holds no tensors"
        raise StateError(message)
    empty = [name for name, stored in found.tensors.items() if 0 in stored.shape]
    if 2 * len(empty) > len(found.tensors):
        message = (
            f"{str(where)!r} holds tensors without values, such as {shown(empty[0])}, as a rank of DeepSpeed's ZeRO "
            "stage 3 saves them; gather the weights first, by zero_to_fp32.py in the folder of the checkpoint"
        )
        raise StateError(message)
    tensors = without_wrappers(found.tensors) if not found.files else dict(found.tensors)
    groups: dict[object, list[str]] = {}
    for name, stored in tensors.items():
        if math.prod(stored.shape):
            groups.setdefault(stored.place, []).append(name)
    tied = tuple(tuple(names) for names in groups.values() if len(names) > 1)
    state = read_table(where / "trainer_state.json") if where.is_dir() else {}
    steps = (state.get("global_step"), found.step, number_in(where.name), step_around(where))
    step = next((one for one in steps if type(one) is int), None)
    config = (read_table(where / "adapter_config.json") or read_table(where / "config.json")) if where.is_dir() else {}
    texts = dict(found.texts)
    if "polyak" in texts and "torch" in found.format:
        texts = {str(name): str(text) for name, text in json.loads(texts["polyak"]).items()}
    return Checkpoint(
        where, found.format, step, tied, tuple(found.notes), found.key, texts, config, tensors, dict(found.files)
    )
