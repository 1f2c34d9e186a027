"""``polyak.files.diff``: how far two checkpoints are apart, tensor by tensor."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import torch

from polyak.errors.formatting import shortened
from polyak.files.inputs import check_enough, opened
from polyak.files.plan import planned
from polyak.files.reading.values import read_values

if TYPE_CHECKING:
    import os
    from collections.abc import Sequence

    from matplotlib.axes import Axes

    from polyak.files.plan import Entry
    from polyak.files.reading.raw import Stored

__all__ = ["Difference", "TensorDifference", "diff", "missing"]

_PIECE = 1 << 18  # values
_SHOWN = 12


class TensorDifference(NamedTuple):
    """How far a tensor is from the same one in another file.

    Attributes:
        name: Its name.
        shape: Its shape.
        distance: The Euclidean distance.
        relative: The distance by the size of the first; infinite if that is zero.
        cosine: The cosine of the angle between them; NaN if one is zero.
        largest: The largest distance of two values.
    """

    name: str
    shape: tuple[int, ...]
    distance: float
    relative: float
    cosine: float
    largest: float


@dataclass(frozen=True)
class Difference:
    """How far two checkpoints are apart.

    Attributes:
        tensors: The difference of each tensor, in the order of the first file.
        whole: That of all floats as one vector.
        integers: Names of integers and booleans that differ.
        only_first: Names that only the first file has.
        only_second: Names that only the second file has.
    """

    tensors: tuple[TensorDifference, ...]
    whole: TensorDifference
    integers: tuple[str, ...]
    only_first: tuple[str, ...]
    only_second: tuple[str, ...]

    def sorted(self) -> list[TensorDifference]:
        """Return the tensors, those that are relatively farthest apart first."""
        return sorted(self.tensors, key=lambda one: -math.inf if math.isnan(one.relative) else -one.relative)

    def plot(self, ax: Axes | None = None) -> Axes:
        """Draw the relative distance of each tensor by its depth, which is the order of the file.

        Args:
            ax: Where to draw. Defaults to a new figure.

        Raises:
            MissingExtraError: If matplotlib is not installed.
        """
        from polyak.plot import depths

        return depths([(one.name, one.relative) for one in self.tensors], ax, level=self.whole.relative)


class _Sums:
    """Sums over the values of two tensors, in float64."""

    def __init__(self) -> None:
        self.first = self.second = self.product = self.distance = self.largest = 0.0

    def take(self, first: Stored, second: Stored) -> None:
        """Add up all values of two tensors, read in pieces."""
        for begin in range(0, math.prod(first.shape), _PIECE):
            end = min(math.prod(first.shape), begin + _PIECE)
            a, b = (read_values(stored, begin, end).to(torch.float64) for stored in (first, second))
            apart = a - b
            self.first += torch.dot(a, a).item()
            self.second += torch.dot(b, b).item()
            self.product += torch.dot(a, b).item()
            self.distance += torch.dot(apart, apart).item()
            self.largest = max(self.largest, apart.abs().max().item())

    def add(self, other: _Sums) -> None:
        """Add the sums of another tensor."""
        self.first += other.first
        self.second += other.second
        self.product += other.product
        self.distance += other.distance
        self.largest = max(self.largest, other.largest)

    def result(self, name: str, shape: tuple[int, ...]) -> TensorDifference:
        """Return the distances that the sums give."""
        distance = math.sqrt(self.distance)
        sizes = math.sqrt(self.first), math.sqrt(self.second)
        relative = distance / sizes[0] if sizes[0] else math.inf if distance else 0.0
        cosine = math.nan
        if all(sizes):
            cosine = max(-1.0, min(1.0, self.product / math.sqrt(self.first * self.second))) if distance else 1.0
        return TensorDifference(name, shape, distance, relative, cosine, self.largest)


def diff(a: str | os.PathLike[str], b: str | os.PathLike[str], *, key: str | None = None) -> Difference:
    """Compare two checkpoints tensor by tensor, read in pieces.

    Args:
        a: The first checkpoint.
        b: The second one.
        key: The path of keys to the weights in a dictionary. Defaults to the one that is usual.

    Raises:
        ConfigError: If both are one file, or they have no tensor in common.
        MismatchError: If shapes differ.
        StateError: If a file cannot be read.

    Often confused with: the distance of two *models*, whose outputs may be equal for weights that are far apart.

    Examples:
        >>> import tempfile, torch
        >>> from polyak import files
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     torch.save({"a": torch.ones(4), "b": torch.ones(4)}, f"{folder}/1.pt")
        ...     torch.save({"a": torch.ones(4), "b": -torch.ones(4)}, f"{folder}/2.pt")
        ...     found = files.diff(f"{folder}/1.pt", f"{folder}/2.pt")
        >>> [(one.name, one.relative, one.cosine) for one in found.sorted()]
        [('b', 2.0, -1.0), ('a', 0.0, 1.0)]
    """
    with opened([a, b], key) as found:
        check_enough(found)
        first, second = found
        entries, _ = planned(found, match="common", integers="last", dtype=None)
        total, tensors, integers = _Sums(), [], []
        for entry in entries:
            if not entry.combined:
                integers += [*entry.names] if _differ(entry) else []
                continue
            sums = _Sums()
            sums.take(*entry.sources)
            total.add(sums)
            tensors += [sums.result(name, entry.shape) for name in entry.names]
        common = {name for entry in entries for name in entry.names}
        lacking = [tuple(name for name in one.names if name not in common) for one in (first, second)]
        return Difference(tuple(tensors), total.result("all", ()), tuple(integers), lacking[0], lacking[1])


def missing(found: Difference) -> list[str]:
    """Return in words which tensors only one of the files has, and which integers differ."""
    lines = [
        ("only in the first", found.only_first),
        ("only in the second", found.only_second),
        ("integers that differ", found.integers),
    ]
    return [f"{words}: {shortened(names, _SHOWN, ', ')}" for words, names in lines if names]


def _differ(entry: Entry) -> bool:
    first, second = entry.sources
    count = math.prod(first.shape)
    if first.dtype != second.dtype:
        return True
    steps: Sequence[int] = range(0, count, _PIECE)
    ends = [min(count, begin + _PIECE) for begin in steps]
    pairs = zip(steps, ends, strict=True)
    return any(not torch.equal(read_values(first, i, j), read_values(second, i, j)) for i, j in pairs)
