"""The files that an average or a merge begins with: opened together, and refused where they cannot belong together."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from polyak.errors import ArgumentError, ConfigError
from polyak.errors.formatting import shown
from polyak.files.checkpoint import Checkpoint, open_checkpoint
from polyak.files.kinds import quantised

if TYPE_CHECKING:
    from pathlib import Path

__all__ = ["check_enough", "opened"]

_MOST = 10_000


@contextmanager
def opened(files: object, key: str | None) -> Iterator[list[Checkpoint]]:
    """Open all files, and close them afterwards.

    Args:
        files: Paths, or checkpoints that are open.
        key: The path of keys to the weights in a dictionary. Defaults to the one that is usual.

    Raises:
        ArgumentError: If they are no paths.
        ConfigError: If one is given twice.
        StateError: If one cannot be read, or holds quantised weights.
    """
    if isinstance(files, (str, bytes, os.PathLike)) or not isinstance(files, Iterable):
        message = f"files: got {shown(files)}; expected a list of paths"
        raise ArgumentError(message)
    checkpoints: list[Checkpoint] = []
    try:
        for path in files:
            if len(checkpoints) == _MOST:
                message = f"files: got more than {_MOST}"
                raise ConfigError(message)
            checkpoints.append(path if isinstance(path, Checkpoint) else open_checkpoint(path, key))
        _refuse_twice(checkpoints)
        for checkpoint in checkpoints:
            refuse_quantised(checkpoint)
        yield checkpoints
    finally:
        for checkpoint in checkpoints:
            checkpoint.close()


def check_enough(checkpoints: list[Checkpoint], least: int = 2) -> None:
    """Refuse fewer files than an average needs.

    Raises:
        ConfigError: If there are fewer.
    """
    if len(checkpoints) < least:
        names = "".join(f" ({one.path.name})" for one in checkpoints)
        message = (
            f"got {len(checkpoints)} file{'s' * (len(checkpoints) != 1)}{names}; expected at least {least} checkpoints"
        )
        raise ConfigError(message)


def refuse_quantised(checkpoint: Checkpoint) -> None:
    """Refuse codes, of which an average is none.

    Raises:
        ConfigError: If the file holds them.
    """
    if reason := quantised(checkpoint.tensors, checkpoint.config):
        message = (
            f"{str(checkpoint.path)!r} is quantised: {reason}. The mean of codes is no code of the mean; dequantise "
            "it, or give the files that it was converted from"
        )
        raise ConfigError(message)


def _refuse_twice(checkpoints: list[Checkpoint]) -> None:
    seen: dict[tuple[int, int], Path] = {}
    for checkpoint in checkpoints:
        about = checkpoint.path.stat()
        identity = about.st_dev, about.st_ino
        if identity in seen:
            message = f"{str(checkpoint.path)!r} is given twice (as {str(seen[identity])!r}, too); give each file once"
            raise ConfigError(message)
        seen[identity] = checkpoint.path
