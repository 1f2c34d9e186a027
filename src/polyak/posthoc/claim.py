"""Who records into a folder: one recorder at a time."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING
from uuid import uuid4
from weakref import finalize

from polyak.errors import SnapshotError, StateError
from polyak.io.atomic import lock_for_process

if TYPE_CHECKING:
    from pathlib import Path

__all__ = ["Claim"]

_NAME = "recorder.lock"


class Claim:
    """A file in the folder that names its recorder, locked against other processes as long as that one lives.

    The lock ends with its process, however that ends. Where it does not hold (another recorder of this process, a disk
    without locks) the name decides: the last recorder to begin has the folder, and the earlier one is refused at its
    next snapshot.

    Args:
        folder: The folder.
    """

    def __init__(self, folder: Path) -> None:
        self._path, self._name = folder / _NAME, uuid4().hex.encode()
        self._held: finalize[[int], Claim] | None = None
        self._opened, self._process = -1, os.getpid()

    def take(self) -> None:
        """Take the folder; idempotent.

        Raises:
            StateError: If another process has it.
            SnapshotError: If it cannot be written to.
        """
        if self._held is not None:
            return
        try:
            opened = os.open(self._path, os.O_RDWR | os.O_CREAT, 0o666)
        except OSError as error:
            message = f"the folder {str(self._path.parent)!r} cannot be written to: {error.strerror}. Give another one."
            raise SnapshotError(message) from error
        if not lock_for_process(opened):
            os.close(opened)
            message = (
                f"another process records into {str(self._path.parent)!r}; wait for its end, or give this run a folder "
                "of its own"
            )
            raise StateError(message)
        self._held = finalize(self, os.close, opened)
        self._opened, self._process = opened, os.getpid()
        os.truncate(opened, 0)
        os.write(opened, self._name)

    def check(self) -> None:
        """Refuse to go on if another recorder has taken the folder since, or in a forked process.

        Raises:
            StateError: If one has, or this process is a fork of the one that records.
        """
        if self._held is not None and self._process != os.getpid():
            message = (
                f"this process was forked from the one that records into {str(self._path.parent)!r}, and both would "
                "overwrite each other; close the recorder here, or build another one with a folder of its own"
            )
            raise StateError(message)
        if self._held is not None and not self._is_ours():
            message = (
                f"another recorder has begun to record into {str(self._path.parent)!r}, and this one stops before they "
                "overwrite each other; give each run a folder of its own"
            )
            raise StateError(message)

    def release(self) -> None:
        """Let others have the folder; idempotent."""
        if self._held is not None:
            if self._process == os.getpid() and self._is_ours():
                os.truncate(self._opened, 0)
            self._held()
            self._held = None

    def _is_ours(self) -> bool:
        # To open the file again and close it would end the lock.
        os.lseek(self._opened, 0, os.SEEK_SET)
        return os.read(self._opened, len(self._name)) == self._name
