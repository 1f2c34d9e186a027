"""The folder of snapshots, and the names of the files in it."""

from __future__ import annotations

import re
import shutil
from typing import TYPE_CHECKING
from urllib.parse import quote

from polyak.errors import ConfigError
from polyak.io.atomic import remove_stale

if TYPE_CHECKING:
    from pathlib import Path

__all__ = ["file_name", "files_of", "make_folder"]

_DIGITS = 12
_UNFINISHED = ".unfinished"  # where earlier versions left halves


def file_name(average: str, step: int, suffix: str = "") -> str:
    """Return the name of a snapshot.

    Args:
        average: The name of its average.
        step: The optimiser step of its last update.
        suffix: What distinguishes it from another snapshot of the average at this step.
    """
    return f"{_quoted(average)}{suffix}-{step:0{_DIGITS}d}.safetensors"


def files_of(directory: Path, average: str) -> list[Path]:
    """Return the snapshots of an average in a folder, in the order of their steps."""
    pattern = re.compile(rf"{re.escape(_quoted(average))}-(\d{{{_DIGITS},}})")
    steps = {path: int(found[1]) for path in directory.glob("*.safetensors") if (found := pattern.fullmatch(path.stem))}
    return sorted(steps, key=steps.__getitem__)


def _quoted(average: str) -> str:
    return quote(average, safe="").replace(".", "%2E")  # a name that begins with a dot is hidden


def make_folder(directory: Path) -> None:
    """Make a folder for snapshots where it is missing.

    Raises:
        ConfigError: If the folder cannot be made.
    """
    try:
        directory.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        message = f"the folder {str(directory)!r} cannot be made ({error}); give another one"
        raise ConfigError(message) from error
    remove_stale(directory)
    shutil.rmtree(directory / _UNFINISHED, ignore_errors=True)
