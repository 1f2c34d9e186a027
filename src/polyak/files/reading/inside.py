"""Names of files in an index: they stay inside its folder."""

from __future__ import annotations

from pathlib import Path, PurePosixPath, PureWindowsPath

from polyak.errors import StateError
from polyak.errors.formatting import shown

__all__ = ["inside", "relative"]


def inside(folder: Path, name: object) -> Path:
    """Return the path of a file that an index names.

    Args:
        folder: The folder of the index.
        name: What the index says.

    Raises:
        StateError: If the name leads out of the folder.
    """
    text = name if isinstance(name, str) else ""
    parts = PurePosixPath(text).parts
    if (
        not text
        or "\0" in text
        or "\\" in text
        or ".." in parts
        or PurePosixPath(text).is_absolute()
        or PureWindowsPath(text).drive
    ):
        message = f"the index in {str(folder)!r} names the file {shown(name)}; expected one in the same folder"
        raise StateError(message)
    return Path(folder, *parts)


def relative(file: Path, root: Path) -> str:
    """Return the name of a file in a folder, or its own name if the folder is the file itself."""
    return file.relative_to(root).as_posix() if file != root and file.is_relative_to(root) else file.name
