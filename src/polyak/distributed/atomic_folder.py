"""Where a folder of averages goes: it takes the place of the one before in one step, and of nothing else."""

from __future__ import annotations

import shutil
from typing import TYPE_CHECKING

from polyak.distributed.dcp_errors import metadata
from polyak.io.atomic import exclusive, scratch_folder

if TYPE_CHECKING:
    from contextlib import ExitStack
    from pathlib import Path

__all__ = ["KEY", "AtomicFolder"]

KEY = "averager"


class AtomicFolder:
    """A folder that is replaced in one step; one rank calls.

    Attributes:
        target: The folder.
    """

    def __init__(self, target: Path) -> None:
        self.target = target
        self._old, self._earlier = (target.with_name(f".{target.name}.{what}") for what in ("old", "new"))

    def prepare(self, held: ExitStack) -> Path:
        """Return where a new folder is to be written.

        Args:
            held: Keeps the place until it is closed; what is still there then is removed.

        Raises:
            FileExistsError: If something else than a folder of averages is there, or it holds more.
        """
        self.recover()
        if others := self._others():
            message = (
                f"{str(self.target)!r} holds {others[0]!r}, which is no average and would be lost; give another folder"
            )
            raise FileExistsError(message)
        shutil.rmtree(self._earlier, ignore_errors=True)  # where earlier versions left halves
        self.target.parent.mkdir(parents=True, exist_ok=True)
        return held.enter_context(scratch_folder(self.target.parent)) / self.target.name

    def publish(self, scratch: Path) -> None:
        """Give a new folder its name; of several writers the last one wins."""
        with exclusive(self.target.parent):
            self._recover()
            if self.target.exists():
                self.target.rename(self._old)
            scratch.rename(self.target)
            shutil.rmtree(self._old, ignore_errors=True)

    def recover(self) -> None:
        """Finish what was cut off between the two steps of ``publish``."""
        if self._old.exists():
            with exclusive(self.target.parent):
                self._recover()

    def _recover(self) -> None:
        if self._old.exists() and not self.target.exists():
            self._old.rename(self.target)
        shutil.rmtree(self._old, ignore_errors=True)

    def _others(self) -> list[str]:
        """Return the other contents of the folder."""
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
