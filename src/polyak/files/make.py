"""One result of several checkpoints: streamed, written and described."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch

from polyak.errors import ConfigError
from polyak.errors.formatting import shown
from polyak.files.hashing import Digest
from polyak.files.lanes import usual_threads
from polyak.files.provenance import texts_of
from polyak.files.reading.values import bytes_of
from polyak.files.stream import Settings, stream
from polyak.files.writing.target import write_result
from polyak.io.atomic import as_path
from polyak.io.progress import transfer
from polyak.strategy.numbers import given_integer

if TYPE_CHECKING:
    import os
    from collections.abc import Callable, Mapping, Sequence
    from pathlib import Path

    from torch import Tensor

    from polyak.files.checkpoint import Checkpoint
    from polyak.files.plan import Entry, Integers
    from polyak.files.stream import Combine
    from polyak.files.writing.target import Target

__all__ = ["Job", "Request", "make"]

_SHARD_SIZE = 5_000_000_000  # bytes, as Hugging Face has it


@dataclass(frozen=True)
class Request:
    """How and where to write.

    Attributes:
        out: The file or folder.
        threads: On how many threads.
        hashes: Whether the sha256 of each input is taken.
        integers: What becomes of integers and booleans.
        shard_size: The largest file of a folder, in bytes.
    """

    out: Path
    threads: int
    hashes: bool
    integers: Integers
    shard_size: int

    @classmethod
    def of(
        cls,
        out: str | os.PathLike[str],
        threads: int | None,
        shard_size: int | str | None,
        integers: Integers,
        *,
        hashes: bool,
    ) -> Request:
        """Return checked settings.

        Raises:
            ArgumentError: If ``out`` is no path.
            ConfigError: If a number is out of range.
        """
        count = usual_threads() if threads is None else given_integer("threads", threads, 1, 256)
        return cls(as_path(out, "the output"), count, hashes, integers, size_of(shard_size))


@dataclass(frozen=True)
class Job:
    """What is computed.

    Attributes:
        kind: The key in the metadata.
        inputs: The checkpoints, in order.
        entries: The tensors that are streamed.
        combine: Makes what combines pieces, once for each thread.
        record: The options and the results for the metadata, in plain types.
        model: The input that a folder takes its other files from.
        fixed: Tensors that are computed already.
        edits: Changes of tables in a folder: file, key and value.
    """

    kind: str
    inputs: Sequence[Checkpoint]
    entries: Sequence[Entry]
    combine: Callable[[], Combine]
    record: Mapping[str, Any]
    model: Checkpoint
    fixed: Mapping[str, Tensor] = field(default_factory=dict)
    edits: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)


def make(job: Job, request: Request) -> dict[str, str]:
    """Write a result, whole or not at all; return the sha256 of each input file by its path, if they are taken.

    Raises:
        NonFiniteError: If an input has a NaN or an infinity.
        MismatchError: If integers differ that must not.
        StateError: If a file cannot be read.
        WriteError: If the output cannot be written.
    """
    sums: dict[str, str] = {}

    def fill(output: Target) -> Mapping[str, str]:
        with transfer(bytes_in(job.entries), job.kind.removeprefix("polyak_")) as progress:
            settings = Settings(request.threads, request.hashes, request.integers, progress)
            sums.update(stream(job.inputs, in_order(job.entries), output, job.combine, settings))
        for name, tensor in job.fixed.items():
            real = torch.view_as_real(tensor) if tensor.is_complex() else tensor
            output.write(name, 0, bytes_of(real.contiguous().reshape(-1)))
        if request.hashes and not job.entries:
            sums.update({str(file.path): Digest(file).finish() for one in job.inputs for file in one.raw_files()})
        return texts_of(job.kind, job.inputs, job.record, sums, hashes=request.hashes, model=job.model)

    texts = texts_of(job.kind, job.inputs, job.record, None, hashes=request.hashes, model=job.model)
    order = {name: number for number, name in enumerate(job.inputs[0].names)}
    tensors = [(name, entry.dtype, entry.shape) for entry in job.entries for name in entry.names]
    tensors += [(name, tensor.dtype, tuple(tensor.shape)) for name, tensor in job.fixed.items()]
    tensors.sort(key=lambda tensor: order.get(tensor[0], len(order)))
    tied = {name: entry.names[0] for entry in job.entries for name in entry.names[1:]}
    write_result(request.out, tensors, tied, job.model, request.shard_size, fill, texts, job.edits)
    return sums


def in_order(entries: Sequence[Entry]) -> list[Entry]:
    """Return tensors in the order of the output: long dtypes first, then as they lie in the first file."""
    return sorted(entries, key=lambda entry: (-entry.dtype.itemsize, entry.sources[0].begin))


def bytes_in(entries: Sequence[Entry]) -> int:
    """Return how many bytes of the inputs are read."""
    return sum(math.prod(stored.shape) * stored.dtype.itemsize for entry in entries for stored in entry.sources)


def size_of(given: int | str | None) -> int:
    """Return the largest size of a file in bytes.

    Raises:
        ConfigError: If it is no number of bytes.
    """
    if given is None:
        return _SHARD_SIZE
    units = {"GIB": 1 << 30, "MIB": 1 << 20, "GB": 10**9, "MB": 10**6, "KB": 10**3, "B": 1, "": 1}
    if isinstance(given, str):
        text = given.strip().upper()
        digits = text.rstrip("GIMKB ")
        try:
            number = float(digits) * units[text[len(digits) :].strip()]
        except (ValueError, KeyError):
            number = 0.0
        if 1 <= number < 2**62:
            return int(number)
    elif type(given) is int and given >= 1:
        return given
    message = f"shard_size: got {shown(given)}; expected bytes, or a text such as '5GB'"
    raise ConfigError(message)
