"""Averages of files against loading everything, one file at a time, and reading alone, in interleaved rounds."""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, NamedTuple

import torch
from pydantic import BaseModel, ConfigDict, ValidationError

from polyak.bench.file_methods import METHODS
from polyak.bench.machine import machine
from polyak.errors import ConfigError
from polyak.io.atomic import write_whole
from polyak.io.progress import track

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

__all__ = ["FilesReport", "FilesRow", "measure_files"]

_TENSOR = 1 << 22  # values: 16 MiB in float32
_KINDS = ("safetensors", "pt")
_BUSY = 0.1  # of the processors' time


class _Sample(NamedTuple):
    """What ``polyak.bench.file_methods`` prints.

    Attributes:
        seconds: How long it took.
        peak: The largest memory above an interpreter with torch, in MiB.
        others: Which part of the processors' time other programs used.
    """

    seconds: float
    peak: float
    others: float


class FilesRow(BaseModel):
    """One method on one format.

    Attributes:
        format: ``"safetensors"`` or ``"pt"``.
        method: The method.
        cold: Whether the files were out of memory.
        rates: MiB of input per second, of each round.
        peak: The largest memory above an interpreter with torch, in MiB.
        busy: The share of the samples in which other programs used the processors.
    """

    model_config = ConfigDict(frozen=True)

    format: str
    method: str
    cold: bool
    rates: tuple[float, ...]
    peak: float
    busy: float = 0.0

    @property
    def rate(self) -> float:
        """The median rate."""
        return statistics.median(self.rates)


class FilesReport(BaseModel):
    """What was measured.

    Attributes:
        machine: The machine, in one line.
        versions: Distributions that took part.
        files: How many files.
        size: MiB of each.
        rows: The methods.
    """

    model_config = ConfigDict(frozen=True)

    machine: str
    versions: dict[str, str]
    files: int
    size: int
    rows: list[FilesRow]

    def against(self, row: FilesRow, method: str) -> float:
        """Return the median over rounds of how many times as fast as another method it is; NaN if that is missing."""
        others = [one for one in self.rows if (one.format, one.method, one.cold) == (row.format, method, row.cold)]
        ratios = [a / b for other in others for a, b in zip(row.rates, other.rates, strict=True)]
        return statistics.median(ratios) if ratios else float("nan")

    @classmethod
    def read(cls, path: Path) -> FilesReport | None:
        """Return the report in a file that ``write`` wrote; None if it is no report of files."""
        try:
            return cls.model_validate_json(path.read_bytes())
        except (OSError, ValidationError):
            return None

    def write(self, path: Path) -> None:
        """Write it as JSON; the file is whole or absent.

        Raises:
            WriteError: If it cannot be written.
        """
        text = self.model_dump_json(indent=1) + "\n"
        write_whole(path, lambda scratch: scratch.write_text(text, encoding="utf-8"))


def measure_files(
    size: int = 256, files: int = 5, rounds: int = 5, after: Callable[[FilesReport], object] | None = None
) -> FilesReport:
    """Measure all methods on both formats; each sample is a process of its own, so that its memory is its own.

    Args:
        size: MiB of each file.
        files: How many files.
        rounds: How many interleaved rounds.
        after: Gets the report of the rounds so far after each one, so that an interruption loses one round only.

    Raises:
        ConfigError: If a number is out of range, or a method fails.
    """
    for name, value, least in (("size", size, 1), ("files", files, 2), ("rounds", rounds, 1)):
        if value < least:
            message = f"{name}: got {value}; expected {least} or more"
            raise ConfigError(message)
    with TemporaryDirectory(prefix="polyak-bench-") as folder:
        paths = {kind: _written(Path(folder), kind, size, files) for kind in _KINDS}
        plan = [
            (kind, method, cold)
            for cold in (False, True)
            for kind in _KINDS
            for method in METHODS
            if _asked(method, cold=cold)
        ]
        found: dict[tuple[str, str, bool], list[_Sample]] = {one: [] for one in plan}
        for number in track(range(rounds), "rounds"):
            for kind, method, cold in plan[number % len(plan) :] + plan[: number % len(plan)]:
                found[kind, method, cold].append(_sample(paths[kind], method, Path(folder) / f"out.{kind}", cold=cold))
            if after is not None:
                after(_report(found, size, files))
    return _report(found, size, files)


def _report(found: Mapping[tuple[str, str, bool], Sequence[_Sample]], size: int, files: int) -> FilesReport:
    rows = [
        FilesRow(
            format=kind, method=method, cold=cold, peak=max(sample.peak for sample in samples),
            rates=tuple(size * files / sample.seconds for sample in samples),
            busy=sum(sample.others > _BUSY for sample in samples) / len(samples),
        )
        for (kind, method, cold), samples in found.items()
    ]  # fmt: skip
    took_part = {name: version(name) for name in ("polyak", "safetensors")}
    return FilesReport(machine=machine(torch.device("cpu")), versions=took_part, files=files, size=size, rows=rows)


def _asked(method: str, *, cold: bool) -> bool:
    return not cold or method in {"read", "polyak", "polyak, sha256"}


def _written(folder: Path, kind: str, size: int, files: int) -> list[Path]:
    paths = []
    for number in range(files):
        generator = torch.Generator().manual_seed(number)
        left = size << 18
        state: dict[str, torch.Tensor] = {}
        while left > 0:
            count = min(left, _TENSOR)
            state[f"layers.{len(state)}.weight"] = torch.randn(count, generator=generator)
            left -= count
        paths.append(folder / f"{number}.{kind}")
        if kind == "pt":
            torch.save(state, paths[-1])
        else:
            from polyak.io.tensor_file import write_tensors

            write_tensors(paths[-1], state, {})
    os.sync()
    return paths


def _sample(paths: Sequence[Path], method: str, out: Path, *, cold: bool) -> _Sample:
    out.unlink(missing_ok=True)
    command = [sys.executable, "-m", "polyak.bench.file_methods", method, "cold" if cold else "hot", str(out)]
    done = subprocess.run([*command, *map(str, paths)], capture_output=True, text=True, check=False)  # noqa: S603 - our own module
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["it was killed"])[-1]
        message = f"the method {method!r} failed: {last}. Give a smaller --size"
        raise ConfigError(message)
    return _Sample(**json.loads(done.stdout))
