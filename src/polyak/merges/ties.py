"""TIES: trim what hardly changed, elect a sign, average what agrees."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal, NamedTuple

from pydantic import Field
from typing_extensions import override

from polyak.merges.base import Merge
from polyak.merges.chunks import in_chunks
from polyak.merges.election import Divide, Elect, agreed, elected
from polyak.merges.trimming import Search, count_of, counted, narrowed, trim
from polyak.merges.weighted import Finite, added, changes_of

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from torch import Tensor

    from polyak.merges.about import About

__all__ = ["Ties"]


class _Statistics(NamedTuple):
    """What is known of the whole model.

    Attributes:
        search: The search for the least size that is kept.
        majority: The sum of all elected signs; None before it is known.
    """

    search: Search | None
    majority: float | None


class Ties(Merge):
    """The base with the mean of the changes that are large and agree in sign: trim, elect sign, disjoint mean.

    1. Of each change ``x_i - b`` the part ``density`` that is largest by size is kept; the rest becomes 0.
    2. For each value a sign is elected.
    3. The result is ``b + lam sum(w_i t_i) / divisor`` over the changes t that have this sign.

    Source: Yadav et al., "TIES-Merging" (2023), arXiv:2306.01708. Variants:

    - mergekit: ``elect="weighted_mass", divide="weights"`` (the defaults);
    - PEFT: ``elect="mass", divide="count", least=0``;
    - the paper's code: ``scope="model", keep="at_least", elect="mass", divide="count", zero="majority"``.

    Often confused with: ``dare(then="ties")``, which drops at random instead of by size.
    """

    source: ClassVar[str] = "Yadav et al. 2023, arXiv:2306.01708"
    base: ClassVar[Literal["required", "optional", "none"]] = "required"
    weighing: ClassVar[Literal["mean", "sum", "none"]] = "sum"

    name: Literal["ties"] = "ties"
    density: Annotated[float, Field(ge=0, le=1)] = 0.2
    """The part of each change that is kept."""
    scope: Literal["tensor", "model"] = "tensor"
    """Whether the largest of each tensor are kept, or the largest of the whole model."""
    elect: Elect = "weighted_mass"
    """What elects the sign: the sum of changes, of weighted changes, or the number of signs."""
    divide: Divide = "weights"
    """What the sum is divided by: the weights that agree, or their number."""
    keep: Literal["exact", "at_least"] = "exact"
    """Whether exactly that part is kept, or all that are as large as the first that would not be. In the scope of a
    model, equal values at the limit are kept together."""
    least: Annotated[int, Field(ge=0)] = 1
    """How many values of a tensor are kept at least."""
    zero: Literal["positive", "majority"] = "positive"
    """The sign of a sum of 0: plus, or the sign of most values of the model."""
    lam: Finite = 1.0
    """The factor of the merged change."""

    @override
    def in_pieces(self) -> bool:
        return self.scope == "model"

    @override
    def measures(self) -> bool:
        return self.scope == "model" or self.zero == "majority"

    @override
    def measure(self, tensors: Sequence[Tensor], base: Tensor | None, about: About) -> Any:
        known: _Statistics | None = about.statistics
        search = known.search if known else None
        changes = changes_of(tensors, base)
        if self.scope == "model" and (search is None or not search.is_done):
            return search, counted(changes, search)
        trimmed = self._trimmed(changes, search)
        return search, elected(trimmed, about.weights, self.elect).sign().sum().item()

    @override
    def gather(self, measured: Iterable[Any]) -> _Statistics:
        rows = iter(measured)
        search, first = next(rows)
        values = self._values(first, rows)
        if isinstance(first, float):
            return _Statistics(search, sum(values))
        return _Statistics(narrowed(values, search, self.density, int(self.keep == "at_least")), None)

    @staticmethod
    def _values(first: Any, rows: Iterable[Any]) -> Iterable[Any]:  # noqa: ANN401 - what measure returned
        yield first
        for _, value in rows:
            yield value

    @override
    def again(self, statistics: _Statistics) -> bool:
        searching = self.scope == "model" and (statistics.search is None or not statistics.search.is_done)
        return searching or (self.zero == "majority" and statistics.majority is None)

    @override
    def merge(self, tensors: Sequence[Tensor], base: Tensor | None, about: About) -> Tensor:
        known: _Statistics | None = about.statistics
        changes = self._trimmed(changes_of(tensors, base), known.search if known else None)
        zero = known.majority if known and known.majority is not None and self.zero == "majority" else 1.0

        def result(parts: Sequence[Tensor], below: Tensor | None) -> Tensor:
            votes = elected(parts, about.weights, self.elect)
            return added(below, agreed(parts, about.weights, votes, self.divide, zero), self.lam)

        return in_chunks(result, changes, base)

    def _trimmed(self, changes: Sequence[Tensor], search: Search | None) -> list[Tensor]:
        if self.density >= 1:
            return [*changes]
        if search is not None:
            pairs = zip(changes, search.limits(), strict=True)
            return [change.masked_fill_(change.abs() < limit, 0.0) for change, limit in pairs]
        count = count_of(self.density, changes[0].numel(), self.least)
        at_least = self.keep == "at_least"
        return [trim(change, count, at_least=at_least) for change in changes]
