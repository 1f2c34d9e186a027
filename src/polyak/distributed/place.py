"""Where a folder of averages goes: it takes the place of the one before in one step, and of nothing else."""

from __future__ import annotations

import shutil
from typing import TYPE_CHECKING

from polyak.distributed.translated import metadata

if TYPE_CHECKING:
    from pathlib import Path

__all__ = ["KEY", "Place"]

KEY = "averager"


class Place:
    """A folder, and what is beside it while it is written; one rank calls.

    Attributes:
        target: The folder.
        scratch: Where the new one is written.
    """

    def __init__(self, target: Path) -> None:
        self.target = target
        self.scratch, self._old = (target.with_name(f".{target.name}.{what}") for what in ("new", "old"))

    def prepare(self) -> None:
        """Make room for a new folder.

        Raises:
            FileExistsError: What is there is no folder of averages, or holds more.
        """
        self.recover()
        if others := self._others():
            message = (
                f"{str(self.target)!r} holds {others[0]!r}, which is no average and would be lost; give another folder"
            )
            raise FileExistsError(message)
        shutil.rmtree(self.scratch, ignore_errors=True)
        self.target.parent.mkdir(parents=True, exist_ok=True)

    def publish(self) -> None:
        """Give the new folder its name."""
        if self.target.exists():
            self.target.rename(self._old)
        self.scratch.rename(self.target)
        shutil.rmtree(self._old, ignore_errors=True)

    def recover(self) -> None:
        """Finish what was cut off between the two steps of ``publish``."""
        if self._old.exists() and not self.target.exists():
            self._old.rename(self.target)
        shutil.rmtree(self._old, ignore_errors=True)

    def _others(self) -> list[str]:
        """Return what is there beside averages."""
        if not self.target.exists():
            return []
        if not self.target.is_dir():
            return [self.target.name]
        files = sorted(path.name for path in self.target.iterdir())
        found, _ = metadata(self.target)
        paths = {} if found is None else found.planner_data or {}
        return [name for name in files if name != ".metadata" and not name.endswith(".distcp")] + sorted(
            {str(path[0]) for path in paths.values()} - {KEY}
        )
