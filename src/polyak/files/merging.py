"""A merge at work on pieces or whole tensors, and its passes before."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch

from polyak.errors import ConfigError, NonFiniteError, PolyakError
from polyak.errors.formatting import shown
from polyak.files.combine import first_bad, largest, refuse_large
from polyak.files.reading.values import read_values
from polyak.files.rounding import round_into
from polyak.merges.about import About

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Sequence

    from torch import Tensor

    from polyak.files.plan import Entry
    from polyak.files.stream import Combine, Piece
    from polyak.merges.base import Merge

__all__ = ["Merging", "measured", "measured_tensors"]

_PIECE = 1 << 18  # values
_MOST = 100  # passes


@dataclass(frozen=True)
class Merging:
    """A merge, its weights and its statistics.

    Attributes:
        method: The merge.
        weights: What each input counts.
        inputs: How many inputs there are.
        bases: Whether the next file is the base: 1 or 0.
        seed: The seed.
        raises: Whether a NaN or an infinity is refused.
        statistics: What ``gather`` returned.
    """

    method: Merge
    weights: tuple[float, ...]
    inputs: int
    bases: int
    seed: int
    raises: bool
    statistics: Any = None

    def combine(self) -> Combine:
        """Return an object that merges pieces, for one thread."""
        return _Combined(self)

    def about(self, entry: Entry, begin: int, count: int, extras: Sequence[Tensor]) -> About:
        """Return the description of some values that a merge gets."""
        shape = (*entry.shape, 2) if entry.dtype.is_complex else entry.shape
        return About(entry.names[0], shape, begin, count, self.weights, self.statistics, self.seed, tuple(extras))

    def called(self, function: Callable[..., Any], entry: Entry, begin: int, sources: Sequence[Tensor]) -> Any:  # noqa: ANN401 - of a plugin
        """Call ``merge`` or ``measure`` with values of all files.

        Raises:
            ConfigError: If it raises something else than polyak's errors.
        """
        shape = ((*entry.shape, 2) if entry.dtype.is_complex else entry.shape) if not self.method.in_pieces() else (-1,)
        wide = [source.to(torch.float64).reshape(shape) for source in sources]
        tensors, rest = wide[: self.inputs], wide[self.inputs :]
        about = self.about(entry, begin, sources[0].numel(), rest[self.bases :])
        try:
            return function(tensors, rest[0] if self.bases else None, about)
        except PolyakError:
            raise
        except Exception as error:
            message = f"the merge {self.method!r} failed for {shown(entry.names[0])}: {type(error).__name__}: {error}"
            raise ConfigError(message) from error


class _Combined:
    """Merges pieces for one thread."""

    def __init__(self, merging: Merging) -> None:
        self._merging = merging
        self.whole = not merging.method.in_pieces()

    def __call__(self, piece: Piece, sources: Sequence[Tensor], out: Tensor) -> int:
        merging = self._merging
        if merging.raises and (bad := first_bad(sources)) >= 0:
            return bad
        lost = None if merging.raises else _nan_in(sources[: merging.inputs + merging.bases])
        made = merging.called(merging.method.merge, piece.entry, piece.begin, sources)
        if not isinstance(made, torch.Tensor) or made.numel() != out.numel():
            what = f"shape {tuple(made.shape)}" if isinstance(made, torch.Tensor) else shown(made)
            name = shown(piece.entry.names[0])
            message = f"the merge {merging.method!r} returned {what} for {name} of {out.numel()} values"
            raise ConfigError(message)
        exact = made.detach().to(torch.float64).reshape(-1)
        if merging.raises and exact.numel() and not (size := largest(exact)) <= torch.finfo(out.dtype).max:
            if math.isfinite(size):
                refuse_large(piece, out.dtype, size)
            message = f"the merge {merging.method!r} made a NaN or an infinity of {shown(piece.entry.names[0])}"
            raise NonFiniteError(message)
        if lost is not None:  # trimming, elections and medians would hide them
            exact = exact.masked_fill(lost, math.nan)
        round_into(out, exact)
        return -1


def _nan_in(sources: Sequence[Tensor]) -> Tensor | None:
    """Return where any of several flat tensors has a NaN; None if none has."""
    lost = torch.zeros(sources[0].numel(), dtype=torch.bool, device="cpu")
    for source in sources:
        for own, part in zip(torch.split(lost, _PIECE), torch.split(source, _PIECE), strict=True):
            own.logical_or_(part.to(torch.float64).isnan())
    return lost if lost.any() else None


def measured(merging: Merging, entries: Sequence[Entry]) -> Any:  # noqa: ANN401 - as gather returns it
    """Return the statistics of the whole model; None for merges that need none.

    Raises:
        ConfigError: If a merge asks for passes without end.
    """
    return measured_tensors(merging.method, lambda known: _pass(replace(merging, statistics=known), entries))


def measured_tensors(method: Merge, one_pass: Callable[[Any], Iterable[Any]]) -> Any:  # noqa: ANN401 - as gather returns it
    """Return the statistics that a merge gathers in as many passes as it asks for; None for merges that need none.

    Args:
        method: The merge.
        one_pass: Returns what it measures, given the statistics of the pass before.

    Raises:
        ConfigError: If it asks for passes without end.
    """
    if not method.measures():
        return None
    statistics: Any = None
    for _ in range(_MOST):
        statistics = method.gather(one_pass(statistics))
        if not method.again(statistics):
            return statistics
    message = f"the merge {method!r} asks for more than {_MOST} passes"
    raise ConfigError(message)


def _pass(merging: Merging, entries: Sequence[Entry]) -> Iterator[Any]:
    for entry in entries:
        count = math.prod(entry.sources[0].shape)
        if not entry.combined or not count:
            continue
        step = _PIECE if merging.method.in_pieces() else count
        for begin in range(0, count, step):
            end = min(count, begin + step)
            sources = [read_values(stored, begin, end) for stored in entry.sources]
            yield merging.called(merging.method.measure, entry, begin, sources)
