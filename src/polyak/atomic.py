"""Files that are whole or absent."""

from __future__ import annotations

import os
from contextlib import suppress
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

__all__ = ["write_whole"]


def write_whole(file: Path, write: Callable[[Path], object], *, folder: str = "") -> None:
    """Let ``write`` fill a scratch file beside ``file``, then rename it; after an exception nothing is left.

    Args:
        file: The file.
        write: Fills the file it is given.
        folder: A folder beside it for the scratch file, where a process that dies may leave something.
    """
    scratch = file.parent / folder / f".{file.name}.{os.getpid()}.tmp"
    try:
        if folder:
            scratch.parent.mkdir(exist_ok=True)
        scratch.touch()
        mode = scratch.stat().st_mode
        write(scratch)
        scratch.chmod(mode)  # some writers make files that nobody else may read
        with scratch.open("rb+") as written:
            os.fsync(written.fileno())  # else a crash of the machine may leave the new name on an empty file
        scratch.replace(file)
    except BaseException:
        scratch.unlink(missing_ok=True)
        raise
    finally:
        if folder:
            with suppress(OSError):  # another process writes there
                scratch.parent.rmdir()
