"""Start one process for each rank, and gather what they found."""

from __future__ import annotations

import subprocess
import sys
import time
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING

from pydantic import BaseModel

from polyak.bench.report import Quantiles
from polyak.bench.settings import Settings
from polyak.errors import DistributedError

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

__all__ = ["Average", "Found", "Paths", "Task", "launched"]

_PAUSE = 0.05  # seconds


class Task(BaseModel):
    """What all ranks measure together; ``threads`` is the count of each."""

    model: str
    ranks: int
    threads: int
    settings: Settings


class Average(BaseModel):
    """One average on one rank.

    Attributes:
        milliseconds: The time of an update.
        disturbed: The share of the samples in which threads had to wait for a processor.
        held: Bytes that the rank keeps of it.
        whole: Bytes of all of it.
    """

    milliseconds: Quantiles
    disturbed: float
    held: int
    whole: int


class Found(BaseModel):
    """What one rank found: the bytes of its part of the weights, and its averages by name; or why it failed."""

    weights: int = 0
    averages: dict[str, Average] = {}
    error: str = ""


class Paths:
    """Where the ranks find their task and one another, and leave what they found."""

    def __init__(self, folder: Path) -> None:
        self.task, self.meeting = folder / "task.json", folder / "meeting"
        self._folder = folder

    def found(self, rank: int) -> Path:
        """Return the file that a rank writes."""
        return self._folder / f"found-{rank}.json"

    def said(self, rank: int) -> Path:
        """Return the file of what a rank says on standard error."""
        return self._folder / f"said-{rank}.txt"


def launched(task: Task) -> list[Found]:
    """Return the result of each rank.

    Raises:
        DistributedError: If a process failed. The others are ended.
    """
    with TemporaryDirectory() as folder:
        paths = Paths(Path(folder))
        paths.task.write_text(task.model_dump_json(), encoding="utf-8")
        with _processes(task, folder, paths) as processes:
            while any(process.poll() is None for process in processes) and not _failed(processes):
                time.sleep(_PAUSE)
            if failed := _failed(processes):
                raise DistributedError(_reason(failed, task, processes, paths))
        return [Found.model_validate_json(paths.found(rank).read_bytes()) for rank in range(task.ranks)]


@contextmanager
def _processes(task: Task, folder: str, paths: Paths) -> Iterator[list[subprocess.Popen[bytes]]]:
    started: list[subprocess.Popen[bytes]] = []
    try:
        for rank in range(task.ranks):
            command = [sys.executable, "-m", "polyak.bench.rank", folder, str(rank)]
            with paths.said(rank).open("wb") as said:
                started.append(subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=said, stderr=said))  # noqa: S603 - our own module
        yield started
    finally:
        for process in started:
            process.kill()
            process.wait()


def _failed(processes: Sequence[subprocess.Popen[bytes]]) -> list[int]:
    return [rank for rank, process in enumerate(processes) if process.poll()]


def _reason(failed: Sequence[int], task: Task, processes: Sequence[subprocess.Popen[bytes]], paths: Paths) -> str:
    # The others fail when they miss the first: the one that wrote first is the cause.
    rank = min(failed, key=lambda rank: max(paths.found(rank), paths.said(rank), key=_written).stat().st_mtime_ns)
    found = paths.found(rank)
    said = paths.said(rank).read_text(encoding="utf-8", errors="replace").strip().splitlines()
    reason = Found.model_validate_json(found.read_bytes()).error if found.exists() else said[-1] if said else "no word"
    return f"rank {rank} of {task.ranks} failed on {task.model!r} (status {processes[rank].returncode}): {reason}"


def _written(file: Path) -> int:
    return file.stat().st_mtime_ns if file.exists() else 0
