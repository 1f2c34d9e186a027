"""The snapshots of one run, in a folder."""

from __future__ import annotations

from typing import TYPE_CHECKING

from polyak.errors import MissingFileError, StateError
from polyak.io.atomic import as_path
from polyak.posthoc.snapshot import Snapshot
from polyak.strategy.numbers import given_integer

if TYPE_CHECKING:
    import os
    from pathlib import Path

__all__ = ["Store"]


class Store:
    """The snapshots of one run, in the order of their steps; what else lies in the folder is left alone.

    Attributes:
        directory: The folder.
        snapshots: The snapshots.

    Raises:
        MissingFileError: If there is no such folder.
        StateError: If a snapshot in it is damaged, or they are of different models.

    Examples:
        >>> Store("no-such-folder")
        Traceback (most recent call last):
        polyak.errors.MissingFileError: there is no folder 'no-such-folder'; expected what polyak.posthoc.Recorder wrote
    """

    def __init__(self, directory: str | os.PathLike[str]) -> None:
        self.directory = as_path(directory, "the folder of snapshots")
        if not self.directory.is_dir():
            message = f"there is no folder {str(directory)!r}; expected what polyak.posthoc.Recorder wrote"
            raise MissingFileError(message)
        # What begins with a dot is a file that is being written, or was when its process died.
        paths = sorted(path for path in self.directory.glob("*.safetensors") if not path.name.startswith("."))
        found = [snapshot for path in paths if (snapshot := _read(path)) is not None]
        self.snapshots = sorted(found, key=lambda snapshot: (snapshot.step, not snapshot.is_start, snapshot.average))
        for one in self.snapshots[1:]:
            if difference := one.difference(self.snapshots[0]):
                message = (
                    f"{one.path.name!r} and {self.snapshots[0].path.name!r} are of different models: {difference}. "
                    "Take them apart."
                )
                raise StateError(message)
        if len({snapshot.about.run for snapshot in self.snapshots}) > 1:
            message = f"{str(directory)!r} holds the snapshots of two runs, and no average of both means anything"
            msg = f"{message}; give each run a folder of its own"
            raise StateError(msg)

    def until(self, step: int | None) -> tuple[list[Snapshot], int]:
        """Return the snapshots up to an optimiser step, and that step. Defaults to the last one's.

        Raises:
            ConfigError: If ``step`` is not a count of steps.
            StateError: If there is no snapshot.
        """
        step = None if step is None else given_integer("at_step", step, 0)
        chosen = [snapshot for snapshot in self.snapshots if step is None or snapshot.step <= step]
        if all(snapshot.is_start for snapshot in chosen):
            which = "are no snapshots" if not self.snapshots else f"is no snapshot up to step {step}"
            first = next((f"; the first is of step {s.step}" for s in self.snapshots if not s.is_start), "")
            message = f"there {which} in {str(self.directory)!r}{first}; record some with polyak.posthoc.Recorder"
            raise StateError(message)
        last = self.snapshots[-1].step
        if step is not None and step > 2 * last - max((s.step for s in self.snapshots if s.step < last), default=0):
            message = f"at_step={step} is beyond the last snapshot, of step {last}; give that step or an earlier one"
            raise StateError(message)
        return chosen, chosen[-1].step if step is None else step


def _read(path: Path) -> Snapshot | None:
    try:
        return Snapshot.read(path)
    except MissingFileError:  # its recorder removed it since the folder was listed
        return None
