"""Where a result goes: one file or a folder, whole or absent, and never over an input."""

from __future__ import annotations

import os
from contextlib import contextmanager, suppress
from difflib import get_close_matches
from typing import TYPE_CHECKING, Any, Protocol

from polyak.errors import ConfigError, PolyakError, WriteError
from polyak.files.writing.folder import FolderOutput
from polyak.files.writing.safetensors import SafetensorsOutput, check_codes
from polyak.files.writing.torch_file import TorchOutput
from polyak.io.atomic import check_target, scratch_folder, write_whole

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence
    from pathlib import Path

    import torch

    from polyak.files.checkpoint import Checkpoint

__all__ = ["TYPES", "Target", "check_spared", "is_file", "write_result"]

_SIMILAR = 0.8  # of the letters
TYPES = (".safetensors", ".pt", ".pth", ".bin", ".ckpt")


class Target(Protocol):
    """An output with metadata that come last."""

    ordered: bool

    def write(self, name: str, offset: int, data: memoryview) -> None:
        """Write bytes of a tensor."""

    def finish(self, texts: Mapping[str, str]) -> None:
        """Write the metadata."""

    def close(self) -> None:
        """Close all files."""


def is_file(out: Path) -> bool:
    """Return whether a path names a file of weights, by its type."""
    return out.suffix.lower() in TYPES


def check_spared(out: Path, checkpoints: Sequence[Checkpoint]) -> None:
    """Refuse an output that is an input or lies in one, and a place that nothing can be written to.

    Raises:
        ConfigError: If it is.
        WriteError: If the folder around it does not exist, or something else has its name.
    """
    known = None
    with suppress(OSError):
        known = out.stat()
    resolved = out.resolve()
    for checkpoint in checkpoints:
        path = checkpoint.path.resolve()
        same = resolved == path or (checkpoint.path.is_dir() and path in resolved.parents)
        if (
            same
            or path.is_relative_to(resolved)
            or (known and any(file.is_same(known) for file in checkpoint.raw_files()))
        ):
            message = (
                f"the output {str(out)!r} is the input {str(checkpoint.path)!r}, or would change it; give another path"
            )
            raise ConfigError(message)
    folders = any(checkpoint.path.is_dir() for checkpoint in checkpoints)
    if not is_file(out) and not folders:
        message = f"the output {str(out)!r} has the type {out.suffix or '(none)'!r}; expected one of {', '.join(TYPES)}"
        raise ConfigError(message)
    if similar := [] if is_file(out) else get_close_matches(out.suffix.lower(), TYPES, 1, _SIMILAR):
        message = f"the output {str(out)!r} has the type {out.suffix!r}; did you mean {similar[0]!r}?"
        raise ConfigError(message)
    if is_file(out):
        check_target(out)
        return
    if not out.absolute().parent.is_dir():
        message = f"the folder {str(out)!r} cannot be written: there is no folder {str(out.parent)!r}; make it first"
        raise WriteError(message)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        message = f"the folder {str(out)!r} is there already; give another path, or remove it"
        raise ConfigError(message)


def write_result(
    out: Path,
    tensors: Sequence[tuple[str, torch.dtype, tuple[int, ...]]],
    tied: Mapping[str, str],
    model: Checkpoint,
    shard_size: int,
    fill: Callable[[Target], Mapping[str, str]],
    texts: Mapping[str, str],
    edits: Mapping[str, Mapping[str, Any]],
) -> None:
    """Write a result, whole or not at all.

    Args:
        out: The file or folder.
        tensors: Name, dtype and shape of each tensor.
        tied: Names that share the memory of another: each name, and that other one.
        model: The input that a folder takes its other files from.
        shard_size: The largest file of a folder, in bytes.
        fill: Writes all tensors and returns the final metadata.
        texts: Metadata of the same length.
        edits: Changes of tables in a folder: file, key and value.

    Raises:
        WriteError: If it cannot be written, as on a full disk.
    """

    def filled(target: Target) -> None:
        try:
            target.finish(fill(target))
        finally:
            target.close()

    if out.suffix.lower() == ".safetensors":
        check_codes(tensors)
        write_whole(out, lambda scratch: filled(SafetensorsOutput(scratch, tensors, texts)))
    elif is_file(out):
        write_whole(out, lambda scratch: filled(TorchOutput(scratch, tensors, tied, texts)))
    else:
        check_codes(tensors)
        with _new_folder(out) as scratch:
            filled(FolderOutput(scratch, tensors, texts, model, shard_size, edits))


@contextmanager
def _new_folder(out: Path) -> Iterator[Path]:
    try:
        with scratch_folder(out.absolute().parent) as scratch:
            made = scratch / out.name
            made.mkdir()
            yield made
            for path in made.rglob("*"):
                if path.is_file():
                    with path.open("rb+") as written:
                        os.fsync(written.fileno())
            made.replace(out)
    except PolyakError:
        raise
    except OSError as error:
        message = (
            f"the folder {str(out)!r} cannot be written: {error.strerror or error}. Make room, or give another path."
        )
        problem = WriteError(message)
        problem.errno = error.errno
        raise problem from error
